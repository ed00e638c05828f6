"""Whose turn it is: the laws of the fair queue, in simulations of an engine that serves it."""

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraplex_server.scheduling.fair_queue import FairQueue, Ticket

PROMPT, OUTPUT, PLACES = 100, 60, 8


def ticket(tenant: str, adapter: str = "", *, at: float = 0.0, prompt: int = 10, **more: float) -> Ticket:
    return Ticket(tenant, adapter, prompt, at, **more)  # type: ignore[arg-type]


@dataclass
class Engine:
    """Serves a queue: `places` requests at once, one token each per step, adapters in slots by least recent use."""

    queue: FairQueue
    slots: int = 4
    places: int = PLACES
    now: float = 0.0
    running: dict[int, tuple[Ticket, int]] = field(default_factory=dict)
    resident: deque[str] = field(default_factory=deque)
    served: Counter[str] = field(default_factory=Counter)
    finished: list[Ticket] = field(default_factory=list)
    switches: int = 0

    def step(self, rng: random.Random) -> None:
        self.now += 0.1
        while len(self.running) < self.places:
            taken = self.queue.take(self.now, self.resident)
            if taken is None:
                break
            self.served[taken.tenant] += taken.prompt_tokens
            if taken.adapter and taken.adapter not in self.resident:
                self.switches += 1
                self.resident.append(taken.adapter)
                while len(self.resident) > self.slots:
                    self.resident.popleft()
            self.running[taken.number] = taken, rng.randint(1, OUTPUT)
        for number, (taken, left) in list(self.running.items()):
            self.served[taken.tenant] += 1
            self.queue.charge(taken, 1)
            if left == 1:
                del self.running[number]
                self.queue.done(taken)
                self.finished.append(taken)
            else:
                self.running[number] = taken, left - 1


@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=6),
    slack=st.sampled_from([0.0, 200.0]),
    adapters=st.integers(0, 12),
)
@settings(max_examples=60, deadline=None)
def test_backlogged_tenants_are_served_by_weight_within_the_proven_bound(
    seed: int, weights: list[float], slack: float, adapters: int
) -> None:
    """Some flood, some send little prompts, some long ones: none is served more, per weight, than the bound says."""
    rng = random.Random(seed)
    names = [f"t{number}" for number in range(len(weights))]
    switch = 30.0
    queue = FairQueue(
        weight_of=lambda name: weights[names.index(name)], slack_tokens=slack, switch_tokens=switch
    )
    engine = Engine(queue)
    longest = {name: rng.choice([5, 40, PROMPT]) for name in names}
    begun: Counter[str] = Counter()
    w = min(weights)
    bound = 2 * (slack + (PROMPT + switch + PLACES * OUTPUT) / w)
    for step in range(400):
        for name in names:
            while queue.waiting_of(name) < 3:  # always backlogged
                adapter = f"a{rng.randrange(adapters)}" if adapters else ""
                queue.submit(ticket(name, adapter, at=engine.now, prompt=rng.randint(1, longest[name])))
        engine.step(rng)
        if step in (0, 100):
            begun = engine.served.copy()  # any interval: from here
        shares = [
            (engine.served[name] - begun[name]) / weight for name, weight in zip(names, weights, strict=True)
        ]
        assert max(shares) - min(shares) <= bound, f"seed {seed}"


def test_a_tenant_that_asks_little_waits_for_one_turn_however_many_others_flood() -> None:
    queue = FairQueue()
    for number in range(5000):
        queue.submit(ticket("flood", at=number * 1e-6))
    for _ in range(50):
        queue.take(1.0)
    queue.submit(ticket("polite", at=1.0))
    assert "polite" in {taken.tenant for taken in (queue.take(1.0), queue.take(1.0)) if taken}


def test_idleness_is_not_saved_up_and_service_is_not_forgotten() -> None:
    queue = FairQueue()
    queue.submit(ticket("idle"))
    first = queue.take(0.0)
    assert first is not None
    queue.done(first)
    for _ in range(200):
        queue.submit(ticket("busy"))
    for _ in range(100):
        queue.take(0.0)
    for _ in range(50):
        queue.submit(ticket("idle"))
    turns = Counter(taken.tenant for taken in (queue.take(0.0) for _ in range(40)) if taken)
    assert abs(turns["idle"] - turns["busy"]) <= 2
    # A tenant that sends one after the other is idle in between, and is not lifted above those that wait.
    queue = FairQueue()
    for _ in range(100):
        queue.submit(ticket("waits", prompt=10))
    alone = 0
    for _ in range(60):
        queue.submit(ticket("one at a time", prompt=10))
        while True:
            taken = queue.take(0.0)
            assert taken is not None
            queue.done(taken)
            if taken.tenant != "waits":
                break
            alone += 1
    assert 40 <= alone <= 80


def test_resident_adapters_go_first_within_the_slack_and_cold_ones_after_their_patience() -> None:
    queue = FairQueue(patience_s=2.0, slack_tokens=1000)
    queue.submit(ticket("a", "cold", at=0.0))
    for number in range(10):
        queue.submit(ticket("b", "warm", at=0.0, prompt=number))
    found = queue.take(0.1, {"warm"})
    assert found is not None
    assert found.adapter == "warm"
    found = queue.take(2.0, {"warm"})
    assert found is not None
    assert found.adapter == "cold"
    queue = FairQueue(slack_tokens=5, switch_tokens=0)  # the slack is bounded: little service, no preference
    queue.submit(ticket("a", "cold", prompt=1))
    for _ in range(9):
        queue.submit(ticket("b", "warm", prompt=10))
    kinds = [taken.adapter for taken in (queue.take(0.1, {"warm"}) for _ in range(3)) if taken]
    assert kinds[:2] == ["warm", "cold"]


def test_no_request_is_starved_while_warm_ones_keep_coming() -> None:
    rng, queue = random.Random(1), FairQueue(patience_s=1.0, slack_tokens=1e9)
    engine = Engine(queue, slots=2)
    cold = ticket("a", "cold")
    queue.submit(cold)
    for _ in range(300):
        while queue.waiting_of("b") < 20:
            queue.submit(ticket("b", rng.choice(["x", "y"]), at=engine.now))
        engine.step(rng)
    assert cold in engine.finished


@pytest.mark.parametrize("factor", [0.5, 1, 2, 4, 8])
def test_working_sets_larger_than_the_slots_cost_fewer_switches_than_in_order(factor: float) -> None:
    """More adapters than slots: the queue brings in fewer of them than first come, first served would."""
    switches = []
    for slack in (0.0, 512.0):
        rng, queue = random.Random(7), FairQueue(slack_tokens=slack, patience_s=1000)
        engine = Engine(queue, slots=4)
        adapters = int(4 * factor)
        for _ in range(400):
            for tenant in range(6):
                while queue.waiting_of(f"t{tenant}") < 4:
                    queue.submit(ticket(f"t{tenant}", f"a{rng.randrange(adapters)}", at=engine.now))
            engine.step(rng)
        switches.append(engine.switches / len(engine.finished))
    assert switches[1] <= switches[0]
    if factor > 1:
        assert switches[1] < 0.8 * switches[0]


def test_priorities_order_a_tenants_own_requests_and_never_pass_another_tenant() -> None:
    queue = FairQueue()
    queue.submit(ticket("a", prompt=1))
    queue.submit(ticket("a", prompt=2, priority=9))
    queue.submit(ticket("b", prompt=3))
    order = [(taken.tenant, taken.prompt_tokens) for taken in (queue.take(0.0) for _ in range(3)) if taken]
    assert order == [("a", 2), ("b", 3), ("a", 1)]


class Machine(RuleBasedStateMachine):
    """Every ticket leaves by exactly one door, a request that may run is given, and nothing idle is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.queue = FairQueue(running_max_of=lambda tenant: 2 if tenant == "limited" else 99)
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []

    @rule(
        tenant=st.sampled_from(["a", "b", "limited"]),
        adapter=st.sampled_from(["", "x", "y"]),
        priority=st.integers(-2, 2),
    )
    def submit(self, tenant: str, adapter: str, priority: int) -> None:
        made = ticket(tenant, adapter, at=self.now, priority=priority)
        self.queue.submit(made)
        self.waiting.append(made)

    @rule(resident=st.sets(st.sampled_from(["x", "y"])))
    def take(self, resident: set[str]) -> None:
        taken = self.queue.take(self.now, resident)
        limited = sum(each.tenant == "limited" for each in self.running)
        may_run = [each for each in self.waiting if each.tenant != "limited" or limited < 2]
        assert (taken is None) == (not may_run)
        if taken is not None:
            self.waiting.remove(taken)
            self.running.append(taken)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.running:
            done = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.queue.charge(done, 5)
            self.queue.done(done)

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        if self.waiting:
            gone = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
            assert self.queue.withdraw(gone)
            assert not self.queue.withdraw(gone)

    @rule(seconds=st.floats(0.0, 2.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.queue) == len(self.waiting)
        for tenant in ("a", "b", "limited"):
            assert self.queue.waiting_of(tenant) == sum(each.tenant == tenant for each in self.waiting)
        assert set(self.queue.counters()) == {each.tenant for each in self.waiting + self.running}


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
