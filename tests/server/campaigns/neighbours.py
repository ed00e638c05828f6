"""A polite tenant beside a greedy one."""

import asyncio
import statistics
import time
from dataclasses import dataclass

from loraplex_client import AsyncClient, Sampling
from loraplex_server.identity.api_keys import make_key
from tests.server.conftest import Shop
from tests.server.rig import running, until


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
