"""Which adapters are in the engine and in memory beside it, and how they come and go.

The drawing of the states is in `books`.

Three tiers: a slot of the engine; memory, where verified bytes wait sealed for a slot (STAGED); the registry's cache on
disk, which knows nothing of this module. An adapter that loses its slot stays in memory while there is room, and comes
back for the price of the engine's own copy. Where the engine keeps copies that a slot costs nothing beside
(`Engine.keeps_bytes`), what is STAGED is such a copy: it comes back for nothing, and the sealed bytes are let go of as
soon as it is made. When the engine dies, copies are made again from the cache on disk: of what was in a slot at once,
of what is STAGED when it is asked for.

Promises: one flight per digest, however many callers wait for it; a caller that leaves does not stop a flight that
others wait for; a failed, hanging or lying load harms only those who asked for it and leaves nothing behind, in the
engine or on disk; an adapter that is leased or pinned is never evicted; the least recently used idle one goes first.
Never more than `slots` adapters are in the engine, so that the engine never has to evict on its own, and at most
`slots - 1` are pinned, so that a slot can always be freed. An adapter that is expelled ends the calls that use it with
the reason, pinned or not, and a revoked one does not come back. When the engine dies, calls end and what was resident
waits with its bytes for the next engine.

All state belongs to one event loop and changes between awaits only; there are no locks.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from loraplex_registry.errors import RevokedError
from loraplex_registry.registry import StagedAdapter
from loraplex_server.adapters.books import Books, Cause, State, Tier
from loraplex_server.adapters.flights import RETRY_AFTER_S, Entry, Flights, ResidencyEvents
from loraplex_server.adapters.versions import AdapterSource, AdapterVersion, Progress
from loraplex_server.engine.protocol import Engine, EngineAdapter
from loraplex_server.errors import AdapterNotReadyError, EngineUnavailableError

__all__ = ["AdapterStatus", "Cause", "Lease", "Residency", "ResidencyEvents", "State", "Tier"]

REVOKED_MAX: Final = 10_000  # digests remembered as revoked; beyond it the registry still refuses them
ENDING_S: Final = 1.0  # calls of a dead engine end by themselves within this, or are ended, in seconds
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter as seen from outside."""

    version: AdapterVersion
    state: State
    rank: int
    size_bytes: int
    pinned: bool
    active_requests: int


@dataclass(frozen=True)
class Lease:
    """The right to use a resident adapter until the `lease` block ends."""

    adapter: EngineAdapter
    was_resident: bool


class Residency:
    """Keeps at most `slots` adapters in the engine, and `memory_bytes_max` bytes of others ready beside it."""

    def __init__(
        self,
        *,
        engine: Engine,
        source: AdapterSource,
        events: ResidencyEvents,
        slots: int,
        load_timeout_s: float,
        clock: Callable[[], float],
        memory_bytes_max: int = 0,
        staged_max: int = 1000,
        ahead_max: int = 2,
    ) -> None:
        self._events = events
        self._ahead_max = ahead_max
        self._books: Books[Entry] = Books(
            slots=slots, memory_bytes_max=memory_bytes_max, staged_max=staged_max
        )
        self._flights = Flights(
            books=self._books,
            engine=engine,
            source=source,
            events=events,
            load_timeout_s=load_timeout_s,
            clock=clock,
        )
        self._revoked: OrderedDict[str, Exception] = OrderedDict()

    @property
    def slots_total(self) -> int:
        """Adapters the engine can hold at the same time."""
        return self._books.slots

    @property
    def slots_used(self) -> int:
        """Slots taken, those being filled or emptied included."""
        return self._books.slots_used

    @property
    def memory_bytes(self) -> int:
        """Bytes of adapters in memory without a slot, and of those being fetched for it."""
        return self._books.memory_bytes

    @property
    def memory_bytes_max(self) -> int:
        """Bound of `memory_bytes`."""
        return self._books.memory_bytes_max

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the adapters in the engine, those just being loaded included."""
        there = (State.LOADING, State.RESIDENT)
        return frozenset(entry.digest for entry in self._books if entry.state in there)

    @property
    def pins(self) -> int:
        """Adapters that cannot be evicted because somebody pinned them."""
        return self._books.pins

    @property
    def moving(self) -> bool:
        """Whether any adapter is on its way in or out."""
        at_rest = (State.STAGED, State.RESIDENT)
        return any(entry.flight is not None or entry.state not in at_rest for entry in self._books)

    def status(self, digest: str) -> AdapterStatus | None:
        """One adapter's state, or None when it is absent."""
        entry = self._books.get(digest)
        return _status(entry) if entry else None

    def statuses(self) -> list[AdapterStatus]:
        """Every adapter that is not absent, sorted by name."""
        return sorted(map(_status, self._books), key=lambda status: status.version.name)

    @asynccontextmanager
    async def lease(self, version: AdapterVersion, progress: Progress | None = None) -> AsyncIterator[Lease]:
        """Bring the adapter in if needed and keep it for the length of the block.

        `progress` is called with the phases "fetch", "check" and "load" while this caller waits.

        Raises:
            RegistryError, AdapterNotReadyError, EngineUnavailableError: why it could not be brought in;
                every caller that waited for the same flight gets the same error.
            Exception: the adapter was expelled meanwhile, or the engine died; this is why.
        """
        entry, was_resident = await self._ensure(version, progress)
        entry.leases += 1
        self._books.used(entry)
        task = asyncio.current_task()
        assert task is not None
        entry.holders[task] = None
        try:
            assert entry.adapter is not None
            yield Lease(adapter=entry.adapter, was_resident=was_resident)
        except asyncio.CancelledError:
            error = entry.holders[task]
            if error is not None and not task.uncancel():  # by us, and by nobody else
                raise error from None
            raise
        finally:
            del entry.holders[task]
            entry.leases -= 1
            self._flights.notify()

    async def stage(self, version: AdapterVersion, progress: Progress | None = None) -> AdapterStatus:
        """Bring the adapter's bytes into memory, where a later lease finds them; a slot is not taken.

        Raises:
            RegistryError: why they could not be brought in.
            AdapterNotReadyError: they do not fit into what memory is left.
        """
        while True:
            entry = self._known(version)
            if entry is None:
                entry = self._flights.arrive_ahead(version)
            if entry is None:
                raise AdapterNotReadyError(
                    f"{version.name} does not fit into memory now: {self.memory_bytes} of "
                    f"{self.memory_bytes_max} bytes are in use, by {self._books.staged} of at most "
                    f"{self._books.staged_max} adapters",
                    retry_after_s=RETRY_AFTER_S,
                )
            if entry.state is State.DRAINING:
                await self._flights.past(entry, State.DRAINING)
            elif entry.staged is not None and entry.state in (State.STAGED, State.LOADING, State.RESIDENT):
                return _status(entry)
            else:
                await self._flights.join(entry, progress)

    def prefetch(self, version: AdapterVersion) -> None:
        """Begin to bring an adapter's bytes into memory for a call that will lease it soon; never fails.

        At most `ahead_max` at a time, and only into memory that nothing in use has to leave, nor anything that was
        fetched ahead within `AHEAD_HOLD_S` and waits for its own call.
        """
        if self._flights.lost.is_set() or version.digest in self._revoked:
            return
        if self._books.get(version.digest) is not None:
            self._events.adapter_ahead("here")
            return
        running = sum(entry.flight is not None and not entry.wanted for entry in self._books)
        started = running < self._ahead_max and self._flights.arrive_ahead(version) is not None
        self._events.adapter_ahead("started" if started else "full")

    async def pin(self, version: AdapterVersion) -> AdapterStatus:
        """Bring the adapter in and keep it until `unpin`. Pinning twice is pinning once.

        Raises:
            AdapterNotReadyError: `slots - 1` adapters are pinned already.
        """
        async with self.lease(version):
            entry = self._books.get(version.digest)
            assert entry is not None
            if not self._books.may_pin(entry):
                slots = self.slots_total
                raise AdapterNotReadyError(
                    f"{self.pins} adapters are pinned already; one of the {slots} slots stays free for others",
                    metadata={"pins": str(self.pins), "slots": str(slots)},
                )
            entry.pinned = True
            return _status(entry)

    async def unpin(self, digest: str) -> AdapterStatus | None:
        """Make the adapter evictable again; None when it is absent."""
        entry = self._books.get(digest)
        if entry is None:
            return None
        entry.pinned = False
        self._flights.notify()
        return _status(entry)

    async def unload(self, digest: str) -> bool:
        """Free slot and memory once the adapter's running requests have ended; whether it was here at all.

        Requests that arrive meanwhile wait, and bring it in again afterwards. A flight is awaited first.
        """
        entry = self._books.get(digest)
        if entry is None:
            return False
        await self._flights.let_go(entry, Cause.UNLOADED)
        return True

    async def expel(self, digest: str, error: Exception) -> bool:
        """End the use of an adapter at once: calls that use it or wait for it end with `error`, then it leaves.

        Returns:
            Whether it was here at all.
        """
        if isinstance(error, RevokedError):
            self._revoked[digest] = error
            while len(self._revoked) > REVOKED_MAX:
                self._revoked.popitem(last=False)
        entry = self._books.get(digest)
        if entry is None or entry.expelled is not None:
            return entry is not None
        entry.expelled = error
        _end(entry, error)
        await self._flights.let_go(entry, Cause.EXPELLED)
        return True

    async def engine_lost(self, error: EngineUnavailableError) -> None:
        """The engine died: end its calls with `error`, and keep what had a slot for `restore`, pins included."""
        self._flights.lost.set()
        self._flights.notify()
        flights = [e.flight for e in self._books if e.flight and e.state is State.LOADING]
        await asyncio.gather(*flights, return_exceptions=True)
        for entry in [entry for entry in self._books if entry.state is State.RESIDENT]:
            self._books.move(entry, State.LOADING)
            entry.adapter = None
            self._events.adapter_gone(Tier.SLOT, Cause.ENGINE_DIED)
        for entry in self._books:
            if entry.settled:  # the copy is gone; whoever wants it has it made again, from the cache on disk
                entry.adapter = None
        try:
            async with asyncio.timeout(ENDING_S):
                await self._flights.until(lambda: not any(entry.leases for entry in self._books))
        except TimeoutError:
            for entry in self._books:
                _end(entry, error)

    async def restore(self, engine: Engine) -> None:
        """Go on with a fresh engine: what was resident is loaded again, most recently used first.

        Returns when everything is back or has failed, after `load_timeout_s` at most. What fails leaves.
        """
        self._flights.engine, self._flights.lost = engine, asyncio.Event()
        back = [entry for entry in self._books if entry.state is State.LOADING and entry.flight is None]
        flights = [self._flights.take_off(entry) for entry in reversed(back)]
        if flights:
            await asyncio.wait(flights)  # a caller that is cancelled leaves them flying
        for flight in flights:
            if not flight.cancelled() and flight.exception() is not None:
                _log.warning(
                    "%s did not come back with the engine: %s", flight.get_name(), flight.exception()
                )

    async def close(self) -> None:
        """Stop every flight and wait until it has cleaned up. The engine is left to its owner."""
        flights = [entry.flight for entry in self._books if entry.flight]
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def audit(self) -> list[str]:
        """Compare the books with the engine's own list and mend what differs; return what it was, in words.

        An adapter that the engine has lost leaves, and comes back when it is asked for; one that the engine holds
        beyond the books is unloaded. Says nothing while adapters come or go.
        """
        before = self._in_engine()
        if self.moving or self._flights.lost.is_set():
            return []
        loaded = await self._flights.of_engine(self._flights.engine.loaded())
        if self.moving or self._in_engine() != before:
            return []  # adapters came or went while the engine was asked
        known = {adapter.slot_id: entry for entry, adapter in before}
        found = []
        for slot_id in sorted(loaded - known.keys()):
            found.append(f"the engine held slot id {slot_id}, which is in no book")
            await self._flights.of_engine(self._flights.engine.unload(slot_id))
            self._events.adapter_gone(Tier.SLOT, Cause.INTEGRITY)
        for slot_id in sorted(known.keys() - loaded):
            found.append(f"the engine has lost {known[slot_id].version.name}")
            await self._flights.let_go(known[slot_id], Cause.INTEGRITY)
        return found

    async def damaged(self, staged: StagedAdapter) -> bool:
        """Have an adapter leave because its bytes are not right any more, once its calls have ended.

        Returns:
            False when nothing is to be done: these bytes have left already.
        """
        entry = self._books.get(staged.digest)
        if entry is None or entry.staged is not staged or entry.state not in (State.STAGED, State.RESIDENT):
            return False
        await self._flights.let_go(entry, Cause.INTEGRITY)
        return True

    async def check(self) -> None:
        """Compare the books with the engine's own list and with their laws; for tests.

        Raises:
            AssertionError: they differ, which is a bug of ours.
        """
        loaded = await self._flights.engine.loaded()
        self._books.obey()
        held = {adapter.slot_id for _, adapter in self._in_engine()}
        assert held == loaded, f"engine holds {sorted(loaded)}, books say {sorted(held)}"

    def at_rest(self) -> list[StagedAdapter]:
        """Return the bytes that are kept for adapters in slots and in memory, while nothing happens to them."""
        there = (State.STAGED, State.RESIDENT)
        kept = [entry for entry in self._books if entry.state in there and not entry.settled]
        return [entry.staged for entry in kept if entry.staged]

    def _in_engine(self) -> list[tuple[Entry, EngineAdapter]]:
        """What the engine should list, the least recently loaded first."""
        there = (State.STAGED, State.RESIDENT)
        found = [(e, e.adapter) for e in self._books if e.adapter and e.state in there]
        return sorted(found, key=lambda item: item[1].slot_id)

    async def _ensure(self, version: AdapterVersion, progress: Progress | None) -> tuple[Entry, bool]:
        first = True
        while True:
            entry = self._known(version)
            if entry is not None and entry.state is State.RESIDENT:
                if first:
                    self._events.adapter_requested("hit")
                return entry, first
            if entry is not None and entry.state is State.DRAINING:
                await self._flights.past(entry, State.DRAINING)
                continue
            if first:
                joined = "staged" if entry and entry.state is State.STAGED else "joined"
                self._events.adapter_requested(joined if entry else "miss")
            first = False
            if entry is None:
                entry = self._flights.arrive(version)
            entry.wanted = True
            if entry.flight is None:
                self._flights.take_off(entry)
            await self._flights.join(entry, progress)

    def _known(self, version: AdapterVersion) -> Entry | None:
        """Look an adapter up for a caller that may have it.

        Raises:
            RevokedError: it was revoked while it was here.
            EngineUnavailableError: there is no engine now.
        """
        if version.digest in self._revoked:
            raise self._revoked[version.digest]
        if self._flights.lost.is_set():
            raise EngineUnavailableError("the engine stopped", retry_after_s=RETRY_AFTER_S)
        return self._books.get(version.digest)


def _end(entry: Entry, error: Exception) -> None:
    """End the calls that use an adapter."""
    for task in entry.holders:
        if entry.holders[task] is None:
            entry.holders[task] = error
            task.cancel()


def _status(entry: Entry) -> AdapterStatus:
    staged = entry.staged
    return AdapterStatus(
        version=entry.version,
        state=entry.state,
        rank=staged.rank if staged else entry.version.rank,
        size_bytes=staged.size_bytes if staged else 0,
        pinned=entry.pinned,
        active_requests=entry.leases,
    )
