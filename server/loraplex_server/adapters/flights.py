"""How one adapter moves between the tiers: flights in, and the ways out. What decides when is `residency`.

A flight is one task that brings one adapter in; it ends with the adapter at rest, or leaves no trace of it. Whatever is
asked of the engine is also answered by its death. Nothing here awaits between looking at the books and changing them.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from loraplex_registry.registry import StagedAdapter
from loraplex_server.adapters.books import Books, Cause, Record, State, Tier
from loraplex_server.adapters.versions import AdapterSource, AdapterVersion, Progress
from loraplex_server.engine.protocol import Engine, EngineAdapter
from loraplex_server.errors import AdapterNotReadyError, EngineUnavailableError

RETRY_AFTER_S = 1.0
AHEAD_HOLD_S: Final = 30.0  # for which a fetch ahead of a call is not displaced by the next one, in seconds
_T = TypeVar("_T")


class ResidencyEvents(Protocol):
    """What residency tells the outside (metrics)."""

    def adapter_requested(self, result: str) -> None:
        """A caller wants an adapter: "hit" (resident), "staged", "joined" (a flight), or "miss" (starts one)."""

    def adapter_ahead(self, result: str) -> None:
        """A fetch ahead of a call was asked for: "started", "here" (nothing to do) or "full" (no room for it)."""

    def adapter_phase(self, phase: str, seconds: float) -> None:
        """A load's phase ended well: "fetch" or "load"."""

    def adapter_load_ended(self, reason: str) -> None:
        """A flight ended: "ok", or the reason it failed."""

    def adapter_gone(self, tier: str, cause: str) -> None:
        """An adapter left a tier (`books.Tier`) for a cause (`books.Cause`)."""


@dataclass(eq=False, kw_only=True)
class Entry(Record):
    """One adapter: its record in the books, and what belongs to it.

    Attributes:
        settled: the engine made a copy that counts, of `held_bytes`; the bytes of `staged` were let go of.
        adapter: as the engine knows it; also of one that is STAGED, where the engine keeps its bytes. None when that
            engine died.
    """

    version: AdapterVersion
    flight: "asyncio.Task[None] | None" = None
    staged: StagedAdapter | None = None
    settled: bool = False
    held_bytes: int = 0
    adapter: EngineAdapter | None = None
    spared_until: float = 0.0
    watchers: list[Progress] = field(default_factory=list)
    # Calls that use it, with the error that each was ended with.
    holders: "dict[asyncio.Task[Any], Exception | None]" = field(default_factory=dict)
    expelled: Exception | None = None


class Flights:
    """See the module. One per server; `books`, `engine` and `lost` are also read by `Residency`."""

    def __init__(
        self,
        *,
        books: Books[Entry],
        engine: Engine,
        source: AdapterSource,
        events: ResidencyEvents,
        load_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.books = books
        self.engine = engine
        self.lost = asyncio.Event()  # the engine is dead; replaced with each engine
        self._source = source
        self._events = events
        self._load_timeout_s = load_timeout_s
        self._clock = clock
        self._slot_ids = itertools.count(1)
        self._changed = asyncio.Event()  # replaced at each change; see notify

    def arrive(self, version: AdapterVersion) -> Entry:
        """Enter an absent adapter that a call asks for; `take_off` comes next."""
        entry = Entry(version.digest, version=version)
        self.books.enter(entry)
        return entry

    def arrive_ahead(self, version: AdapterVersion) -> Entry | None:
        """Reserve memory for an absent adapter and begin to fetch it; None when there is no room."""
        now = self._clock()
        entry = Entry(
            version.digest,
            wanted=False,
            size_bytes=version.size_bytes,
            reserved=True,
            version=version,
            spared_until=now + AHEAD_HOLD_S,
        )
        leaving = self.books.out_of_memory(
            entry, entry.size_bytes, spared=lambda other: other.spared_until > now
        )
        if leaving is None:
            return None
        self._displace(leaving)
        self.books.enter(entry)
        self.take_off(entry)
        return entry

    def take_off(self, entry: Entry) -> "asyncio.Task[None]":
        """Start an adapter's flight, from wherever its bytes are."""
        entry.flight = _spawn(self._fly(entry), f"load {entry.version.name}")
        return entry.flight

    async def join(self, entry: Entry, progress: Progress | None) -> None:
        """Wait for a flight; leaving early does not stop it, and it cannot be evicted before we look.

        Raises:
            RegistryError, AdapterNotReadyError, EngineUnavailableError: why it failed.
        """
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
            self.notify()

    async def past(self, entry: Entry, state: State) -> None:
        """Wait until an adapter is in another state."""
        await self.until(lambda: entry.state is not state)

    async def let_go(self, entry: Entry, cause: Cause) -> None:
        """Have an adapter leave slot and memory, once its flight and its calls have ended."""
        while entry.state is not State.GONE:
            if entry.flight is not None:
                await asyncio.wait([entry.flight])
            elif entry.state is State.DRAINING:
                await self.past(entry, State.DRAINING)
            else:
                entry.pinned = False
                await self._remove(entry, cause)

    async def of_engine(self, answer: Awaitable[_T]) -> _T:
        """Wait for an answer of the engine, or for its death: a dead engine leaves questions open for ever.

        Raises:
            EngineUnavailableError: it died.
        """
        asked, lost = asyncio.ensure_future(answer), asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait({asked, lost}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            raise _no_engine()
        finally:
            asked.cancel()
            lost.cancel()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that another task will do and `notify` of."""
        while not condition():
            await self._changed.wait()

    def notify(self) -> None:
        """Have those look who wait."""
        # Not an asyncio.Condition: its notify has to await a lock, and a cancellation there would lose a wake-up.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _fly(self, entry: Entry) -> None:
        """Bring one adapter in, or leave no trace of it."""
        reason, left = "ok", Tier.MEMORY if entry.staged else None
        try:
            async with asyncio.timeout(self._load_timeout_s):
                if entry.staged is None or (entry.settled and entry.adapter is None):
                    await self._fetch(entry)
                if entry.wanted:
                    await self._load(entry)
                else:
                    if self.engine.keeps_bytes:
                        await self._hand_over(entry)
                    self._keep(entry)
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
            if reason == EngineUnavailableError.code and self.lost.is_set() and entry.slot:
                entry.adapter = None  # it waits in LOADING for the next engine
            elif reason != "ok":
                self.books.move(entry, State.DRAINING)  # those who come now wait, then start afresh
                await asyncio.shield(self._clear(entry, left, Cause.FAILED))
            self.notify()

    async def _fetch(self, entry: Entry) -> None:
        started = self._clock()
        loop = asyncio.get_running_loop()

        def report(phase: str, done: int, total: int) -> None:  # called on the fetching thread
            loop.call_soon_threadsafe(self._hear, entry, phase, done, total)

        entry.staged = await self._source.stage(entry.version, report)
        entry.settled = False
        if entry.state is State.FETCHING:  # nobody said that the bytes were being checked
            self.books.move(entry, State.VERIFYING)
        if entry.expelled is not None:
            raise entry.expelled
        self._events.adapter_phase("fetch", self._clock() - started)

    def _hear(self, entry: Entry, phase: str, done: int, total: int) -> None:
        """Hear how far the fetching thread is; what comes late does not count."""
        if entry.state not in (State.FETCHING, State.VERIFYING):
            return
        state = State.VERIFYING if phase == "check" else State.FETCHING
        if state is not entry.state:
            self.books.move(entry, state)
        _tell(entry, phase, done, total)

    def _keep(self, entry: Entry) -> None:
        """Stage an adapter that was fetched ahead, or lost its slot.

        Raises:
            AdapterNotReadyError: memory has no room for it.
        """
        assert entry.staged is not None
        size_bytes = entry.held_bytes if entry.settled else entry.staged.size_bytes
        leaving = self.books.out_of_memory(entry, size_bytes)
        if leaving is None:
            raise AdapterNotReadyError(
                f"no memory is left for {entry.version.name}", retry_after_s=RETRY_AFTER_S
            )
        self._displace(leaving)
        entry.reserved, entry.size_bytes = False, size_bytes
        self.books.move(entry, State.STAGED)

    async def _load(self, entry: Entry) -> None:
        assert entry.staged is not None
        if entry.state is not State.LOADING:  # it is already when the engine before died with it
            self.books.move(entry, State.LOADING)
        _tell(entry, "load", entry.staged.size_bytes, entry.staged.size_bytes)
        await self._take_slot(entry)
        if entry.adapter is None:
            await self._hand_over(entry)
        if entry.expelled is not None:
            raise entry.expelled
        self.books.move(entry, State.RESIDENT)
        entry.spared_until = 0.0

    async def _hand_over(self, entry: Entry) -> None:
        """Have the engine read an adapter's bytes; where it keeps them, ours are let go of."""
        assert entry.staged is not None
        lost, started = self.lost, self._clock()
        adapter = EngineAdapter(name=entry.version.name, slot_id=next(self._slot_ids), path=entry.staged.path)
        entry.adapter = adapter
        entry.held_bytes = await self.of_engine(self.engine.load(adapter))
        # Before any request can use it: were these the bytes, and does the engine really have it?
        _, listed = await asyncio.gather(
            self._source.confirm(entry.staged), self.of_engine(self.engine.loaded())
        )
        if adapter.slot_id not in listed:
            raise AdapterNotReadyError(
                f"{adapter.name}: the engine says that it has loaded it, and does not list it",
                retry_after_s=RETRY_AFTER_S,
            )
        self._events.adapter_phase("load", self._clock() - started)
        if self.engine.keeps_bytes:
            entry.settled = True
            await self._source.settle(entry.staged)
        if lost.is_set():  # meanwhile, and the copy went with it
            raise _no_engine()

    async def _take_slot(self, entry: Entry) -> None:
        """Claim a slot, evicting the least recently used idle adapter, or wait until one is idle."""
        books = self.books
        while not books.claim_slot(entry):
            victim = books.out_of_slot()
            if victim is not None:
                await self._remove(victim, Cause.FOR_SLOT)
                continue
            await self.until(
                lambda: (
                    self.lost.is_set() or books.slots_used < books.slots or books.out_of_slot() is not None
                )
            )
            if self.lost.is_set():
                raise _no_engine()

    def _displace(self, leaving: list[Entry]) -> None:
        """Have staged adapters leave; their memory counts as free at once, and is within moments."""
        for entry in leaving:
            self.books.move(entry, State.DRAINING)
            _spawn(self._clear(entry, Tier.MEMORY, Cause.FOR_MEMORY), f"free {entry.version.name}")

    async def _remove(self, entry: Entry, cause: Cause) -> None:
        """Drain, then free. The freeing itself is shielded: half of it must not be left undone."""
        was = entry.state
        self.books.move(entry, State.DRAINING)
        if was is State.RESIDENT:
            try:
                await self.until(lambda: not entry.leases)
            except asyncio.CancelledError:
                self.books.move(entry, State.RESIDENT)
                self.notify()
                raise
        tier = Tier.SLOT if was is State.RESIDENT else Tier.MEMORY
        await asyncio.shield(self._clear(entry, tier, cause))

    async def _clear(self, entry: Entry, tier: Tier | None, cause: Cause) -> None:
        """Free what an adapter holds, then forget it, or stage it when only its slot was wanted."""
        stays = cause is Cause.FOR_SLOT and entry.expelled is None
        if stays and entry.settled:
            entry.slot = False
            if self._kept(entry):  # the engine's copy is what memory holds
                self._events.adapter_gone(Tier.SLOT, cause)
                self.notify()
                return
        try:
            if entry.adapter is not None:
                with contextlib.suppress(EngineUnavailableError):  # one that died has nothing to free
                    await self.of_engine(self.engine.unload(entry.adapter.slot_id))
        finally:
            entry.adapter, entry.slot = None, False
            if tier is not None:
                self._events.adapter_gone(tier, cause)
            if not (stays and not entry.settled and self._kept(entry)):
                await self._forget(entry)
            self.notify()

    def _kept(self, entry: Entry) -> bool:
        try:
            self._keep(entry)
        except AdapterNotReadyError:
            return False
        return True

    async def _forget(self, entry: Entry) -> None:
        try:
            if entry.staged is not None:
                await self._source.discard(entry.staged)
        finally:
            self.books.move(entry, State.GONE)


def _spawn(work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
    task = asyncio.create_task(work, name=name)
    # Everybody may have left when it fails: then nobody else would look at the error.
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return task


def _no_engine() -> EngineUnavailableError:
    return EngineUnavailableError("the engine stopped", retry_after_s=RETRY_AFTER_S)


def _tell(entry: Entry, phase: str, done: int, total: int) -> None:
    for watcher in list(entry.watchers):
        watcher(phase, done, total)
