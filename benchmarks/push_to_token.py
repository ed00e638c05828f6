"""How long after the start of `registry push` the new version answers: a case of `benchmarks.frontend`.

The base has the shape of Qwen2.5-0.5B, on which rank 16 on all linear layers is an adapter of 16.8 MiB. The command
is a cold process that signs, uploads and moves the tag `prod`; the server reads the tag again every `TAG_TTL_S` and
has an older version of the adapter resident. A caller asks for the tag's digest every `POLL_S` and generates as soon
as it is another one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.frontend_servers import (
    ENVIRONMENT,
    EngineSettings,
    ensure_servable,
    our_server,
    write_settings,
)
from benchmarks.models import SHAPES, ensure_adapters
from benchmarks.registry_world import BUCKET, World, command_seconds, served, world
from benchmarks.report import Measurement, summarize
from loraplex_client import Client, Sampling, TokenIds
from loraplex_registry.validation.base import BaseModel

RANK = 16
TAG_TTL_S = 0.05
POLL_S = 0.01
ROUND_S_MAX = 60.0
REGISTRY = Path(sys.executable).with_name("registry")
ENGINE = EngineSettings(context_tokens=512, batch_requests=16)
ONE = Sampling(max_tokens=1, temperature=0, ignore_eos=True)
PROMPT = TokenIds(tuple(range(10, 26)))


@dataclass(frozen=True)
class Times:
    """Seconds of one round: start of the command to its end, and to the first token of what it pushed."""

    pushed_s: float
    token_s: float


def push_to_token(models: Path, rounds: int) -> list[Measurement]:
    """Push so many versions, one after the other."""
    shape = SHAPES["0.5b"]
    base_dir = ensure_servable(shape, models)
    base = BaseModel.from_directory(base_dir, name="tiny")
    adapters = ensure_adapters(shape, models, count=rounds + 2, rank=RANK)
    for path in adapters:
        (path / "base_model.json").write_bytes(base.to_json())
    with world() as place, served(place), tempfile.TemporaryDirectory(prefix="loraplex-bench-") as directory:
        command_seconds([REGISTRY, "doctor"], place)  # a bucket is probed once before the first write
        _push(place, adapters[0])
        settings, key = write_settings(Path(directory), base_dir, ENGINE, more=_registry(place))
        with (
            our_server(
                Path(directory), settings, key, environment={**ENVIRONMENT, **place.environment}
            ) as server,
            Client(f"127.0.0.1:{server.port}", api_key=key, timeout_s=ROUND_S_MAX) as client,
        ):
            client.generate(PROMPT, adapter="acme/orders@prod", sampling=ONE)
            times = [_round(place, client, path) for path in adapters[1:]][1:]  # the first warms up
    size = (adapters[0] / "adapter_model.safetensors").stat().st_size / 2**20
    return [
        summarize("push_to_first_token_s", [one.token_s for one in times], "s", 1.0),
        summarize("push_command_s", [one.pushed_s for one in times], "s"),
        summarize("push_end_to_first_token_s", [one.token_s - one.pushed_s for one in times], "s"),
        Measurement("push_adapter_mib", round(size, 1), "MiB", None, 1, None),
    ]


def _registry(place: World) -> str:
    return f"""
[registry]
url = "s3://{BUCKET}/pushed"
endpoint_url = "{place.endpoint}"
policy = "{place.disk}/policy.toml"
state_dir = "{place.disk}/state"
tag_ttl_s = {TAG_TTL_S}
"""


def _push(place: World, path: Path) -> float:
    """Push and move the tag, in a process of its own; returns its seconds."""
    return command_seconds([REGISTRY, "push", path, "acme/orders", "--tag", "prod"], place)


def _round(place: World, client: Client, path: Path) -> Times:
    before = client.get_adapter("acme/orders@prod").digest
    with ThreadPoolExecutor(1) as pool:
        started = time.perf_counter()
        pushing = pool.submit(_push, place, path)
        while (digest := client.get_adapter("acme/orders@prod").digest) == before:
            if time.perf_counter() - started > ROUND_S_MAX:
                raise RuntimeError(f"{path} was pushed in {pushing.result()} s, but the tag did not move")
            if pushing.done():
                pushing.result()  # raises what went wrong
            time.sleep(POLL_S)
        stream = client.stream(PROMPT, adapter="acme/orders@prod", sampling=ONE)
        next(iter(stream))
        token_s = time.perf_counter() - started
        assert stream.header is not None
        assert stream.header.adapter_digest == digest
        return Times(pushing.result(), token_s)
