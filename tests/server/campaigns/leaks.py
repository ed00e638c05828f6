"""Many requests and many loads: does the process hold more afterwards than before?"""

import asyncio
import gc
import os
import re
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_client import AsyncClient, TokenIds
from tests.server.conftest import Shop
from tests.server.rig import FOUR, Rig, running, until

ADAPTERS = 12  # for two slots: asked for in turn, each is brought in every time
CALLERS = 16


@dataclass
class Leaks:
    """What grew between two moments without calls; `rss_ratio` is later over earlier."""

    requests: int
    loads: int
    descriptors: int
    tasks: int
    threads: int
    rss_ratio: float
    sealed_files: int


async def leaks(shop: Shop, *, requests: int, loads: int) -> Leaks:
    """Warm up with a tenth of it, look, do it all, look again."""
    for number in range(ADAPTERS):
        shop.publish(f"acme/a{number}", seed=number)
    async with running(shop, registry_section={"tag_ttl_s": 60}) as rig, rig.client() as client:
        any_engine: Any = rig.engine
        any_engine.requests = deque(
            maxlen=1
        )  # the simulated engine remembers everything, which is not the question
        await _work(rig, client, requests=requests // 10, loads=max(loads // 10, ADAPTERS))
        before, loads_before = _holdings(), len(rig.engine.slot_ids_seen)
        await _work(rig, client, requests=requests, loads=loads)
        after, loads_after = _holdings(), len(rig.engine.slot_ids_seen)
    return Leaks(
        requests=requests,
        loads=loads_after - loads_before,
        descriptors=after["descriptors"] - before["descriptors"],
        tasks=after["tasks"] - before["tasks"],
        threads=after["threads"] - before["threads"],
        rss_ratio=after["rss"] / before["rss"],
        sealed_files=after["sealed"] - before["sealed"],
    )


async def _work(rig: Rig, client: AsyncClient, *, requests: int, loads: int) -> None:
    left = iter(range(requests))

    async def caller() -> None:
        for number in left:
            await client.generate(TokenIds((number % 1000,)), sampling=FOUR)

    async def loader() -> None:
        for number in range(loads):
            await client.generate(TokenIds((1,)), adapter=f"acme/a{number % ADAPTERS}", sampling=FOUR)

    await asyncio.gather(loader(), *(caller() for _ in range(CALLERS)))
    await until(lambda: not rig.engine.running and not rig.app._gate.backend.scheduler.held)
    await asyncio.sleep(0.2)  # threads and tasks that were just told to end


def _holdings() -> dict[str, int]:
    gc.collect()
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    rss = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert rss is not None
    return {
        "descriptors": len(links),
        "sealed": sum("memfd:" in link for link in links),
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "rss": int(rss[1]),
    }
