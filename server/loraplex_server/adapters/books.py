"""The books of residency: which adapter is in which state, and which one may leave. Pure: no task, clock or engine.

                          wrong copy on disk
                        ┌────────────────────┐
              begun     ▼                    │   asked for by a call
    absent ─────────▶ FETCHING ────────▶ VERIFYING ────────────────▶ LOADING ────────────▶ RESIDENT
      ▲                 │                 │     │                    ▲  │  ▲    in a slot   │   │
      │                 │         ahead of│     └─────▶ STAGED ──────┘  │  └────────────────┘   │
      │                 │         a call  │             │  ▲  asked for │     engine died       │
      │                 ▼                 ▼             ▼  │            ▼                       ▼
    GONE ◀──────────────────────────────────────────── DRAINING ◀──────────────────────────────┘
                                                            └── unloading was given up ──▶ RESIDENT

What only passes through on its way to a slot is never STAGED. LOADING waits for a slot first, then is copied into it.
From DRAINING an adapter goes back to STAGED when only its slot was wanted and memory has room for it.

Laws, checked at every change: the drawing and no other way; at most `slots` slots are claimed and `slots - 1` adapters
pinned; STAGED adapters and those fetched ahead of a call are at most `staged_max`, and their bytes, reserved ones
included, at most `memory_bytes_max`; what is RESIDENT has a slot and what is STAGED has none; what is leased, pinned or
waited for is never offered as a victim. Adapters in slots keep their bytes too, which `slots` bounds.

Records are kept least recently used first.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Generic, TypeVar


class State(StrEnum):
    """Where an adapter is on its way; an adapter without a record is absent."""

    FETCHING = "fetching"
    VERIFYING = "verifying"
    STAGED = "staged"
    LOADING = "loading"
    RESIDENT = "resident"
    DRAINING = "draining"
    GONE = "gone"


DRAWING: Final[Mapping[State, frozenset[State]]] = {
    State.FETCHING: frozenset({State.VERIFYING, State.DRAINING}),
    State.VERIFYING: frozenset({State.FETCHING, State.STAGED, State.LOADING, State.DRAINING}),
    State.STAGED: frozenset({State.LOADING, State.DRAINING}),
    State.LOADING: frozenset({State.RESIDENT, State.DRAINING}),
    State.RESIDENT: frozenset({State.DRAINING, State.LOADING}),
    State.DRAINING: frozenset({State.STAGED, State.RESIDENT, State.GONE}),
    State.GONE: frozenset(),
}
"""The states that may follow each state."""


class Tier(StrEnum):
    """What an adapter can leave: the engine, or the memory beside it."""

    SLOT = "slot"
    MEMORY = "memory"


class Cause(StrEnum):
    """Why an adapter left a tier."""

    FOR_SLOT = "evicted_for_slot"
    FOR_MEMORY = "evicted_for_memory"
    UNLOADED = "unloaded"
    EXPELLED = "expelled"
    FAILED = "failed"
    INTEGRITY = "integrity"
    ENGINE_DIED = "engine_died"


@dataclass(eq=False)
class Record:
    """One adapter in the books.

    Attributes:
        wanted: a call asked for it, so that it goes on into a slot.
        slot: it has claimed one.
        size_bytes: of its bytes in memory, also while they are only reserved.
        reserved: memory is held for it while it is fetched.
        leases, waiters: calls that use it, and that wait for it.
    """

    digest: str
    wanted: bool = True
    state: State = State.FETCHING
    slot: bool = False
    size_bytes: int = 0
    reserved: bool = False
    pinned: bool = False
    leases: int = 0
    waiters: int = 0

    @property
    def free(self) -> bool:
        """Whether it may be taken out of the tier it is in without harm to anybody."""
        return not (self.leases or self.waiters or self.pinned)


R = TypeVar("R", bound=Record)


class Books(Generic[R]):
    """See the module."""

    def __init__(self, *, slots: int, memory_bytes_max: int, staged_max: int) -> None:
        self.slots = slots
        self.memory_bytes_max = memory_bytes_max
        self.staged_max = staged_max
        self._records: dict[str, R] = {}

    def __iter__(self) -> Iterator[R]:
        """Every record, least recently used first."""
        return iter(self._records.values())

    def get(self, digest: str) -> R | None:
        """The record of an adapter; None when it is absent."""
        return self._records.get(digest)

    @property
    def slots_used(self) -> int:
        """Slots claimed, those being filled or emptied included."""
        return sum(record.slot for record in self)

    @property
    def pins(self) -> int:
        """Adapters that somebody pinned."""
        return sum(record.pinned for record in self)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the memory tier, reserved ones included."""
        return sum(record.size_bytes for record in self if _is_in_memory(record))

    @property
    def staged(self) -> int:
        """Adapters of the memory tier, those fetched for it included."""
        return sum(map(_is_in_memory, self))

    def enter(self, record: R) -> None:
        """Begin with an absent adapter."""
        assert record.digest not in self._records, f"{record.digest} is in the books already"
        assert record.state is State.FETCHING
        self._records[record.digest] = record
        self._check_bounds()

    def move(self, record: R, state: State) -> None:
        """Change a state along the drawing; GONE takes the record out of the books."""
        assert self._records.get(record.digest) is record, f"{record.digest} is not in the books"
        assert state in DRAWING[record.state], f"{record.digest}: {record.state} never becomes {state}"
        record.state = state
        if state is State.GONE:
            del self._records[record.digest]
        _check_record(record)
        self._check_bounds()

    def used(self, record: R) -> None:
        """Make a record the most recently used one."""
        self._records[record.digest] = self._records.pop(record.digest)

    def claim_slot(self, record: R) -> bool:
        """Claim a free slot; False when there is none. What had one before the engine died keeps it."""
        assert record.state is State.LOADING
        record.slot = record.slot or self.slots_used < self.slots
        return record.slot

    def may_pin(self, record: R) -> bool:
        """Whether a slot would still be left for others."""
        return record.pinned or self.pins < self.slots - 1

    def out_of_slot(self) -> R | None:
        """Return the adapter that leaves when a slot is wanted: the least recently used one that nobody needs."""
        return next((record for record in self if record.state is State.RESIDENT and record.free), None)

    def out_of_memory(
        self, record: R, size_bytes: int, *, spared: Callable[[R], bool] = lambda _: False
    ) -> list[R] | None:
        """Return the staged adapters that leave so that `record` with `size_bytes` fits, least recently used first.

        Only adapters used before it leave for it. None: it does not fit.

        Args:
            record: in the books, or not yet; then it counts as used now.
            size_bytes: of its bytes.
            spared: adapters that must stay though nobody uses them.
        """
        held = self.get(record.digest) is record and _is_in_memory(record)
        room = self.memory_bytes_max - self.memory_bytes + held * record.size_bytes
        places, leaving = self.staged_max - self.staged + held, list[R]()
        for other in self:
            if (room >= size_bytes and places > 0) or other is record:
                break
            if other.state is State.STAGED and other.free and not spared(other):
                leaving.append(other)
                room, places = room + other.size_bytes, places + 1
        return leaving if room >= size_bytes and places > 0 else None

    def obey(self) -> None:
        """Check every law; for tests and idle moments, because it looks at every record.

        Raises:
            AssertionError: one is broken, which is a bug of ours.
        """
        self._check_bounds()
        for record in self:
            _check_record(record)

    def _check_bounds(self) -> None:
        assert self.slots_used <= self.slots, "more slots are claimed than there are"
        assert self.pins <= max(0, self.slots - 1), "no slot is left for others"
        assert self.memory_bytes <= self.memory_bytes_max, "more bytes are staged than may be"
        assert self.staged <= self.staged_max, "more adapters are staged than may be"


def _check_record(record: Record) -> None:
    assert record.slot or record.state is not State.RESIDENT, f"{record.digest} is resident without a slot"
    assert not (record.slot and record.state is State.STAGED), f"{record.digest} is staged in a slot"


def _is_in_memory(record: Record) -> bool:
    coming = record.reserved and record.state in (State.FETCHING, State.VERIFYING)
    return coming or record.state is State.STAGED
