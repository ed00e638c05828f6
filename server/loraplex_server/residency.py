"""Which adapters are in the engine, and how they come and go.

            acquire                staged              loaded              last lease released
    absent ─────────▶ FETCHING ─────────▶ LOADING ─────────▶ RESIDENT ─────────▶ (evictable)
      ▲                   │ refused          │ refused          │ unload, evict
      └───────────────────┴──────────────────┴─── DRAINING ◀────┘

Promises: one flight per digest, however many callers wait for it; a caller that leaves does not stop a
flight that others wait for; a failed or hanging load harms only those who asked for it and leaves nothing
behind, in the engine or on disk; an adapter that is leased or pinned is never evicted; the least recently
used idle one goes first. Never more than `slots` adapters are in the engine, so that the engine never has to
evict on its own, and at most `slots - 1` are pinned, so that a slot can always be freed. An adapter that is expelled
ends the calls that use it with the reason, pinned or not, and a revoked one does not come back.

All state belongs to one event loop and changes between awaits only; there are no locks.
"""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Final, Protocol

from loraplex_registry.errors import RevokedError
from loraplex_registry.registry import StagedAdapter
from loraplex_server.engine import Engine, EngineAdapter
from loraplex_server.errors import AdapterNotReadyError
from loraplex_server.versions import AdapterSource, AdapterVersion, Progress

RETRY_AFTER_S = 1.0
REVOKED_MAX: Final = 10_000  # digests remembered as revoked; beyond it the registry still refuses them


class State(StrEnum):
    """Where an adapter is on its way; an adapter without an entry is absent."""

    FETCHING = "fetching"
    LOADING = "loading"
    RESIDENT = "resident"
    DRAINING = "draining"


class ResidencyEvents(Protocol):
    """What residency tells the outside (metrics)."""

    def adapter_requested(self, result: str) -> None:
        """A caller wants an adapter: "hit" (resident), "miss" (starts a flight) or "joined" (waits for one)."""

    def adapter_phase(self, phase: str, seconds: float) -> None:
        """A load's phase ended well: "fetch" or "load"."""

    def adapter_load_ended(self, reason: str) -> None:
        """A flight ended: "ok", or the reason it failed."""

    def adapter_gone(self, cause: str) -> None:
        """A resident adapter left: "evicted", "unloaded" or "expelled"."""


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


@dataclass(eq=False)
class _Entry:
    version: AdapterVersion
    state: State = State.FETCHING
    flight: "asyncio.Task[None] | None" = None
    staged: StagedAdapter | None = None
    adapter: EngineAdapter | None = None
    pinned: bool = False
    leases: int = 0
    waiters: int = 0
    watchers: list[Progress] = field(default_factory=list)
    holders: "set[asyncio.Task[Any]]" = field(default_factory=set)
    expelled: Exception | None = None

    @property
    def idle(self) -> bool:
        return self.state is State.RESIDENT and not (self.leases or self.waiters or self.pinned)


class Residency:
    """Keeps at most `slots` adapters in the engine; see the module's drawing."""

    def __init__(
        self,
        *,
        engine: Engine,
        source: AdapterSource,
        events: ResidencyEvents,
        slots: int,
        load_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._source = source
        self._events = events
        self._slots = slots
        self._load_timeout_s = load_timeout_s
        self._clock = clock
        self._slot_ids = itertools.count(1)
        # Least recently used first: an entry moves to the end whenever it is leased.
        self._entries: dict[str, _Entry] = {}
        self._revoked: OrderedDict[str, Exception] = OrderedDict()
        self._changed = asyncio.Event()  # replaced at each change; see _notify

    @property
    def slots_total(self) -> int:
        """Adapters the engine can hold at the same time."""
        return self._slots

    @property
    def slots_used(self) -> int:
        """Slots taken, those being filled or emptied included."""
        return sum(entry.adapter is not None for entry in self._entries.values())

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the adapters in the engine, those just being loaded included."""
        there = (State.LOADING, State.RESIDENT)
        return frozenset(digest for digest, entry in self._entries.items() if entry.state in there)

    @property
    def pins(self) -> int:
        """Adapters that cannot be evicted because somebody pinned them."""
        return sum(entry.pinned for entry in self._entries.values())

    def status(self, digest: str) -> AdapterStatus | None:
        """One adapter's state, or None when it is absent."""
        entry = self._entries.get(digest)
        return _status(entry) if entry else None

    def statuses(self) -> list[AdapterStatus]:
        """Every adapter that is not absent, sorted by name."""
        return sorted(map(_status, self._entries.values()), key=lambda status: status.version.name)

    @asynccontextmanager
    async def lease(self, version: AdapterVersion, progress: Progress | None = None) -> AsyncIterator[Lease]:
        """Bring the adapter in if needed and keep it for the length of the block.

        `progress` is called with the phases "fetch" and "load" while this caller waits.

        Raises:
            RegistryError, AdapterNotReadyError, EngineUnavailableError: why it could not be brought in;
                every caller that waited for the same flight gets the same error.
            Exception: the adapter was expelled meanwhile; this is why.
        """
        entry, was_resident = await self._ensure(version, progress)
        entry.leases += 1
        self._entries[version.digest] = self._entries.pop(version.digest)
        task = asyncio.current_task()
        assert task is not None
        entry.holders.add(task)
        try:
            assert entry.adapter is not None
            yield Lease(adapter=entry.adapter, was_resident=was_resident)
        except asyncio.CancelledError:
            if entry.expelled is not None and not task.uncancel():  # by us, and by nobody else
                raise entry.expelled from None
            raise
        finally:
            entry.holders.discard(task)
            entry.leases -= 1
            self._notify()

    async def pin(self, version: AdapterVersion) -> AdapterStatus:
        """Bring the adapter in and keep it until `unpin`. Pinning twice is pinning once.

        Raises:
            AdapterNotReadyError: `slots - 1` adapters are pinned already.
        """
        async with self.lease(version):
            entry = self._entries[version.digest]
            if not entry.pinned and self.pins >= self._slots - 1:
                raise AdapterNotReadyError(
                    f"{self.pins} adapters are pinned already; one of the {self._slots} slots stays free for others",
                    metadata={"pins": str(self.pins), "slots": str(self._slots)},
                )
            entry.pinned = True
            return _status(entry)

    async def unpin(self, digest: str) -> AdapterStatus | None:
        """Make the adapter evictable again; None when it is absent."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        entry.pinned = False
        self._notify()
        return _status(entry)

    async def unload(self, digest: str) -> bool:
        """Free the adapter's slot once its running requests have ended; whether it was here at all.

        Requests that arrive meanwhile wait, and bring it in again afterwards. A flight is awaited first.
        """
        entry = self._entries.get(digest)
        if entry is None:
            return False
        if entry.flight is not None:
            await asyncio.wait([entry.flight])
        if self._entries.get(digest) is entry and entry.state is State.RESIDENT:
            entry.pinned = False
            await self._remove(entry, cause="unloaded")
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
        entry = self._entries.get(digest)
        if entry is None or entry.expelled is not None:
            return entry is not None
        entry.expelled, entry.pinned = error, False
        for task in entry.holders:
            task.cancel()
        if entry.flight is not None:
            await asyncio.wait([entry.flight])
        if self._entries.get(digest) is entry and entry.state is State.RESIDENT:
            await self._remove(entry, cause="expelled")
        return True

    async def close(self) -> None:
        """Stop every flight and wait until it has cleaned up. The engine is left to its owner."""
        flights = [entry.flight for entry in self._entries.values() if entry.flight]
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def check(self) -> None:
        """Compare the books with the engine's own list; for tests and idle moments.

        Raises:
            AssertionError: they differ, which is a bug of ours.
        """
        loaded = await self._engine.loaded()
        resident = {
            entry.adapter.slot_id
            for entry in self._entries.values()
            if entry.adapter and entry.state is State.RESIDENT
        }
        assert resident == loaded, f"engine holds {sorted(loaded)}, books say {sorted(resident)}"

    async def _ensure(self, version: AdapterVersion, progress: Progress | None) -> tuple[_Entry, bool]:
        first = True
        while True:
            if version.digest in self._revoked:
                raise self._revoked[version.digest]
            entry = self._entries.get(version.digest)
            if entry is not None and entry.state is State.RESIDENT:
                if first:
                    self._events.adapter_requested("hit")
                return entry, first
            if entry is not None and entry.state is State.DRAINING:
                await self._wait_until(partial(self._is_gone, entry))
                continue
            if first:
                self._events.adapter_requested("joined" if entry else "miss")
            first = False
            await self._join(entry or self._start(version), progress)

    def _is_gone(self, entry: _Entry) -> bool:
        return self._entries.get(entry.version.digest) is not entry

    def _start(self, version: AdapterVersion) -> _Entry:
        entry = _Entry(version)
        self._entries[version.digest] = entry
        entry.flight = asyncio.create_task(self._fly(entry), name=f"load {version.name}")
        # Everybody may have left when it fails: then nobody else would look at the error.
        entry.flight.add_done_callback(lambda task: task.cancelled() or task.exception())
        return entry

    async def _join(self, entry: _Entry, progress: Progress | None) -> None:
        """Wait for a flight; leaving early does not stop it, and it cannot be evicted before we look."""
        assert entry.flight is not None
        entry.waiters += 1
        if progress:
            entry.watchers.append(progress)
        try:
            await asyncio.shield(entry.flight)
        finally:
            entry.waiters -= 1
            if progress:
                entry.watchers.remove(progress)

    async def _fly(self, entry: _Entry) -> None:
        """Bring one adapter in, or leave no trace of it."""
        reason = "ok"
        try:
            async with asyncio.timeout(self._load_timeout_s):
                await self._stage(entry)
                await self._load(entry)
        except TimeoutError:
            reason = AdapterNotReadyError.code
            raise AdapterNotReadyError(
                f"{entry.version.name} was not ready after {self._load_timeout_s:g} s: it was still {entry.state}",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        except Exception as error:
            reason = str(getattr(error, "code", "INTERNAL"))
            raise
        except asyncio.CancelledError:
            reason = "CANCELLED"
            raise
        finally:
            self._events.adapter_load_ended(reason)
            entry.flight = None
            if reason != "ok":
                entry.state = State.DRAINING  # those who come now wait, then start afresh
                await asyncio.shield(self._clear(entry))
            self._notify()

    async def _stage(self, entry: _Entry) -> None:
        started = self._clock()
        loop = asyncio.get_running_loop()

        def report(phase: str, done: int, total: int) -> None:  # called on the fetching thread
            loop.call_soon_threadsafe(_tell, entry, phase, done, total)

        entry.staged = await self._source.stage(entry.version, report)
        self._events.adapter_phase("fetch", self._clock() - started)

    async def _load(self, entry: _Entry) -> None:
        assert entry.staged is not None
        entry.state = State.LOADING
        _tell(entry, "load", entry.staged.size_bytes, entry.staged.size_bytes)
        await self._take_slot(entry)
        assert entry.adapter is not None
        started = self._clock()
        await self._engine.load(entry.adapter)
        await self._source.confirm(entry.staged)  # before any request can use it
        if entry.expelled is not None:
            raise entry.expelled
        entry.state = State.RESIDENT
        self._events.adapter_phase("load", self._clock() - started)

    async def _take_slot(self, entry: _Entry) -> None:
        """Claim a slot, evicting the least recently used idle adapter, or wait until one is idle."""
        while self.slots_used >= self._slots:
            victim = next((other for other in self._entries.values() if other.idle), None)
            if victim is not None:
                await self._remove(victim, cause="evicted")
            else:
                await self._wait_until(
                    lambda: self.slots_used < self._slots or any(o.idle for o in self._entries.values())
                )
        assert entry.staged is not None
        entry.adapter = EngineAdapter(
            name=entry.version.name, slot_id=next(self._slot_ids), path=entry.staged.path
        )

    async def _remove(self, entry: _Entry, *, cause: str) -> None:
        """Drain, then free. The freeing itself is shielded: half of it must not be left undone."""
        entry.state = State.DRAINING
        try:
            await self._wait_until(lambda: not entry.leases)
        except asyncio.CancelledError:
            entry.state = State.RESIDENT
            self._notify()
            raise
        await asyncio.shield(self._clear(entry))
        self._events.adapter_gone(cause)

    async def _clear(self, entry: _Entry) -> None:
        """Free everything an entry holds, then forget it; an engine that died has nothing to free."""
        try:
            if entry.adapter is not None:
                await self._engine.unload(entry.adapter.slot_id)
        finally:
            if entry.staged is not None:
                await self._source.discard(entry.staged)
            if self._entries.get(entry.version.digest) is entry:
                del self._entries[entry.version.digest]
            self._notify()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        # Not an asyncio.Condition: its notify has to await a lock, and a cancellation there would lose a wake-up.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _tell(entry: _Entry, phase: str, done: int, total: int) -> None:
    for watcher in list(entry.watchers):
        watcher(phase, done, total)


def _status(entry: _Entry) -> AdapterStatus:
    staged = entry.staged
    return AdapterStatus(
        version=entry.version,
        state=entry.state,
        rank=staged.rank if staged else entry.version.verified.manifest.lora.rank,
        size_bytes=staged.size_bytes if staged else 0,
        pinned=entry.pinned,
        active_requests=entry.leases,
    )
