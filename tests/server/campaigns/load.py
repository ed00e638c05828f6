"""Load held and overload survived, by a real server process: what its callers see, and what its metrics page says.

The engine decodes `PLACES` streams at once and takes `STEP_S` a token, so its capacity is known.
"""

import asyncio
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

from loraplex_client import AsyncClient, LoraplexError, Sampling, TokenIds
from tests.server.conftest import Shop
from tests.server.process import ServerProcess, serving, write_settings

STEP_S = 0.01
BATCH = 8
PLACES = BATCH + 2  # a quarter more than are decoded together have their turn
QUEUE = 20
TEN = Sampling(max_tokens=10, temperature=0)
CAPACITY_PER_S = PLACES / (STEP_S * 10)


@dataclass
class Account:
    """Calls as one side saw them: sent and answered by callers; by outcome on the server's page."""

    sent: int = 0
    completed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, int] = field(default_factory=dict)
    in_flight: float = 0.0

    def closes(self) -> bool:
        """Whether every call that was sent has exactly one outcome, and the completed ones are the callers'."""
        return (
            sum(self.outcomes.values()) == self.sent
            and self.outcomes["completed"] == self.completed
            and self.in_flight == 0
        )

    def read(self, server: ServerProcess) -> None:
        """Take over what the metrics page says."""
        page = server.metrics()
        self.outcomes, self.in_flight = page.outcomes(), page.total("loraplex_requests_in_flight")


@dataclass
class Held(Account):
    """A load held for a while: the seconds it took, and the server's memory after a tenth of it and at its end."""

    seconds: float = 0.0
    rss_early: int = 0
    rss_late: int = 0


async def held_load(shop: Shop, *, streams: int, seconds: float) -> Held:
    """Keep so many streams going, over adapters and the base."""
    found = Held()
    for number in range(3):
        shop.publish(f"acme/a{number}", seed=number)
    settings = write_settings(
        shop,
        adapters={"slots": 4},
        model={"batch_requests": streams},
        limits={"tenant_requests_max": 1000},
        registry={"tag_ttl_s": 5},
    )
    with serving(settings) as server:
        async with AsyncClient(server.target, timeout_s=30) as client:
            started = time.monotonic()

            async def keep_calling(adapter: str) -> None:
                while time.monotonic() - started < seconds:
                    found.sent += 1
                    try:
                        await client.generate("x", adapter=adapter, sampling=Sampling(max_tokens=16))
                        found.completed += 1
                    except LoraplexError as error:
                        found.errors[error.code or type(error).__name__] += 1

            names = ["", "acme/a0", "acme/a1", "acme/a2"]
            calls = [asyncio.create_task(keep_calling(names[number % 4])) for number in range(streams)]
            await asyncio.sleep(seconds / 10)
            found.rss_early = server.rss_bytes()
            await asyncio.gather(*calls)
            found.seconds = time.monotonic() - started
            found.rss_late = server.rss_bytes()
        found.read(server)
    return found


@dataclass
class Overload(Account):
    """What an overload did. Rates are completed calls per second; times are seconds.

    Attributes:
        peak_per_s: with as many callers as the server has room for.
        overload_per_s: with `factor` times as many calls arriving as it can answer.
        refused_s: from a refused call to its refusal.
        without_delay: refusals that do not say when to come again.
        waiting_max: most calls that waited at the same time, by the page.
        before_s, after_s: calls one at a time before the overload and at once after it.
    """

    peak_per_s: float = 0.0
    overload_per_s: float = 0.0
    refused_s: list[float] = field(default_factory=list)
    without_delay: int = 0
    waiting_max: float = 0.0
    before_s: list[float] = field(default_factory=list)
    after_s: list[float] = field(default_factory=list)


async def overload(shop: Shop, *, seconds: float, factor: float, calls: int) -> Overload:
    """Measure the peak, offer `factor` times the capacity, and before and after it so many calls one at a time."""
    found = Overload()
    limits = {"requests_max": PLACES + QUEUE, "tenant_requests_max": PLACES + QUEUE}
    settings = write_settings(shop, model={"batch_requests": BATCH}, limits=limits)
    with serving(settings, step_s=STEP_S) as server:
        async with AsyncClient(server.target, timeout_s=30) as client:
            driver = _Driver(client, found)
            found.before_s = await driver.one_at_a_time(calls)
            found.peak_per_s = await driver.closed(callers=PLACES + QUEUE // 2, seconds=seconds)
            watching = asyncio.create_task(_watch_queue(server, found))
            found.overload_per_s = await driver.open(per_s=factor * CAPACITY_PER_S, seconds=seconds)
            watching.cancel()
            found.after_s = await driver.one_at_a_time(calls)
        found.read(server)
    return found


class _Driver:
    def __init__(self, client: AsyncClient, found: Overload) -> None:
        self._client, self._found = client, found

    async def one_at_a_time(self, calls: int) -> list[float]:
        return [await self._call() for _ in range(calls)]

    async def closed(self, *, callers: int, seconds: float) -> float:
        """Callers that call again as soon as they are answered."""
        started, before = time.monotonic(), self._found.completed

        async def keep_calling() -> None:
            while time.monotonic() - started < seconds:
                await self._call()

        await asyncio.gather(*(keep_calling() for _ in range(callers)))
        return (self._found.completed - before) / (time.monotonic() - started)

    async def open(self, *, per_s: float, seconds: float) -> float:
        """Calls that arrive whether or not earlier ones are answered."""
        started, before, calls = time.monotonic(), self._found.completed, []
        while (elapsed := time.monotonic() - started) < seconds:
            due = int(elapsed * per_s) - len(calls)
            calls += [asyncio.create_task(self._call()) for _ in range(due)]
            await asyncio.sleep(0.005)
        during = self._found.completed - before
        await asyncio.gather(*calls)
        return during / seconds

    async def _call(self) -> float:
        started = time.monotonic()
        self._found.sent += 1
        try:
            await self._client.generate(TokenIds((1,)), sampling=TEN)
            self._found.completed += 1
        except LoraplexError as error:
            self._found.errors[error.code or type(error).__name__] += 1
            self._found.refused_s.append(time.monotonic() - started)
            self._found.without_delay += error.retry_after_s is None
        return time.monotonic() - started


async def _watch_queue(server: ServerProcess, found: Overload) -> None:
    while True:
        page = await asyncio.to_thread(server.metrics)
        found.waiting_max = max(found.waiting_max, page.total("loraplex_requests_waiting"))
        await asyncio.sleep(0.1)


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[98]
