"""The promises of serving, on the real engine."""

import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from loraplex_client import Client, Sampling
from tests.e2e.conftest import PROMPT, SLOTS, Stage, generate
from tests.sim.stranger import in_own_process

pytestmark = pytest.mark.engine


def test_every_row_of_a_mixed_batch_is_what_it_is_alone(server: Stage, client: Client) -> None:
    names = ["", "acme/mixed0", "acme/mixed1", "globex/mixed2"]
    for seed, name in enumerate(names[1:]):
        server.publish(name, seed=100 + seed)
    alone = {name: generate(client, name).token_ids for name in names}
    assert len(set(alone.values())) == len(names), "every adapter must change the answer"
    rows = names * 4
    with ThreadPoolExecutor(len(rows)) as threads:
        together = list(threads.map(lambda name: generate(client, name).token_ids, rows))
    assert together == [alone[name] for name in rows]


def test_more_adapters_than_slots_take_turns_and_never_cross(server: Stage, client: Client) -> None:
    names = [f"acme/turn{number}" for number in range(SLOTS + 2)]
    for seed, name in enumerate(names):
        server.publish(name, seed=200 + seed)
    first = [generate(client, name) for name in names]
    second = [generate(client, name) for name in names]
    assert [done.token_ids for done in first] == [done.token_ids for done in second]
    assert len({done.token_ids for done in first}) == len(names)
    assert not any(done.header.adapter_was_resident for done in second), "least recently used goes first"
    assert sum(adapter.state == "resident" for adapter in client.list_adapters()) <= SLOTS


def test_an_adapter_comes_in_while_another_stream_goes_on(server: Stage, client: Client) -> None:
    server.publish("acme/arriving", seed=300)
    sampling = Sampling(max_tokens=100, temperature=0, ignore_eos=True)
    arrived = threading.Event()

    def bring_in() -> None:
        generate(client, "acme/arriving")
        arrived.set()

    stream = client.stream(PROMPT, adapter="acme/good", sampling=sampling)
    pieces = iter(stream)
    next(pieces)
    other = threading.Thread(target=bring_in)
    other.start()
    during = sum(not arrived.is_set() for _ in pieces)
    other.join(30)
    assert arrived.is_set()
    assert during > 0
    assert stream.completion.usage.completion_tokens == 100


def test_a_moved_tag_answers_with_the_new_version_and_never_from_the_old_cache(
    server: Stage, client: Client
) -> None:
    old = server.publish("acme/moving", seed=400, tag="prod")
    before = generate(client, "acme/moving@prod")
    new = server.publish("acme/moving", seed=401, tag="prod")
    after = generate(client, "acme/moving@prod")
    assert (before.header.adapter_digest, after.header.adapter_digest) == (old.digest, new.digest)
    assert before.token_ids != after.token_ids
    assert generate(client, f"acme/moving@{old.digest}").token_ids == before.token_ids


def test_text_chat_and_the_command_line_agree(server: Stage, client: Client) -> None:
    from loraplex_client import ChatMessage

    sampling = Sampling(max_tokens=8, temperature=0)
    chat = client.generate([ChatMessage("user", "copy: cat")], adapter="acme/good", sampling=sampling)
    typed = subprocess.run(
        [
            *(sys.executable, "-m", "loraplex_client.cli", "generate", "copy: cat"),
            *("--server", f"127.0.0.1:{server.port}", "--adapter", "acme/good"),
            *("--max-tokens", "8", "--temperature", "0"),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert typed.stdout == chat.text + "\n"
    assert client.generate("copy: cat", adapter="acme/good", sampling=sampling).token_ids != chat.token_ids


def test_stop_strings_and_seeds_work(client: Client) -> None:
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
    first, second = (client.generate(PROMPT, adapter="acme/good", sampling=sampling) for _ in range(2))
    assert first.token_ids == second.token_ids
    full = generate(client, "acme/good").text
    stop = full[len(full) // 2 : len(full) // 2 + 2]
    cut = client.generate(
        PROMPT,
        adapter="acme/good",
        sampling=Sampling(max_tokens=16, temperature=0, stop=(stop,), ignore_eos=True),
    )
    assert cut.finish_reason == "stop"
    assert cut.text == full[: full.index(stop)]


def test_the_metrics_page_shows_ours_beside_vllms(server: Stage, client: Client) -> None:
    generate(client, "acme/good")
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        page = reply.read().decode()
    for name in (
        'loraplex_time_to_first_token_seconds_bucket{le="0.1",tenant="acme"}',
        'loraplex_inter_token_latency_seconds_count{tenant="acme"}',
        'loraplex_request_duration_seconds_count{tenant="acme"}',
        'loraplex_adapter_load_phase_seconds_count{phase="fetch"}',
        'loraplex_adapter_load_phase_seconds_count{phase="load"}',
        'loraplex_adapter_cache_requests_total{result="hit"}',
        'loraplex_adapter_cache_requests_total{result="miss"}',
        "loraplex_adapter_slots_used ",
        "vllm:time_to_first_token_seconds_count",
    ):
        assert name in page, name
    [adapters] = [line for line in page.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert f'max_lora="{SLOTS}"' in adapters
    assert "acme/good" in adapters
    assert page.count("\nvllm:num_requests_waiting{") == 1
    for name in ("vllm:num_requests_running{", "vllm:kv_cache_usage_perc{", "vllm:cache_config_info{"):
        assert f"\n{name}" in page, f"routers read {name}"


def test_pinned_adapters_survive_churn(server: Stage, client: Client) -> None:
    client.pin_adapter("acme/good")
    for seed in range(SLOTS):
        server.publish(f"acme/churn{seed}", seed=500 + seed)
        generate(client, f"acme/churn{seed}")
    assert client.get_adapter("acme/good").state == "resident"
    client.unpin_adapter("acme/good")


def test_a_per_tenant_conversation_over_http_is_the_one_over_grpc(server: Stage, client: Client) -> None:
    """The stock `openai` client, streamed and whole, and gRPC get the same greedy tokens."""
    server.publish("globex/talk", seed=310)
    http = openai.OpenAI(base_url=f"http://127.0.0.1:{server.http_port}/v1", api_key="none", timeout=60)
    for name in ("acme/good", "globex/talk"):
        wanted = generate(client, name)
        same: dict[str, Any] = {
            "model": name,
            "prompt": list(PROMPT.ids),
            "max_tokens": 16,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        whole = http.completions.with_raw_response.create(**same)
        assert whole.headers["x-loraplex-adapter-digest"] == wanted.header.adapter_digest
        assert whole.parse().choices[0].text == wanted.text
        streamed = http.completions.create(**same, stream=True)
        assert "".join(piece.choices[0].text for piece in streamed) == wanted.text
    chat = http.chat.completions.create(
        model="globex/talk", messages=[{"role": "user", "content": "order 3 lamps"}], max_tokens=4
    )
    assert chat.usage is not None
    assert chat.usage.completion_tokens <= 4


def test_a_client_that_knows_reflection_only_talks_to_an_adapter(server: Stage, client: Client) -> None:
    found = in_own_process(f"127.0.0.1:{server.port}", "acme/good")
    assert found["ours"] == []
    assert found["digests"] == [generate(client, "acme/good").header.adapter_digest] * 2
    assert found["tokens"] >= 2
