"""Residency under every order of calls, cancellations, faults and deaths that hypothesis thinks of."""

import asyncio
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from loraplex_registry.errors import DigestMismatchError, RevokedError, UnsupportedAdapterError
from loraplex_server.errors import AdapterNotReadyError, EngineUnavailableError
from tests.server.adapters.residency_rig import SIZE, make_rig, version

NAMES = st.sampled_from("abcdef")
EXPECTED = (
    AdapterNotReadyError,
    DigestMismatchError,
    EngineUnavailableError,
    RevokedError,
    UnsupportedAdapterError,
)


class Machine(RuleBasedStateMachine):
    """Law: books, engine and held bytes agree, and within their bounds, at every step and at the end."""

    @initialize(slots=st.integers(2, 3), staged=st.integers(0, 3), keeps_bytes=st.booleans())
    def begin(self, slots: int, staged: int, keeps_bytes: bool) -> None:
        self.keeps_bytes = keeps_bytes
        self.loop = asyncio.new_event_loop()
        self.root = Path(tempfile.mkdtemp())
        self.slots, self.staged_max = slots, staged
        self.calls: dict[str, list[tuple[asyncio.Task[None], asyncio.Event]]] = {}
        self.others: list[asyncio.Task[object]] = []
        self.restart: asyncio.Task[object] | None = None
        self.run(self._make())

    async def _make(self) -> None:
        self.rig = make_rig(
            self.root,
            slots=self.slots,
            staged_max=self.staged_max,
            load_timeout_s=30,
            keeps_bytes=self.keeps_bytes,
        )

    def run(self, work: object, *, steps: int = 0) -> None:
        """Run a coroutine to its end, or the loop for some steps."""
        if asyncio.iscoroutine(work):
            self.loop.run_until_complete(work)
        for _ in range(steps):
            self.loop.run_until_complete(asyncio.sleep(0))

    async def _call(self, name: str, release: asyncio.Event) -> None:
        async with self.rig.residency.lease(version(name)) as lease:
            engine = self.rig.engine
            assert engine.adapters[lease.adapter.slot_id].name == version(name).name
            while not release.is_set():
                assert engine.dead or lease.adapter.slot_id in engine.adapters, "it left while it was leased"
                await asyncio.sleep(0)

    @rule(name=NAMES, steps=st.integers(0, 12))
    def acquire(self, name: str, steps: int) -> None:
        release = asyncio.Event()
        task = self.loop.create_task(self._call(name, release))
        self.calls.setdefault(name, []).append((task, release))
        self.run(None, steps=steps)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        for _, release in self.calls.get(name, []):
            release.set()
        self.run(None, steps=3)

    @rule(name=NAMES)
    def cancel(self, name: str) -> None:
        for task, _ in self.calls.get(name, [])[-1:]:
            task.cancel()

    @rule(name=NAMES, steps=st.integers(0, 6))
    def pin(self, name: str, steps: int) -> None:
        self._begin(self.rig.residency.pin(version(name)), steps)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        self.run(self.rig.residency.unpin(version(name).digest))

    @rule(name=NAMES, steps=st.integers(0, 6))
    def unload(self, name: str, steps: int) -> None:
        self._begin(self.rig.residency.unload(version(name).digest), steps)

    @rule(name=st.sampled_from("ef"), steps=st.integers(0, 6))
    def expel(self, name: str, steps: int) -> None:
        self._begin(self.rig.residency.expel(version(name).digest, RevokedError("leaked")), steps)

    @rule(name=NAMES, steps=st.integers(0, 6))
    def stage(self, name: str, steps: int) -> None:
        self._begin(self.rig.residency.stage(version(name)), steps)

    @rule(name=NAMES)
    def prefetch(self, name: str) -> None:
        async def ask() -> None:
            self.rig.residency.prefetch(version(name))

        self.run(ask())

    @rule(number=st.integers(0, 50))
    def cancel_another(self, number: int) -> None:
        others = [task for task in self.others if task is not self.restart]
        if others:
            others[number % len(others)].cancel()

    @rule(name=NAMES, fault=st.sampled_from(["refuse", "lie", "damage", "none"]))
    def fault(self, name: str, fault: str) -> None:
        engine, source = self.rig.engine, self.rig.source
        for names in (engine.refuse_names, engine.lie_names):
            names.discard(version(name).name)
        source.errors.pop(name, None)
        if fault == "refuse":
            engine.refuse_names.add(version(name).name)
        elif fault == "lie":
            engine.lie_names.add(version(name).name)
        elif fault == "damage":
            source.errors[name] = DigestMismatchError("flipped")

    @rule(steps=st.integers(0, 20))
    def the_engine_dies(self, steps: int) -> None:
        if self.restart is not None and not self.restart.done():
            return
        # Calls see it at their next token; these have none, so their release stands for it.
        for calls in self.calls.values():
            for _, release in calls:
                release.set()
        self.restart = self.loop.create_task(self.rig.restart())
        self.others.append(self.restart)
        self.run(None, steps=steps)

    @rule(steps=st.integers(1, 30))
    def time_passes(self, steps: int) -> None:
        self.run(None, steps=steps)

    @rule()
    def audit(self) -> None:
        found: list[str] = []

        async def look() -> None:
            found.extend(await self.rig.residency.audit())

        self.run(look())
        assert found == []

    def _begin(self, work: object, steps: int) -> None:
        self.others.append(self.loop.create_task(work))  # type: ignore[arg-type]
        self.run(None, steps=steps)

    @invariant()
    def books_engine_and_bytes_agree(self) -> None:
        if not hasattr(self, "rig"):
            return
        residency, engine = self.rig.residency, self.rig.engine
        residency._books.obey()
        entries = list(residency._books)
        assert len({entry.digest for entry in entries}) == len(entries)
        there = ("resident", "staged")
        resident = {entry.adapter.slot_id for entry in entries if entry.state in there and entry.adapter}
        assert resident <= set(engine.adapters)
        assert engine.dead or len(engine.adapters) <= (len(entries) if self.keeps_bytes else self.slots)
        assert residency.memory_bytes <= self.staged_max * SIZE
        held = {entry.version.adapter for entry in entries if entry.staged and not entry.settled}
        assert held <= self.rig.directories(), "bytes were let go while they were in the books"
        for task in self.others + [task for calls in self.calls.values() for task, _ in calls]:
            if task.done() and not task.cancelled() and task.exception() is not None:
                assert isinstance(task.exception(), EXPECTED), task.exception()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.run(self._settle(), steps=2)
            self.books_engine_and_bytes_agree()
            self.loop.close()
            shutil.rmtree(self.root)

    async def _settle(self) -> None:
        tasks = [*self.others, *(task for calls in self.calls.values() for task, _ in calls)]
        for calls in self.calls.values():
            for _, release in calls:
                release.set()
        residency = self.rig.residency
        for status in residency.statuses():  # or a call could wait for ever for a slot that only pins hold
            await residency.unpin(status.version.digest)
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        for _ in range(200):
            if not residency.moving:
                break
            await asyncio.sleep(0)
        assert not residency.moving, self.rig.states()
        await residency.check()
        assert self.rig.directories() == (set() if self.keeps_bytes else set(self.rig.states()))
        for status in residency.statuses():
            assert status.active_requests == 0
            await residency.unload(status.version.digest)
        assert self.rig.directories() == set()
        assert self.rig.engine.adapters == {}
        assert (residency.slots_used, residency.memory_bytes) == (0, 0)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
