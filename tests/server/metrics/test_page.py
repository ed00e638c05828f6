"""The page stays bounded, adds up, and shows routers what they ask for."""

import asyncio
import urllib.request
from collections import defaultdict

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.config import LimitSettings
from loraplex_server.metrics import OUTCOMES, Gateway, Metrics, remembered
from loraplex_server.metrics.gateway import WAITING_MAX
from loraplex_server.metrics.page import ChangedRegistry
from tests.server.campaigns.scrape import one_call, scraped
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running, until


def fetched(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        return str(reply.read().decode())


def page(metrics: Metrics) -> str:
    """What `serve` shows, without its server, which takes half a second to stop."""
    return generate_latest(ChangedRegistry(metrics._registry, metrics._shown)).decode()


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name].append((sample.labels, sample.value))
    return found


def test_every_family_adds_up_whatever_the_number_of_tenants_and_adapters() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(tenants_max=3, adapters_max=3, registry=registry)
    for number in range(200):
        adapter = f"tenant{number}/a" if number % 10 else ""
        one_call(metrics, f"tenant{number}", adapter, OUTCOMES[number % 4])
    metrics.request_started()
    metrics.request_ended(None, "tenant0", "failed", 0.0)
    found = samples(page(metrics))
    for label, prefix in (("tenant", "loraplex"), ("adapter", "loraplex_adapter")):
        rows = found[f"{prefix}_requests_total"]
        assert len({labels[label] for labels, _ in rows}) <= 6
        assert sum(value for _, value in rows) == 201
        assert sum(value for _, value in found[f"{prefix}_generated_tokens_total"]) == 1000
        for name, count, total in (("time_to_first_token", 200, 25.0), ("inter_token_latency", 800, 100.0)):
            assert sum(value for _, value in found[f"{prefix}_{name}_seconds_count"]) == count
            assert sum(value for _, value in found[f"{prefix}_{name}_seconds_sum"]) == total
            buckets = found[f"{prefix}_{name}_seconds_bucket"]
            assert sum(value for labels, value in buckets if labels["le"] == "+Inf") == count
    assert sum(value for _, value in found["loraplex_prompt_tokens_total"]) == 1400
    assert sum(value for _, value in found["loraplex_prompt_cached_tokens_total"]) == 1000
    assert sum(value for _, value in found["loraplex_request_duration_seconds_count"]) == 50
    assert sum(value for _, value in found["loraplex_turn_wait_seconds_sum"]) == 50.0
    base = [
        value
        for labels, value in found["loraplex_adapter_generated_tokens_total"]
        if labels["adapter"] == "base"
    ]
    assert base == [100]
    assert found["loraplex_requests_in_flight"] == [({}, 0)]


def test_the_page_is_as_long_for_ten_thousand_adapters_as_for_ten() -> None:
    few, many = scraped(10), scraped(10_000)
    assert few.series == many.series
    assert many.size_bytes <= few.size_bytes * 1.05, "digits may grow, nothing else"
    assert few.exact
    assert many.exact


def test_an_operator_may_have_more_labels() -> None:
    default, more = scraped(30), scraped(30, LimitSettings(tenants_labelled_max=20, adapters_labelled_max=20))
    assert more.series > 1.5 * default.series
    assert more.exact


def test_the_page_without_a_gateway_hides_the_unbounded_one_of_vllm() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(tenants_max=3, registry=registry)
    Gauge("vllm:lora_requests_info", "unbounded", registry=registry).set(1)
    Gauge("vllm:num_requests_waiting", "bounded", registry=registry).set(1)
    found = samples(page(metrics))
    assert found["vllm:num_requests_waiting"] == [({}, 1.0)]
    assert "vllm:lora_requests_info" not in found


def test_routers_see_the_whole_queue_and_one_series_of_adapters() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(tenants_max=3, registry=registry)
    unbounded = Gauge("vllm:lora_requests_info", "unbounded", ("running_lora_adapters",), registry=registry)
    unbounded.labels("a").set(1)
    unbounded.labels("a,b").set(2)
    Gauge("vllm:num_requests_waiting", "vLLM's", ("engine",), registry=registry).labels("0").set(2)
    waiting = [f"acme/w{number:04}" for number in range(WAITING_MAX + 50)]
    metrics.show_gateway(
        Gateway(
            slots=8,
            running=lambda: ["acme/b", "acme/a", "acme/a", "acme/w0000"],
            waiting=lambda: waiting,
            queued=lambda: 5,
        )
    )
    found = samples(page(metrics))
    assert found["vllm:num_requests_waiting"] == [({"engine": "0"}, 7.0)]
    [(labels, moment)] = found["vllm:lora_requests_info"]
    assert labels["max_lora"] == "8"
    assert labels["running_lora_adapters"] == "acme/a,acme/b,acme/w0000"
    assert labels["waiting_lora_adapters"].split(",") == waiting[1 : WAITING_MAX + 1]
    assert moment > 1.7e9


async def test_routers_see_what_is_really_running_and_waited_for(shop: Shop) -> None:
    for adapter in ("acme/orders", "acme/mail", "acme/late"):
        shop.publish(adapter)
    async with running(shop) as rig, rig.client() as client:
        await client.generate("x", adapter="acme/mail", sampling=FOUR)
        rig.engine.may_go_on.clear()
        calls = [client.generate("x", adapter=name, sampling=FOUR) for name in ("acme/mail", "acme/orders")]
        tasks = [asyncio.create_task(call) for call in calls]
        await until(lambda: rig.engine.running == 2)
        late = asyncio.create_task(client.generate("x", adapter="acme/late", sampling=FOUR))

        async def labels() -> dict[str, str]:
            found = samples(await asyncio.to_thread(fetched, rig.app.metrics_port))
            [(shown, _)] = found["vllm:lora_requests_info"]
            return shown

        for _ in range(100):
            shown = await labels()
            if shown["waiting_lora_adapters"]:
                break
            await asyncio.sleep(0.02)
        assert shown == {
            "max_lora": "2",
            "running_lora_adapters": "acme/mail,acme/orders",
            "waiting_lora_adapters": "acme/late",
        }
        found = samples(await asyncio.to_thread(fetched, rig.app.metrics_port))
        tiers = {labels["tier"]: value for labels, value in found["loraplex_adapters"]}
        assert tiers["slot"] == 2
        assert tiers["disk"] >= 2
        sizes = {labels["tier"]: value for labels, value in found["loraplex_adapter_bytes"]}
        assert sizes["slot"] > 0
        rig.engine.may_go_on.set()
        await asyncio.gather(*tasks, late)
        assert (await labels())["waiting_lora_adapters"] == ""
        assert rig.app._metrics.wanted == []


async def test_gateway_metrics_can_be_turned_off(shop: Shop) -> None:
    async with running(shop, server={"gateway_metrics": False}) as rig:
        assert "vllm:" not in await asyncio.to_thread(fetched, rig.app.metrics_port)


def test_a_gauge_that_cannot_be_read_shows_nan_and_the_page_stays() -> None:
    metrics = Metrics(tenants_max=1, registry=CollectorRegistry())

    def changing() -> float:
        raise RuntimeError("dictionary changed size during iteration")

    def broken() -> float:
        raise KeyError("gone")

    metrics.waiting.set_function(changing)
    metrics.pins.set_function(broken)
    text = page(metrics)
    assert "loraplex_requests_waiting NaN" in text
    assert "loraplex_adapters_pinned NaN" in text


def test_what_is_dear_to_know_is_asked_for_once_in_a_while() -> None:
    now, asked = [0.0], []

    def read() -> int:
        asked.append(now[0])
        return len(asked)

    latest = remembered(read, seconds=10, clock=lambda: now[0])
    for moment in (0.0, 5.0, 9.9, 10.0, 19.0, 25.0):
        now[0] = moment
        latest()
    assert asked == [0.0, 10.0, 25.0]


@pytest.mark.parametrize("outcome", ["cancelled", "expired", "failed"])
def test_a_call_that_ends_while_it_waits_for_its_adapter_waits_no_more(outcome: str) -> None:
    metrics = Metrics(tenants_max=1, registry=CollectorRegistry())
    metrics.request_started()
    counted, other = metrics.call("acme", "acme/orders"), metrics.call("acme", "acme/orders")
    metrics.request_ended(counted, "acme", outcome, 0.0)
    assert metrics.wanted == ["acme/orders"]
    other.adapter_ready()
    other.adapter_ready()
    assert metrics.wanted == []


@pytest.mark.parametrize("tenants_max", [1, 5])
def test_calls_that_end_unresolved_are_counted_for_their_caller(tenants_max: int) -> None:
    metrics = Metrics(tenants_max=tenants_max, registry=CollectorRegistry())
    metrics.request_started()
    metrics.request_ended(None, "acme", "failed", 0.0)
    found = samples(page(metrics))
    rows = [labels for labels, value in found["loraplex_adapter_requests_total"] if value]
    assert rows == [{"adapter": "unresolved", "outcome": "failed"}]
