"""Campaigns against a running server with the deterministic engine: short in `make test`, long in `make reliability`.

Every function returns what it counted; the callers judge.
"""

import asyncio
import gc
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc

from loraplex_client import AsyncClient, LoraplexError, Sampling, TokenIds
from loraplex_protos.v1 import adapters_pb2, generation_pb2
from loraplex_registry.refs import AdapterRef
from loraplex_server.identity.api_keys import make_key
from loraplex_server.identity.principals import RIGHTS
from tests.registry.builders import make_adapter
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running, until
from tests.sim.engine import answer

POLICY_OF_ONE = """
[[rules]]
scope = "{tenant}/**"
keys = [{{ path = "acme.pub" }}]
"""


@dataclass
class Crossing:
    """What `crossing` saw: replies, those with another adapter's tokens, errors by reason, evictions."""

    replies: int = 0
    crossed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    loads: int = 0


def many_tenants(shop: Shop, count: int) -> list[str]:
    """Publish one adapter for each of so many tenants; returns their names."""
    names = [f"t{number:03}" for number in range(count)]
    shop.policy.write_text(
        'version = 1\ndefault = "deny"\n' + "".join(POLICY_OF_ONE.format(tenant=name) for name in names)
    )
    for number, name in enumerate(names):
        directory = make_adapter(shop.root / f"a-{name}", rank=4, seed=number)
        shop.registry.publish(directory, AdapterRef(name, "mine"), shop.signers["acme"], shop.base)
    return names


async def crossing(shop: Shop, *, tenants: int, replies: int, seed: int) -> Crossing:
    """Many tenants share few slots: every reply must be the asked adapter's own."""
    rng, found = random.Random(seed), Crossing()
    names = many_tenants(shop, tenants)
    async with running(shop, adapters={"slots": 4}, limits={"tenant_requests_max": 10_000}) as rig:
        left = iter(range(replies))

        async def caller(client: AsyncClient) -> None:
            for _ in left:
                name, prompt = rng.choice(names), (rng.randrange(1000), rng.randrange(1000))
                try:
                    done = await client.generate(
                        TokenIds(prompt), adapter=f"{name}/mine", sampling=FOUR, timeout_s=60
                    )
                except LoraplexError as error:
                    found.errors[error.code or type(error).__name__] += 1
                    continue
                found.replies += 1
                wanted = tuple(answer(done.header.adapter, prompt, position) for position in range(4))
                right = done.header.adapter.startswith(f"{name}/mine@") and done.token_ids == wanted
                found.crossed += not right

        async with rig.client() as client:
            await asyncio.gather(*(caller(client) for _ in range(32)))
        found.loads = len(rig.engine.slot_ids_seen)
        await rig.app.residency.check()
    return found


@dataclass
class Endings:
    """What `endings` saw: calls, their outcomes, and what was left behind when all had ended."""

    calls: int = 0
    outcomes: dict[str, float] = field(default_factory=dict)
    left_behind: dict[str, int] = field(default_factory=dict)
    descriptors_grown: int = 0


async def endings(shop: Shop, *, calls: int, seed: int) -> Endings:
    """Calls that complete, expire, are cancelled or refused at random moments leave nothing behind."""
    rng, found = random.Random(seed), Endings(calls=calls)
    for number in range(6):
        shop.publish(f"acme/a{number}", seed=number)
    async with (
        running(shop, adapters={"slots": 2}, model={"batch_requests": 4}) as rig,
        rig.client() as client,
    ):
        rig.engine.step_s = 0.001
        await client.generate("x", adapter="acme/a0", sampling=FOUR)
        before = rig.outcomes()
        descriptors = len(os.listdir("/proc/self/fd"))

        async def one() -> None:
            adapter = rng.choice(["", "acme/a0", "acme/a1", "acme/a2", "acme/a3", "acme/absent"])
            stream = client.stream(
                "x",
                adapter=adapter,
                sampling=Sampling(max_tokens=rng.randint(1, 12)),
                timeout_s=rng.choice([30.0, 30.0, rng.uniform(0.01, 0.3)]),
            )
            give_up = rng.choice([None, rng.uniform(0.005, 0.3)])
            try:
                async with asyncio.timeout(give_up):
                    async for _ in stream:
                        if give_up is not None and rng.random() < 0.2:
                            stream.cancel()
            except (LoraplexError, TimeoutError, asyncio.CancelledError):
                stream.cancel()

        for _ in range(0, calls, 50):
            await asyncio.gather(*(one() for _ in range(min(50, calls))))
        scheduler = rig.app._gate.backend.scheduler
        await until(lambda: scheduler.held == 0 and rig.engine.running == 0)
        after = rig.outcomes()
        found.outcomes = {name: after[name] - before[name] for name in after}
        found.left_behind = {
            "held": scheduler.held,
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "in the engine": rig.engine.running,
            "leases": sum(status.active_requests for status in rig.app.residency.statuses()),
        }
        await rig.app.residency.check()
        gc.collect()
        found.descriptors_grown = len(os.listdir("/proc/self/fd")) - descriptors
    return found


async def hostile_messages(shop: Shop, *, count: int, seed: int) -> Counter[str]:
    """Send damaged, random and absurd messages to every method; returns how often each status came."""
    rng, statuses = random.Random(seed), Counter[str]()
    shop.publish("acme/orders")
    key, entry = make_key("app", "acme", admin=True)
    async with (
        running(shop, keys=entry) as rig,
        grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.port}") as channel,
    ):
        methods = {name: _described(name) for name in RIGHTS}
        calls = {
            name: (channel.unary_stream if kind.server_streaming else channel.unary_unary)(name)
            for name, kind in methods.items()
        }

        async def one() -> None:
            name = rng.choice(list(methods))
            metadata = [("authorization", f"Bearer {key}")] if rng.random() < 0.9 else []
            if rng.random() < 0.2:
                metadata.append((f"x-{rng.randrange(99)}-bin", rng.randbytes(rng.randrange(200))))
            try:
                answered = calls[name](_message(rng), metadata=tuple(metadata), timeout=5)
                if methods[name].server_streaming:
                    async for _ in answered:
                        pass
                else:
                    await answered
                statuses["OK"] += 1
            except grpc.RpcError as failed:
                statuses[failed.code().name] += 1  # type: ignore[attr-defined]

        for _ in range(0, count, 100):
            await asyncio.gather(*(one() for _ in range(min(100, count))))
        async with rig.client(key) as client:  # it serves as before
            await client.generate("x", adapter="acme/orders", sampling=FOUR)
    return statuses


def _described(method: str) -> Any:
    _, service, name = method.split("/")
    for file in (adapters_pb2.DESCRIPTOR, generation_pb2.DESCRIPTOR):
        found = file.services_by_name.get(service.rpartition(".")[2])
        if found is not None:
            return found.methods_by_name[name]
    raise KeyError(method)


def _message(rng: random.Random) -> bytes:
    """Random bytes, or a request with absurd values, whole or damaged."""
    if rng.random() < 0.3:
        return rng.randbytes(rng.randrange(300))
    request = generation_pb2.GenerateRequest(
        adapter=rng.choice(
            ["", "acme/orders", "acme/orders@prod", "../x", "a/b/c", "@", "acme/" + "x" * 5000, "ä/ö", "\x00"]
        ),
        request_id=rng.choice(["", "ok", "\n", "x" * 200]),
        priority=rng.choice([0, -(2**31), 2**31 - 1]),
    )
    form = rng.randrange(4)
    if form == 0:
        request.text = rng.choice(["", "x", "\U0001f600" * 50, "x" * 10_000])
    elif form == 1:
        request.token_ids.ids.extend(rng.choice([[], [0], [999], [2**32 - 1], [1] * 500]))
    elif form == 2:
        request.chat.messages.add(role=rng.choice(["user", "root", ""]), content=rng.choice(["", "x"]))
    sampling = request.sampling
    for field_name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"):
        if rng.random() < 0.3:
            setattr(sampling, field_name, rng.choice([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf")]))
    if rng.random() < 0.5:
        sampling.max_tokens = rng.choice([0, 1, 3, 2**32 - 1])
    sampling.stop.extend(rng.choice([[], ["x"], [""], ["y"] * 40]))
    body = bytearray(request.SerializeToString())
    for _ in range(rng.choice([0, 0, 1, 3])):
        if body:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return bytes(body[: rng.randrange(len(body) + 1)] if rng.random() < 0.1 else body)


@dataclass
class Neighbours:
    """99th percentile of a polite tenant's calls, in seconds: alone, and beside a tenant that floods."""

    alone_s: float
    beside_s: float
    flood_calls: int


async def neighbours(shop: Shop, *, calls: int, factor: int) -> Neighbours:
    """A polite tenant calls once at a time; another keeps `factor` calls going. Each may use 8 of 10 places."""
    polite_key, polite_entry = make_key("polite", "acme")
    flood_key, flood_entry = make_key("flood", "globex")
    limits = {"tenant_running_max": 8, "tenant_requests_max": 1000, "requests_max": 1000}
    async with (
        running(shop, keys=polite_entry + flood_entry, model={"batch_requests": 8}, limits=limits) as rig,
        rig.client(polite_key) as polite,
        rig.client(flood_key) as flood,
    ):
        rig.engine.step_s = 0.005
        alone = await _latencies(polite, calls)
        ending = False
        flooded = 0

        async def keep_calling() -> None:
            nonlocal flooded
            while not ending:
                await flood.generate("x", sampling=Sampling(max_tokens=40), timeout_s=60)
                flooded += 1

        floods = [asyncio.create_task(keep_calling()) for _ in range(factor)]
        await until(lambda: rig.engine.running >= 8)
        beside = await _latencies(polite, calls)
        ending = True
        await asyncio.gather(*floods)
    return Neighbours(_p99(alone), _p99(beside), flooded)


async def _latencies(client: AsyncClient, calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        await client.generate("x", sampling=Sampling(max_tokens=20))
        found.append(time.perf_counter() - started)
    return found


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]
