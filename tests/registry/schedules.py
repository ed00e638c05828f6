"""Publishers, taggers, deleters, collectors and readers, interleaved at every store call by a seeded scheduler.

Each actor is a thread that holds still before every store call until the scheduler hands it the baton, so exactly one
runs at a time and a seed tells the whole story. The scheduler may also let an actor die, or lose its request or reply.
Actors' clocks are off by up to days, and collectors believe every push to be expired.

Invariants, checked after every step: (I1) a committed version has all its blobs, unchanged; (I3) a tag's generations
only grow. At the end: (I2) each version was made by one push at most; (I3) no tag points to what was deleted, unless
its mover died; (I4) what was acknowledged is there; (I5) a late collection leaves no byte that nothing refers to; and
in every read (I6) the bytes are the right ones or there is an error.
"""

import contextlib
import dataclasses
import datetime as dt
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from loraplex_registry.errors import RegistryError, StoreUnavailableError
from loraplex_registry.format import layout
from loraplex_registry.format.record import CommittedRecord, DeletedRecord, DeletingRecord, read_record
from loraplex_registry.format.tags import TagStatement, read_tag
from loraplex_registry.lifecycle import tagging
from loraplex_registry.lifecycle.delete import Deletion
from loraplex_registry.lifecycle.history import tag_history
from loraplex_registry.refs import AdapterRef
from loraplex_registry.storage.memory import MemoryStore
from tests.registry.flaky_store import CrashError, FaultyStore
from tests.registry.lab import CONTENTS, NOW, Lab

ORDERS = AdapterRef.parse("acme/orders")
TAG = "prod"
DAY_S = 86400.0
STEPS_MAX = 5000


class Actor(threading.Thread):
    """One command in a thread of its own."""

    def __init__(self, name: str, work: Callable[[Any], Any], world: "World") -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._world = world
        self.turn = threading.Semaphore(0)
        self.fate = ""
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.result = self._work(BatonStore(self._world.store, self))
        except BaseException as error:
            self.error = error
        self.done = True
        self._world.baton.release()

    def pause(self) -> str:
        """Hand the baton back; return what is to become of the next call."""
        self._world.baton.release()
        self.turn.acquire()
        return self.fate

    @property
    def died(self) -> bool:
        """Whether it ended without an answer."""
        return isinstance(self.error, CrashError | StoreUnavailableError)


class BatonStore(FaultyStore):
    """The store as an actor sees it."""

    def __init__(self, store: MemoryStore, actor: Actor) -> None:
        super().__init__(store)
        self._actor = actor

    def fate(self, name: str) -> str:
        return self._actor.pause()


@dataclass
class World:
    """One schedule."""

    lab: Lab
    seed: int
    faults: bool = False
    store: MemoryStore = field(default_factory=lambda: MemoryStore(clock=lambda: NOW.timestamp()))
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    actors: list[Actor] = field(default_factory=list)
    steps: int = 0
    _seen: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    _last: TagStatement | None = None

    def run(self) -> None:
        """Set the scene, interleave, and check."""
        rng = random.Random(self.seed)
        self._scene(rng)
        self._interleave(rng)
        self._check_end()

    # --- the actors

    def _scene(self, rng: random.Random) -> None:
        for number in range(rng.randrange(3)):
            self.lab.push(self.store, ORDERS, number % CONTENTS, tag=TAG if rng.random() < 0.7 else None)
        kinds = [self._publisher, self._publisher, self._tagger, self._tagger, self._deleter, self._collector]
        kinds += rng.choices(
            [self._publisher, self._tagger, self._untagger, self._deleter, self._collector, self._reader], k=2
        )
        for number, kind in enumerate(kinds):
            skew = dt.timedelta(days=rng.uniform(-2, 2)) if rng.random() < 0.3 else dt.timedelta()
            lab = dataclasses.replace(self.lab, now=NOW + skew)
            self.actors.append(Actor(f"{kind.__name__}-{number}", kind(lab, rng), self))

    def _publisher(self, lab: Lab, rng: random.Random) -> Callable[[Any], Any]:
        content, version = rng.randrange(CONTENTS), rng.choice([None, None, 1, 2, 3])
        tag = rng.choice([None, TAG])
        return lambda store: lab.push(store, ORDERS, content, version=version, tag=tag)

    def _tagger(self, lab: Lab, rng: random.Random) -> Callable[[Any], Any]:
        version = rng.randrange(1, 4)
        return lambda store: lab.tag(store, ORDERS, version, TAG)

    def _untagger(self, lab: Lab, rng: random.Random) -> Callable[[Any], Any]:
        return lambda store: lab.untag(store, ORDERS, TAG)

    def _deleter(self, lab: Lab, rng: random.Random) -> Callable[[Any], Any]:
        version, force = rng.randrange(1, 4), rng.random() < 0.5
        return lambda store: lab.delete(store, ORDERS, version, force=force)

    def _collector(self, lab: Lab, rng: random.Random) -> Callable[[Any], Any]:
        ahead_s = rng.choice([0.0, 10 * DAY_S])
        return lambda store: lab.gc(store, ahead_s=ahead_s)

    def _reader(self, lab: Lab, rng: random.Random) -> Callable[[Any], Any]:
        ref = AdapterRef.parse(
            rng.choice(["acme/orders", "acme/orders@prod", "acme/orders@1", "acme/orders@2"])
        )
        return lambda store: lab.read_or_none(store, ref)

    # --- the scheduler

    def _interleave(self, rng: random.Random) -> None:
        for actor in self.actors:
            actor.start()
        living = list(self.actors)
        while living:
            actor = rng.choice(living)
            # A run of calls by one actor is as likely as a finely mixed schedule: both find faults.
            for _ in range(1 if rng.random() < 0.7 else rng.randrange(2, 6)):
                actor.fate = self._fate(rng)
                actor.turn.release()
                self.baton.acquire()
                self.steps += 1
                assert self.steps < STEPS_MAX, "the schedule does not end"
                self._check_step()
                if actor.done:
                    living.remove(actor)
                    break
        for actor in self.actors:
            actor.join()

    def _fate(self, rng: random.Random) -> str:
        if not self.faults or rng.random() > 0.03:
            return ""
        return rng.choice(["crash before", "crash after", "lost request", "lost reply"])

    # --- the invariants

    def _check_step(self) -> None:
        for version, record in self._records().items():
            if isinstance(record, CommittedRecord | DeletingRecord):
                self._check_blobs(version, record if isinstance(record, CommittedRecord) else record.record)
        statement = self._tag()
        if statement is not None and self._last is not None:
            assert statement.generation >= self._last.generation, "I3: a generation came back"
            assert statement == self._last or statement.generation > self._last.generation, "I3: replaced"
        self._last = statement

    def _records(self) -> dict[int, Any]:
        prefix = layout.versions_prefix(ORDERS)
        found: dict[int, Any] = {}
        for name in self.store.children(prefix):
            version = int(name.removesuffix(".json"))
            found[version] = read_record(
                self.store.get(prefix + name, limit_bytes=1 << 20).body, version=version, where=name
            )
        return found

    def _check_blobs(self, version: int, record: CommittedRecord) -> None:
        for file in record.files:
            if file.blob is None:
                continue
            key = layout.adapter_prefix(ORDERS) + file.blob
            try:
                pieces = self.store.read_range(key, start=0, length=file.size, size_bytes=file.size)
                body = b"".join(pieces)
            except RegistryError as error:
                raise AssertionError(f"I1: version {version} lost {key}: {error}") from error
            assert len(body) == file.size, "I1"

    def _tag(self) -> TagStatement | None:
        with contextlib.suppress(RegistryError):
            item = self.store.get(layout.tag_key(ORDERS, TAG), limit_bytes=1 << 20)
            return read_tag(item.body, where=TAG).statement
        return None

    def _check_end(self) -> None:
        for actor in self.actors:
            wrong = actor.error is not None and not isinstance(actor.error, RegistryError | CrashError)
            assert not wrong, f"{actor.name}: {actor.error!r}"
        records = self._records()
        movers_died = any(
            actor.died for actor in self.actors if not actor.name.startswith(("_reader", "_coll"))
        )
        self._check_pushes(records)
        self._check_moves()
        for actor in self.actors:
            if isinstance(actor.result, Deletion):
                assert isinstance(records[int(actor.result.version)], DeletedRecord), (
                    "I4: a deletion came undone"
                )
        statement = self._tag()
        if statement is not None and statement.version is not None and not movers_died:
            # A deleter whose requests are all lost leaves the version held, until the command is run again.
            allowed = CommittedRecord | DeletingRecord if self.faults else CommittedRecord
            assert isinstance(records[int(statement.version)], allowed), "I3: the tag dangles"
        self._finish(records)

    def _check_pushes(self, records: dict[int, Any]) -> None:
        made: set[int] = set()
        for actor in self.actors:
            if not actor.name.startswith("_publisher") or actor.error is not None:
                continue
            outcome = actor.result[0]
            if outcome.created:
                assert outcome.version not in made, "I2: two pushes made one version"
                made.add(outcome.version)
            record = records[outcome.version]
            if isinstance(record, DeletedRecord):
                assert f"sha256:{record.manifest_sha256}" == outcome.record.digest, "I4"
            else:
                assert isinstance(record, CommittedRecord | DeletingRecord), "I4: a version is lost"
                kept = record if isinstance(record, CommittedRecord) else record.record
                assert kept.digest == outcome.record.digest, "I4: a version changed"

    def _check_moves(self) -> None:
        """Every move that was acknowledged is in the history, under its generation; the chain is whole."""
        if self._tag() is None:
            return
        events = {event.generation: event for event in tag_history(self.store, ORDERS, TAG)}
        assert all(event.fault is None for event in events.values()), "I3: the log has a fault"
        for actor in self.actors:
            move = (
                actor.result[1]
                if isinstance(actor.result, tuple) and len(actor.result) == 2
                else actor.result
            )
            statement = getattr(move, "statement", None)
            if isinstance(statement, TagStatement) and move.moved:
                event = events[statement.generation]
                assert (event.version, event.issued) == (statement.version, statement.issued), (
                    "I4: a move is lost"
                )

    def _finish(self, records: dict[int, Any]) -> None:
        """Run again what died, then collect late: nothing is left over, and all that is committed can be read."""
        for version, record in records.items():
            if isinstance(record, DeletingRecord):
                with contextlib.suppress(RegistryError):
                    self.lab.delete(self.store, ORDERS, version)
        late = dataclasses.replace(self.lab, now=NOW + dt.timedelta(days=30))
        late.gc(self.store, ahead_s=DAY_S)
        report = late.fsck(self.store)
        assert not report.damaged, report.findings
        assert report.counts.get("orphan_blobs", 0) == 0, "I5"
        for version, record in self._records().items():
            if isinstance(record, CommittedRecord):
                late.read(self.store, AdapterRef("acme", "orders", version=version))


def run(lab: Lab, *, schedules: int, first_seed: int = 0) -> int:
    """Run schedules, every other one with faults; return the number of store calls scheduled."""
    steps = 0
    for seed in range(first_seed, first_seed + schedules):
        world = World(lab, seed, faults=seed % 2 == 1)
        try:
            with mock.patch.object(tagging, "JITTER_S", 0.0):
                world.run()
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        steps += world.steps
    return steps
