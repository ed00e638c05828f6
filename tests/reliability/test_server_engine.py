"""The server on the real engine, one start for all: tenants that share few slots, and adapters meant to harm."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplex_client import AsyncClient, Client, LoraplexError, TokenIds
from loraplex_registry.refs import AdapterRef
from tests.e2e.conftest import (
    RANK_MAX,
    SIXTEEN,
    SLOTS,
    Served,
    Stage,
    base_dir,  # noqa: F401
    serving,
    stage,  # noqa: F401
    write_adapter,
    write_settings,
)
from tests.e2e.spoiling import HARMS, refused_by_the_engine, served_afterwards
from tests.e2e.test_bad_input import publish_unchecked
from tests.sim.stranger import in_own_process

pytestmark = pytest.mark.reliability
Figure = Callable[..., None]

TENANTS = 24  # for four slots
PROMPTS = (TokenIds((1, 20, 30, 40, 50)), TokenIds((1, 99, 98, 97)), TokenIds((1, 7)))
CALLERS = 16
RULE = '[[rules]]\nscope = "{name}/**"\nkeys = [{{ path = "acme.pub" }}]\n'
START_S = 20.0
ENGINE = "the engine refused these weights"


@dataclass
class Crowd:
    """A server on the real engine, and the tenants' adapters that it may load."""

    stage: Stage
    served: Served
    adapters: list[str]

    def client(self) -> AsyncClient:
        """A client of it."""
        return AsyncClient(f"127.0.0.1:{self.served.grpc_port}", timeout_s=120)


@pytest.fixture(scope="module")
def crowd(stage: Stage) -> Iterator[Crowd]:  # noqa: F811
    """Start it: every tenant has one adapter of its own, signed with one key."""
    names = [f"t{number:02}" for number in range(TENANTS)]
    policy = stage.root / "policy.toml"
    policy.write_text(policy.read_text() + "".join(RULE.format(name=name) for name in names))
    with serving(write_settings(stage, stage.root / "crowd.toml")) as served:
        for number, name in enumerate(names):
            directory = write_adapter(stage.base, stage.root / f"crowd-{name}", seed=1000 + number)
            stage.registry.publish(directory, AdapterRef(name, "mine"), stage.signers["acme"], stage.base)
        yield Crowd(stage, served, [f"{name}/mine" for name in names])


async def test_server_engine_replies_never_cross(crowd: Crowd, figure: Figure, seed: int) -> None:
    rng, replies, differing, crossed = random.Random(seed), 0, 0, 0
    cold = 0
    async with crowd.client() as client:
        alone = {
            (name, prompt): (await client.generate(prompt, adapter=name, sampling=SIXTEEN)).token_ids
            for prompt in PROMPTS
            for name in crowd.adapters
        }
        left = iter(range(1000))

        async def caller() -> None:
            nonlocal replies, differing, crossed, cold
            for _ in left:
                name, prompt = rng.choice(crowd.adapters), rng.choice(PROMPTS)
                done = await client.generate(prompt, adapter=name, sampling=SIXTEEN)
                replies += 1
                cold += not done.header.adapter_was_resident
                differing += done.token_ids != alone[name, prompt]
                crossed += any(
                    done.token_ids == alone[other, prompt] for other in crowd.adapters if other != name
                ) or not done.header.adapter.startswith(f"{name}@")

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    distinct = len(set(alone.values()))
    figure("answers alone, all different", distinct, f"= {len(alone)}", distinct == len(alone))
    figure(f"replies of {TENANTS} adapters over {SLOTS} slots", replies, "= 1000", replies == 1000)
    figure("of these, the adapter had to be brought in", cold, ">= 500", cold >= 500)
    figure("replies with another adapter's tokens", crossed, "= 0", crossed == 0)
    figure("replies other than alone, token for token", differing, "= 0", differing == 0)


async def tokens_alone(client: AsyncClient, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """What each adapter answers, one after the other."""
    return {
        name: (await client.generate(PROMPTS[0], adapter=name, sampling=SIXTEEN)).token_ids for name in names
    }


@dataclass
class Neighbours:
    """Calls of adapters that nothing is wrong with, and those of them that were harmed."""

    calls: int = 0
    harmed: int = 0

    def report(self, figure: Figure) -> None:
        """Tell the figures."""
        figure("neighbours' calls meanwhile", self.calls, ">= 20", self.calls >= 20)
        figure("of these, in error or with other tokens", self.harmed, "= 0", self.harmed == 0)


@asynccontextmanager
async def neighbours(client: AsyncClient, names: list[str]) -> AsyncIterator[Neighbours]:
    """Have these adapters called, two calls of each at a time, for the length of the block."""
    alone, found, ended = await tokens_alone(client, names), Neighbours(), asyncio.Event()

    async def call(name: str) -> None:
        while not ended.is_set():
            try:
                done = await client.generate(PROMPTS[0], adapter=name, sampling=SIXTEEN)
                found.harmed += done.token_ids != alone[name]
            except LoraplexError:
                found.harmed += 1
            found.calls += 1

    async with asyncio.TaskGroup() as calls:
        for name in names * 2:
            calls.create_task(call(name))
        try:
            yield found
        finally:
            ended.set()


def poison(stage: Stage, root: Path) -> dict[str, str]:  # noqa: F811
    """Publish adapters that must not be served; gives the reason each is to be refused with."""
    good = write_adapter(stage.base, root / "good", seed=1)
    weights = good / "adapter_model.safetensors"

    def changed(name: str) -> Path:
        return write_adapter(stage.base, root / name, seed=1) / "adapter_model.safetensors"

    tensors = load_file(weights)
    first = next(iter(tensors))
    nan = {**tensors, first: np.full_like(tensors[first], np.nan)}
    infinite = {**tensors, first: np.full_like(tensors[first], np.inf)}
    missing = {name: tensor for name, tensor in tensors.items() if name != first}
    wider = replace(stage.base, layers={name: (i + 32, o) for name, (i, o) in stage.base.layers.items()})
    save_file(nan, changed("nan"))
    save_file(infinite, changed("infinite"))
    save_file(missing, changed("halved"))
    write_adapter(wider, root / "wider", seed=1)
    (path := changed("cut")).write_bytes(path.read_bytes()[:-64])
    (path := changed("header")).write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    changed("unweighted").unlink()
    expected = {}
    for name, reason in (
        ("nan", "UNSUPPORTED_ADAPTER"),
        ("infinite", "UNSUPPORTED_ADAPTER"),
        ("halved", "UNSUPPORTED_ADAPTER"),
        ("wider", "BASE_MISMATCH"),
        ("cut", "UNSUPPORTED_ADAPTER"),
        ("header", "UNSUPPORTED_ADAPTER"),
        ("unweighted", "SIGNATURE_INVALID"),
    ):
        publish_unchecked(stage, root / name, f"acme/{name}")
        expected[f"acme/{name}"] = reason
    stage.publish("acme/wide", seed=2, rank=2 * RANK_MAX)
    expected["acme/wide"] = "RANK_TOO_LARGE"
    stage.publish("acme/gone", seed=4)
    stage.remove(_blob(stage, "acme/gone"))
    expected["acme/gone"] = "DIGEST_MISMATCH"
    stage.publish("acme/flipped", seed=3)
    key = _blob(stage, "acme/flipped")
    body = bytearray(stage.read(key))
    body[len(body) // 2] ^= 1
    stage.write(key, bytes(body))
    expected["acme/flipped"] = "DIGEST_MISMATCH"
    return expected


def _blob(stage: Stage, ref: str) -> str:  # noqa: F811
    return next(key for key in stage.keys_of(ref) if "/b/" in key)


async def test_server_engine_poison_harms_nobody_else(
    crowd: Crowd, figure: Figure, seed: int, tmp_path: Path
) -> None:
    rng, expected = random.Random(seed), poison(crowd.stage, tmp_path)
    reasons: Counter[str] = Counter()
    unexpected: Counter[str] = Counter()
    async with crowd.client() as client:
        async with neighbours(client, crowd.adapters[:2]) as beside:
            for _ in range(100):
                name = rng.choice(list(expected))
                try:
                    await client.generate(PROMPTS[1], adapter=name, sampling=SIXTEEN)
                    unexpected[f"{name} served"] += 1
                except LoraplexError as error:
                    reasons[error.code] += 1
                    if error.code != expected[name]:
                        unexpected[f"{name} {error.code}"] += 1
        healthy = await client.is_ready()
    print(dict(reasons), dict(unexpected))
    figure("poisoned adapters asked for", sum(reasons.values()), "= 100", sum(reasons.values()) == 100)
    figure("served, or refused with another reason", sum(unexpected.values()), "= 0", not unexpected)
    beside.report(figure)
    figure("server ready afterwards", int(healthy), "= 1", healthy)


async def test_server_engine_load_errors_of_vllm_harm_nobody_else(
    crowd: Crowd, figure: Figure, seed: int
) -> None:
    """What passed every check of ours and is changed under the engine's hands, in each way that vLLM refuses."""
    published = crowd.stage.publish("acme/spoilt", seed=5)
    harms = list(HARMS) * 3
    random.Random(seed).shuffle(harms)
    words, answers = Counter[str](), Counter[tuple[int, ...]]()
    with Client(f"127.0.0.1:{crowd.served.grpc_port}", timeout_s=120) as spoilt:
        async with crowd.client() as client:
            alone = await tokens_alone(client, crowd.adapters[:SLOTS])
            before = await asyncio.to_thread(served_afterwards, spoilt, "acme/spoilt")
            async with neighbours(client, crowd.adapters[:2]) as beside:
                for harm in harms:
                    args = (
                        spoilt,
                        crowd.served.process.pid,
                        crowd.stage.cache,
                        "acme/spoilt",
                        published.digest,
                        harm,
                    )
                    words[await asyncio.to_thread(refused_by_the_engine, *args)] += 1
                    answers[
                        (await asyncio.to_thread(served_afterwards, spoilt, "acme/spoilt")).token_ids
                    ] += 1
            same = sum(
                [tokens == alone[name] for name, tokens in (await tokens_alone(client, alone)).items()]
            )
    refused = sum(
        words[said] for said in words if said.startswith("UNSUPPORTED_ADAPTER: ") and ENGINE in said
    )
    right = answers[before.token_ids]
    figure(
        f"loads that vLLM refused, of {len(HARMS)} kinds", refused, f"= {len(harms)}", refused == len(harms)
    )
    figure("right answers of the same adapter next", right, f"= {len(harms)}", right == len(harms))
    beside.report(figure)
    figure("slots that answer as before afterwards", same, f"= {SLOTS}", same == SLOTS)


async def test_server_engine_talks_to_a_stranger(crowd: Crowd, figure: Figure) -> None:
    target = f"127.0.0.1:{crowd.served.grpc_port}"
    found = await asyncio.to_thread(in_own_process, target, crowd.adapters[0])
    figure(
        "turns of a client that knows reflection only",
        len(found["digests"]),
        "= 2",
        len(found["digests"]) == 2,
    )
    figure("modules of ours that it used", len(found["ours"]), "= 0", not found["ours"])
