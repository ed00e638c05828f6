"""Bad input gets its reason, the engine goes on serving others, and nothing half-loaded stays.

The last two are asserted after every test, by the `client` fixture.
"""

import base64
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loraplex_client import (
    AdapterNotFoundError,
    AdapterRefusedError,
    Client,
    ContextTooLongError,
    InvalidRequestError,
    LoraplexError,
    Sampling,
    TokenIds,
    UnavailableError,
)
from loraplex_registry.errors import BaseMismatchError, UnsupportedAdapterError
from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.lifecycle.publish import Content, Publication
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import utc_now
from loraplex_registry.storage.store import CountingStore, open_store
from loraplex_registry.validation.weights import validate_adapter
from tests.e2e.conftest import PROMPT, RANK_MAX, Stage, generate, write_adapter, write_settings
from tests.e2e.spoiling import refused_by_the_engine, served_afterwards

pytestmark = pytest.mark.engine


def refusal(client: Client, adapter: str) -> str:
    """The reason an adapter is refused with."""
    with pytest.raises(AdapterRefusedError) as caught:
        generate(client, adapter)
    return caught.value.code


def publish_unchecked(server: Stage, directory: Path, ref: str) -> None:
    """What a publisher with a valid key and no scruples can do: sign and push files that nothing checked."""
    good = write_adapter(server.base, server.root / "plain", seed=9)
    facts = validate_adapter(good, server.base)
    files = tuple(
        FileEntry(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(directory.iterdir())
    )
    parsed = AdapterRef.parse(ref)
    content = Content(directory, replace(facts, files=files), server.base, server.base.to_json())
    store = CountingStore(open_store(server.url, endpoint_url=server.s3.endpoint_url))
    Publication(store, parsed, content, (server.signers[parsed.tenant],), utc_now()).run(
        version=None, progress=None
    )


def test_an_unknown_adapter_is_not_found(client: Client) -> None:
    with pytest.raises(AdapterNotFoundError) as caught:
        generate(client, "acme/nothing")
    assert caught.value.code == "ADAPTER_NOT_FOUND"


def test_an_adapter_signed_with_another_tenants_key_is_refused(server: Stage, client: Client) -> None:
    server.publish("acme/forged", seed=2, signer="globex")
    assert refusal(client, "acme/forged") == "SIGNATURE_INVALID"


def test_another_tenants_adapter_copied_under_a_tenants_name_is_refused(
    server: Stage, client: Client
) -> None:
    server.publish("globex/original", seed=3)
    for key in server.keys_of("globex/original"):
        body = server.read(key)
        copied = key.replace("t/globex/a/original", "t/acme/a/stolen")
        server.write(copied, body.replace(b"t/globex/a/original", b"t/acme/a/stolen"))
    assert refusal(client, "acme/stolen") in {"SIGNATURE_INVALID", "POLICY_REFUSED"}


def test_one_flipped_byte_in_the_weights_is_refused(server: Stage, client: Client) -> None:
    server.publish("acme/flipped", seed=4)
    key = next(key for key in server.keys_of("acme/flipped") if "/b/" in key)
    body = bytearray(server.read(key))
    body[len(body) // 2] ^= 1
    server.write(key, bytes(body))
    assert refusal(client, "acme/flipped") == "DIGEST_MISMATCH"


def test_one_flipped_byte_in_each_small_file_of_the_record_is_refused(server: Stage, client: Client) -> None:
    server.publish("acme/record", seed=5)
    key = next(key for key in server.keys_of("acme/record") if "/v/" in key)
    record = server.read(key)
    document = json.loads(record)
    inlined = [file["inline"] for file in document["storage"]["files"] if "inline" in file]
    assert len(inlined) >= 2, "adapter_config.json and the base card"
    for text in [*inlined, document["manifest"]]:
        content = bytearray(base64.b64decode(text))
        content[len(content) // 2] ^= 1
        changed = record.replace(text.encode(), base64.b64encode(bytes(content)))
        assert changed != record
        server.write(key, changed)
        assert refusal(client, "acme/record") in {"DIGEST_MISMATCH", "SIGNATURE_INVALID"}
    server.write(key, record)
    assert generate(client, "acme/record").header.adapter_digest


def test_a_blob_cut_short_in_the_store_is_refused(server: Stage, client: Client) -> None:
    server.publish("acme/short", seed=6)
    key = next(key for key in server.keys_of("acme/short") if "/b/" in key)
    server.write(key, server.read(key)[:-100])
    assert refusal(client, "acme/short") == "DIGEST_MISMATCH"


def test_signed_but_truncated_safetensors_are_refused_by_push_and_by_the_server(
    server: Stage, client: Client, tmp_path: Path
) -> None:
    directory = write_adapter(server.base, tmp_path / "cut", seed=7)
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(UnsupportedAdapterError):
        validate_adapter(directory, server.base)
    publish_unchecked(server, directory, "acme/cut")
    assert refusal(client, "acme/cut") == "UNSUPPORTED_ADAPTER"


def test_a_rank_above_the_servers_limit_is_refused(server: Stage, client: Client) -> None:
    server.publish("acme/wide", seed=8, rank=2 * RANK_MAX)
    assert refusal(client, "acme/wide") == "RANK_TOO_LARGE"


def test_shapes_that_do_not_fit_the_base_are_refused_by_push_and_by_the_server(
    server: Stage, client: Client, tmp_path: Path
) -> None:
    layers = {name: (width_in + 32, width_out) for name, (width_in, width_out) in server.base.layers.items()}
    wider = replace(server.base, layers=layers)
    directory = write_adapter(wider, tmp_path / "wider", seed=10)
    with pytest.raises(BaseMismatchError):
        validate_adapter(directory, server.base)
    publish_unchecked(server, directory, "acme/wider")
    assert refusal(client, "acme/wider") == "BASE_MISMATCH"


def test_an_adapter_of_another_base_is_refused(server: Stage, client: Client, tmp_path: Path) -> None:
    other = replace(server.base, digest="sha256:" + "1" * 64)
    directory = write_adapter(server.base, tmp_path / "other", seed=11)
    server.registry.publish(directory, AdapterRef("acme", "other"), server.signers["acme"], other)
    assert refusal(client, "acme/other") == "BASE_MISMATCH"


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pkl"])
def test_pickle_files_are_refused_by_push_and_by_the_server(
    server: Stage, client: Client, tmp_path: Path, name: str
) -> None:
    directory = write_adapter(server.base, tmp_path / "pickled", seed=12)
    (directory / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UnsupportedAdapterError, match=name):
        validate_adapter(directory, server.base)
    ref = f"acme/pickled-{name.rpartition('.')[2]}"
    publish_unchecked(server, directory, ref)
    assert refusal(client, ref) in {"UNSUPPORTED_ADAPTER", "SIGNATURE_INVALID", "DIGEST_MISMATCH"}


def test_nan_weights_are_refused(server: Stage, client: Client, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    directory = write_adapter(server.base, tmp_path / "nan", seed=13)
    tensors = load_file(directory / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, directory / "adapter_model.safetensors")
    publish_unchecked(server, directory, "acme/nan")
    assert refusal(client, "acme/nan") == "UNSUPPORTED_ADAPTER"


def test_a_prompt_longer_than_the_context_is_refused(client: Client) -> None:
    with pytest.raises(ContextTooLongError) as caught:
        client.generate(TokenIds((5,) * 128), adapter="acme/good")
    assert caught.value.code == "CONTEXT_TOO_LONG"
    assert caught.value.metadata["context_tokens"] == "128"


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(max_tokens=0), "sampling.max_tokens"),
        (Sampling(temperature=float("nan")), "sampling.temperature"),
    ],
)
def test_a_bad_sampling_parameter_is_named(client: Client, sampling: Sampling, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(PROMPT, adapter="acme/good", sampling=sampling)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert [name for name, _ in caught.value.fields] == [field]


def test_an_unknown_setting_refuses_to_start_and_names_the_nearest(stage: Stage, tmp_path: Path) -> None:
    settings = write_settings(stage, tmp_path / "server.toml", adapters__slot="3")
    ended = subprocess.run(
        [sys.executable, "-m", "loraplex_server", "--config", str(settings)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "adapters.slot" in ended.stderr
    assert "'slots'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_server_started_without_its_store_says_so_and_serves_once_it_is_back(
    server: Stage, client: Client
) -> None:
    assert server.down_at_start == "STORE_UNAVAILABLE"
    assert generate(client, "acme/good").usage.completion_tokens == 16


def test_a_store_that_goes_away_during_a_fetch_is_named_and_the_next_call_works(
    server: Stage, client: Client
) -> None:
    server.publish("acme/late", seed=14)
    size = max(len(server.read(key)) for key in server.keys_of("acme/late"))
    assert size > 100_000, "the cut must fall into the weights, after the record"
    server.toxics.cut_after(size // 2)
    try:
        with pytest.raises(UnavailableError) as caught:
            generate(client, "acme/late")
        assert caught.value.code == "STORE_UNAVAILABLE"
        assert generate(client, "").usage.completion_tokens == 16
    finally:
        server.toxics.heal()
    assert generate(client, "acme/late").usage.completion_tokens == 16


def test_residents_go_on_serving_while_the_store_is_down(server: Stage, client: Client) -> None:
    generate(client, "acme/good")
    server.toxics.down()
    try:
        assert generate(client, "acme/good").usage.completion_tokens == 16
        with pytest.raises(LoraplexError) as caught:
            generate(client, "acme/never-seen")
        assert caught.value.code == "STORE_UNAVAILABLE"
    finally:
        server.toxics.heal()


def test_a_load_that_vllm_itself_refuses_harms_nobody_and_the_next_one_works(
    server: Stage, client: Client
) -> None:
    published = server.publish("acme/spoilt", seed=15)
    alone, good = served_afterwards(client, "acme/spoilt"), generate(client, "acme/good")
    for harm in (
        "weights gone",
        "modules nobody knows",
        "shapes beyond the slot's",
    ):  # all: tests/reliability
        said = refused_by_the_engine(client, server.pid, server.cache, "acme/spoilt", published.digest, harm)
        assert said.startswith("UNSUPPORTED_ADAPTER: "), harm
        assert "the engine refused these weights" in said, harm
        assert generate(client, "acme/good").token_ids == good.token_ids, harm
        assert served_afterwards(client, "acme/spoilt").token_ids == alone.token_ids, harm
