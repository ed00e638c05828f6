"""Turns at the engine: what is held, who waits, and that a call that leaves takes nothing along."""

import asyncio
import random
import secrets
from collections import Counter

import pytest

from loraplex_server.errors import QueueFullError, TenantQuotaError
from loraplex_server.scheduling.fair_queue import FairQueue
from loraplex_server.scheduling.quotas import Quota, Quotas
from loraplex_server.scheduling.scheduler import Scheduler
from tests.server.rig import until


class Events:
    """Remembers the turns."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    def turn_given(self, tenant: str, waited_s: float) -> None:
        assert waited_s >= 0
        self.turns.append(tenant)


def make(places: int = 2, held_max: int = 1000, quota: Quota | None = None) -> tuple[Scheduler, Events]:
    clock, events = asyncio.get_running_loop().time, Events()
    made = Scheduler(
        places=places,
        requests_max=held_max,
        queue=FairQueue(),
        quotas=Quotas(lambda _tenant: quota or Quota(), clock=clock),
        events=events,
        resident=frozenset,
        clock=clock,
    )
    return made, events


async def test_one_tenant_cannot_hold_every_place_and_a_failing_call_gives_its_own_back() -> None:
    made, _ = make(held_max=3, quota=Quota(requests_max=2))
    with made.hold("acme"), made.hold("acme"):
        with pytest.raises(TenantQuotaError, match="acme"), made.hold("acme"):
            pass
        with made.hold("globex"):
            with pytest.raises(QueueFullError), made.hold("initech"):
                pass
            assert made.held == 3
    with pytest.raises(ValueError, match="x"), made.hold("acme"):
        raise ValueError("x")
    assert made.held == 0


async def test_no_more_than_the_places_have_a_turn_and_a_free_place_is_given_on_at_once() -> None:
    made, events = make(places=2)
    inside, may_end = Counter[str](), asyncio.Event()

    async def call(tenant: str) -> None:
        async with made.turn(tenant, adapter="", prompt_tokens=1) as turn:
            inside[tenant] += 1
            await may_end.wait()
            turn.generated(3)

    flood = [asyncio.create_task(call("flood")) for _ in range(20)]
    await until(lambda: made.running == 2)
    polite = asyncio.create_task(call("polite"))
    await until(lambda: made.waiting == 19)
    assert inside == {"flood": 2}
    assert made.fairness_gap >= 0
    may_end.set()
    await asyncio.gather(*flood, polite)
    assert "polite" in events.turns[2:5]
    assert (made.running, made.waiting) == (0, 0)


async def test_calls_that_are_cancelled_anywhere_leave_nothing_behind() -> None:
    """1,000 calls, half of them cancelled at any moment, the moment of their turn included."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    made, _ = make(places=3)
    most = 0

    async def call(tenant: str) -> None:
        nonlocal most
        with made.hold(tenant):
            async with made.turn(tenant, adapter=rng.choice(["", "x"]), prompt_tokens=5) as turn:
                most = max(most, made.running)
                for _ in range(rng.randint(0, 4)):
                    await asyncio.sleep(0)
                    turn.generated(1)

    for _ in range(50):
        calls = [asyncio.create_task(call(rng.choice("abcd"))) for _ in range(20)]
        for _ in range(rng.randint(0, 30)):
            await asyncio.sleep(0)
            if rng.random() < 0.5:
                rng.choice(calls).cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert (made.held, made.running, made.waiting) == (0, 0, 0)
        assert not made._given
    assert most <= 3


async def test_a_call_whose_deadline_passes_in_the_queue_leaves_it() -> None:
    made, events = make(places=1)
    async with made.turn("a", adapter="", prompt_tokens=1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), made.turn("b", adapter="", prompt_tokens=1):
                pass
        assert made.waiting == 0
    async with made.turn("b", adapter="", prompt_tokens=1):
        assert events.turns == ["a", "b"]


async def test_prompt_and_answer_count_towards_the_tokens_of_a_tenant() -> None:
    made, _ = make(quota=Quota(tokens_per_minute=600, burst_s=1))
    with made.hold("a"):
        async with made.turn("a", adapter="", prompt_tokens=8) as turn:
            turn.generated(7)
    with pytest.raises(TenantQuotaError, match="600 tokens per minute"), made.hold("a"):
        pass
    with made.hold("b"):
        pass
