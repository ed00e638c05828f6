"""Real server processes ended under load, by SIGTERM and by SIGKILL.

Callers keep streams going over more adapters than slots, so that the end also falls into fetching and loading.
"""

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_client import AsyncClient, LoraplexError, Sampling, TokenIds
from tests.server.conftest import Shop
from tests.server.process import ServerProcess, serving, write_settings
from tests.sim.engine import answer

CALLERS = 24
ADAPTERS = 4
STEP_S = 0.005
TEN = Sampling(max_tokens=10, temperature=0)
_GENERATE_ENDED = re.compile(r"method=/loraplex\.v1\.GenerationService/Generate .*? reason=(\w+)")


@dataclass
class Drill:
    """What the callers and the servers saw over all cycles.

    Attributes:
        completed: calls whose every token came, right; `wrong` if not the right ones.
        broken: calls that had begun to answer and ended in an error.
        refused: calls that ended in an error before anything came, by kind.
        served: what the servers' access logs say of Generate calls, by reason.
        error_s: for SIGKILL, seconds from the signal to each caller's error.
        end_s: seconds from the signal to the end of the process.
        right_after: for SIGKILL, adapters that a server started after the last cycle serves right.
        left_on_disk: downloads that the last of the ended servers left half-done and that are still there then.
    """

    cycles: int = 0
    completed: int = 0
    wrong: int = 0
    broken: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    error_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    right_after: int = 0
    left_on_disk: int = 0


async def drill(shop: Shop, number: signal.Signals, *, cycles: int, seed: int) -> Drill:
    """Start a server, load it, end it at a random moment; so many times, on one cache and one state directory."""
    rng, found = random.Random(seed), Drill()
    for index in range(ADAPTERS):
        shop.publish(f"acme/a{index}", seed=index)
    settings = write_settings(
        shop,
        adapters={"cache_bytes_max": 0},
        model={"batch_requests": 8},
        server={"drain_s": 20},
    )
    for _ in range(cycles):
        found.cycles += 1
        await _cycle(settings, number, found, rng)
    if number is signal.SIGKILL:
        await _look_afterwards(shop.root / "cache", settings, found)
    return found


async def _look_afterwards(cache: Path, settings: Path, found: Drill) -> None:
    """Start once more: what did the kills leave?"""
    unfinished = {name for name in os.listdir(cache) if name.startswith(".tmp-")}
    with serving(settings) as server:
        found.right_after = await _right_answers(server)
        found.left_on_disk = len(unfinished.intersection(os.listdir(cache)))


async def _cycle(settings: Path, number: signal.Signals, found: Drill, rng: random.Random) -> None:
    with serving(settings, step_s=STEP_S) as server:
        async with AsyncClient(server.target, timeout_s=30) as client:
            ended = asyncio.Event()
            callers = [
                asyncio.create_task(_caller(client, found, random.Random(rng.random()), ended))
                for _ in range(CALLERS)
            ]
            await asyncio.sleep(rng.uniform(0.05, 0.6))
            server.signal(number)
            sent = time.perf_counter()
            ended.set()
            times = await asyncio.gather(*callers)
            found.exits[await asyncio.to_thread(server.exit_status)] += 1
            found.end_s.append(time.perf_counter() - sent)
            if number is signal.SIGKILL:
                found.error_s += [moment - sent for moment in times]
        found.served.update(_GENERATE_ENDED.findall(server.log.read_text()))


async def _caller(client: AsyncClient, found: Drill, rng: random.Random, ended: asyncio.Event) -> float:
    """Call until a call fails after the signal; gives the moment of the last error."""
    while True:
        prompt = (rng.randrange(1000), rng.randrange(1000))
        stream = client.stream(
            TokenIds(prompt), adapter=f"acme/a{rng.randrange(ADAPTERS)}", sampling=TEN, timeout_s=30
        )
        try:
            async for _ in stream:
                pass
            done = stream.completion
            found.completed += 1
            wanted = tuple(answer(done.header.adapter, prompt, position) for position in range(10))
            found.wrong += done.token_ids != wanted
        except LoraplexError as error:
            if stream.header is not None:
                found.broken += 1
            else:
                found.refused[type(error).__name__] += 1
            if ended.is_set():
                return time.perf_counter()


async def _right_answers(server: ServerProcess) -> int:
    """How many of the published adapters answer as they should."""
    right = 0
    async with AsyncClient(server.target, timeout_s=30) as client:
        for index in range(ADAPTERS):
            done = await client.generate(TokenIds((1, 2)), adapter=f"acme/a{index}", sampling=TEN)
            right += done.token_ids == tuple(answer(done.header.adapter, (1, 2), at) for at in range(10))
    return right
