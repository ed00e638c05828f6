"""Calls that end in every possible way at random moments: is each counted once, and what do they leave behind?"""

import asyncio
import gc
import os
import random
from dataclasses import dataclass, field

from loraplex_client import LoraplexError, Sampling
from tests.server.conftest import Shop
from tests.server.rig import running, until


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
        await client.pin_adapter("acme/a0")
        before = rig.outcomes()
        descriptors, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())

        async def one() -> None:
            adapter = rng.choice(["", "acme/a0", "acme/a1", "acme/a2", "acme/a3", "acme/absent"])
            stream = client.stream(
                "x",
                adapter=adapter,
                sampling=Sampling(max_tokens=rng.randint(1, 12)),
                timeout_s=rng.choice([30.0, rng.uniform(0.005, 0.1)]),
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
        await client.unpin_adapter("acme/a0")
        for number in range(6):
            await client.unload_adapter(f"acme/a{number}")
        after = rig.outcomes()
        found.outcomes = {name: after[name] - before[name] for name in after}
        found.left_behind = {
            "held": scheduler.held,
            "running": scheduler.running,
            "waiting": scheduler.waiting,
            "in the engine": rig.engine.running,
            "leases": sum(status.active_requests for status in rig.app.residency.statuses()),
            "pins": rig.app.residency.pins,
            "slots": rig.app.residency.slots_used + len(rig.engine.adapters),
            "tasks": await _more_than(tasks),
            "in flight by the page": int(rig.counts.get_sample_value("loraplex_requests_in_flight") or 0),
        }
        await rig.app.residency.check()
        gc.collect()
        found.descriptors_grown = len(os.listdir("/proc/self/fd")) - descriptors
    return found


async def _more_than(tasks: int) -> int:
    """How many more tasks there are than before, two seconds from now at most."""
    for _ in range(200):
        if len(asyncio.all_tasks()) <= tasks:
            return 0
        await asyncio.sleep(0.01)
    return len(asyncio.all_tasks()) - tasks
