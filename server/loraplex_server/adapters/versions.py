"""From a name to a verified digest, and from a verified digest to bytes on disk.

Promises: what `resolve` returns carries a signature that the trust policy accepts for exactly that tenant,
adapter, version and base model; what a tag meant was asked of the store at most `tag_ttl_s` before the call, once for
all who ask at the same time and without a body while it has not moved, and its dates, marks and revocations are judged
by the time of now; while the store is down, names resolved within `stale_s_max` keep their meaning, so adapters in
memory go on serving.
Failures are never remembered. The bytes an engine is given are the verified ones, sealed, for as long as it may read
them; on disk they stay in a cache that other servers share. The registry library is synchronous: its calls run on
threads.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from loraplex_registry.delivery.cache import Cache
from loraplex_registry.delivery.handoff import Handoff, hand_off
from loraplex_registry.errors import PolicyRefusedError, SettingsError, StoreUnavailableError, TrustError
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry, Resolved, StagedAdapter
from loraplex_registry.trust.verdict import CHECKS, Trace, VerifiedManifest
from loraplex_registry.trust.verifier import Verifier
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import WEIGHTS_NAME, Limits

CACHED_NAMES_MAX = 10_000
_log = logging.getLogger(__name__)

# Called with a phase ("resolve", "verify", "fetch", "check") and the bytes done and expected so far.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AdapterVersion:
    """A verified adapter version; only `Versions.resolve` makes one.

    Attributes:
        name: "tenant/adapter@sha256:<hex>", the name under which everything else knows it.
    """

    name: str
    tenant: str
    adapter: str
    version: str
    digest: str
    verified: VerifiedManifest

    @property
    def rank(self) -> int:
        """Largest rank of any module."""
        return self.verified.manifest.lora.rank

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights file."""
        return self.verified.manifest.file(WEIGHTS_NAME).size


class AdapterSource(Protocol):
    """Where residency gets an adapter's bytes."""

    async def stage(self, version: AdapterVersion, progress: Progress) -> StagedAdapter:
        """Fetch, check and lay out the bytes. Raises RegistryError; leaves nothing behind then."""

    async def confirm(self, staged: StagedAdapter) -> None:
        """Raise RegistryError if what the engine has just read may not be what was checked."""

    async def settle(self, staged: StagedAdapter) -> None:
        """Let go of the bytes in memory, which the engine holds now; what is on disk is kept for `stage`."""

    async def discard(self, staged: StagedAdapter) -> None:
        """Let go of the bytes; the engine will not read them again."""

    def pieces(self, staged: StagedAdapter) -> int:
        """Pieces that `recheck` looks at; 0 when the bytes were let go of."""

    async def recheck(self, staged: StagedAdapter, piece: int) -> float:
        """Look at a piece of the bytes again; the processor time it took, in seconds. Raises DigestMismatchError."""


class NoSource:
    """Stands where a registry would: nothing resolves without one, so nothing is ever staged."""

    async def stage(self, version: AdapterVersion, progress: Progress) -> StagedAdapter:  # noqa: ARG002
        """See `AdapterSource.stage`."""
        raise AssertionError("no registry, yet an adapter was resolved")

    async def confirm(self, staged: StagedAdapter) -> None:
        """Nothing was staged."""

    async def settle(self, staged: StagedAdapter) -> None:
        """Nothing was staged."""

    async def discard(self, staged: StagedAdapter) -> None:
        """Nothing was staged."""

    def pieces(self, staged: StagedAdapter) -> int:  # noqa: ARG002
        """Nothing was staged."""
        return 0

    async def recheck(self, staged: StagedAdapter, piece: int) -> float:  # noqa: ARG002
        """Nothing was staged."""
        return 0.0


@dataclass(frozen=True)
class _Known:
    """What a name meant when it was asked for last, and what the store said then."""

    asked_s: float
    version: AdapterVersion
    resolved: Resolved


@dataclass
class _Flight:
    """One question to the store about one name, with everyone who waits for its answer.

    Attributes:
        asked_s: when it went out; None until then.
        store_away: the store did not answer it; whoever asked again would only wait again.
    """

    task: "asyncio.Task[AdapterVersion]"
    asked_s: float | None = None
    store_away: bool = False

    def answers(self, earliest_s: float) -> bool:
        """Whether a call to which `earliest_s` is old enough may take the answer."""
        return self.store_away or self.asked_s is None or self.asked_s >= earliest_s


class Versions:
    """Resolves names with one verifier (registry, trust policy, what was seen before), for one base model."""

    def __init__(
        self,
        *,
        registry: Registry,
        verifier: Verifier,
        base: BaseModel,
        limits: Limits,
        cache: Cache,
        sealed: bool = True,
        tag_ttl_s: float,
        stale_s_max: float,
        fetches_max: int,
        fetch_s_max: float = 3600.0,
        clock: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._verifier = verifier
        self._base = base
        self._limits = limits
        self._cache = cache
        self._sealed = sealed
        self._tag_ttl_s = tag_ttl_s
        self._stale_s_max = stale_s_max
        self._fetch_s_max = fetch_s_max
        self._fetches = asyncio.Semaphore(fetches_max)
        self._clock = clock
        self._left_behind: dict[str, asyncio.Task[Handoff]] = {}
        self._handoffs: dict[str, Handoff] = {}  # by the digest; residency stages a digest once at a time
        self._settled: set[str] = set()  # digests of those whose bytes an engine holds instead
        self._flights: dict[str, _Flight] = {}
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def resolve(self, ref: AdapterRef, progress: Progress | None = None) -> AdapterVersion:
        """Turn a reference into a verified version.

        Raises:
            AdapterNotFoundError: nothing committed under that name.
            StoreUnavailableError: the store does not answer and the name is not known well enough.
            RegistryError: the record or its signature was refused; `.code` says why.
        """
        key, earliest_s = str(ref), self._clock() - self._tag_ttl_s
        known = self._known.get(key)
        if known and known.asked_s > earliest_s:
            return known.version
        while True:  # twice at most: the second flight goes out after this call came in
            flight = self._flights.get(key)
            if flight is None or flight.task.done():  # one that has just landed may still stand there
                flight = self._flights[key] = self._take_off(key, ref, progress or _silent)
            elif progress is not None:
                progress("resolve", 0, 0)
            try:
                version = await asyncio.shield(flight.task)  # a caller that leaves takes nobody's answer away
            except Exception:
                if flight.answers(earliest_s):
                    raise
            else:
                if flight.answers(earliest_s):
                    return version

    def _take_off(self, key: str, ref: AdapterRef, progress: Progress) -> _Flight:
        flight = _Flight(asyncio.create_task(self._ask(key, ref, progress), name=f"resolve {key}"))
        flight.task.add_done_callback(partial(self._landed, key, flight))
        return flight

    async def _ask(self, key: str, ref: AdapterRef, progress: Progress) -> AdapterVersion:
        before, flight = self._known.get(key), self._flights[key]
        try:
            known = await asyncio.to_thread(self._resolve, ref, before, flight, progress)
        except StoreUnavailableError:
            flight.store_away = True
            before = self._known.get(key)  # it may have been forgotten meanwhile
            if before and self._clock() - before.asked_s < self._stale_s_max:
                return before.version
            raise
        except Exception:
            self._known.pop(key, None)
            raise
        self._remember(key, known)
        return known.version

    def _landed(self, key: str, flight: _Flight, task: "asyncio.Task[AdapterVersion]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not task.cancelled():
            task.exception()  # every caller may have left; then nobody else asks for it

    def _resolve(self, ref: AdapterRef, before: _Known | None, flight: _Flight, progress: Progress) -> _Known:
        """Ask whether a name means what it meant, and decide about what it means by the time of now."""
        asked_s = flight.asked_s = self._clock()
        progress("resolve", 0, 0)

        def told(check: str, outcome: str, detail: str) -> None:  # noqa: ARG001
            if check == CHECKS[0]:
                progress("verify", 0, 0)

        resolved = self._verifier.resolve(ref, before.resolved if before else None)
        return _Known(asked_s, self._decided(resolved, told), resolved)

    def _decided(self, resolved: Resolved, trace: Trace) -> AdapterVersion:
        verified = self._verifier.decide(resolved, base_digest=self._base.digest, trace=trace)
        manifest = verified.manifest
        return AdapterVersion(
            name=f"{manifest.tenant}/{manifest.adapter}@{manifest.digest}",
            tenant=manifest.tenant,
            adapter=manifest.adapter,
            version=str(manifest.version),
            digest=manifest.digest,
            verified=verified,
        )

    async def verify(self, ref: AdapterRef, trace: Trace) -> AdapterVersion:
        """Resolve and verify now, whatever is known of the name, telling every check.

        Raises:
            As `resolve`.
        """
        return await asyncio.to_thread(lambda: self._decided(self._verifier.resolve(ref, None), trace))

    async def try_out(self, version: AdapterVersion) -> StagedAdapter:
        """Fetch and check a verified version's bytes as `stage` does, and let go of them; its path is gone already.

        Raises:
            As `stage`.
        """
        handoff = await self._fetch(version, _silent)
        await asyncio.to_thread(handoff.close)
        return handoff.staged

    async def reconsider(self, version: AdapterVersion) -> None:
        """Decide again about a version that was verified before, by the revocation list and the time of now.

        Raises:
            TrustError: it must not be used any more; what its names meant is forgotten.
            StoreUnavailableError: nobody knows.
        """
        found = version.verified
        resolved = Resolved(found.ref, found.manifest.version, found.digest, found.record)
        try:
            await asyncio.to_thread(self._verifier.decide, resolved, base_digest=self._base.digest)
        except TrustError:
            for key in [key for key, known in self._known.items() if known.version.digest == version.digest]:
                del self._known[key]
            raise

    def _remember(self, key: str, known: _Known) -> None:
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > CACHED_NAMES_MAX:
            self._known.popitem(last=False)

    async def stage(self, version: AdapterVersion, progress: Progress) -> StagedAdapter:
        """Bring a verified version's bytes to a path that an engine may load until `discard`.

        A thread cannot be stopped: a fetch whose caller left goes on, is taken over by the next caller for the same
        digest, and is let go if none comes; its bytes stay in the cache.

        Raises:
            RegistryError: the bytes are not the signed ones, do not fit the base, or the store failed.
            PolicyRefusedError: they are encrypted, and the server has no key that opens them.
        """
        fetch = self._left_behind.pop(version.digest, None)
        if fetch is None:
            fetch = asyncio.create_task(self._fetch(version, progress), name=f"fetch {version.name}")
        try:
            handoff = await asyncio.shield(fetch)
        except asyncio.CancelledError:
            self._left_behind[version.digest] = fetch
            fetch.add_done_callback(partial(self._clear_up, version.digest))
            raise
        before = self._handoffs.get(version.digest)
        self._handoffs[version.digest] = handoff
        self._settled.discard(version.digest)
        if before is not None:  # settled; until now it kept the entry in the cache
            await asyncio.to_thread(before.close)
        return handoff.staged

    async def _fetch(self, version: AdapterVersion, progress: Progress) -> Handoff:
        async with self._fetches:
            try:
                return await asyncio.to_thread(
                    hand_off,
                    self._registry,
                    version.verified,
                    self._cache,
                    base=self._base,
                    limits=self._limits,
                    sealed=self._sealed,
                    progress=progress,
                    deadline_s=self._fetch_s_max,  # so that a store that drips does not hold a thread for ever
                )
            except SettingsError as error:
                # An encryption key of the server's that is absent or cannot be used: the operator learns which.
                _log.error("%s cannot be opened: %s", version.name, error)
                raise PolicyRefusedError(
                    f"This server has no usable key that opens {version.name}; its operator must set "
                    "registry.encryption_key."
                ) from error

    def _clear_up(self, digest: str, fetch: "asyncio.Task[Handoff]") -> None:
        if self._left_behind.get(digest) is not fetch:
            return  # somebody took it over
        del self._left_behind[digest]
        if not fetch.cancelled() and fetch.exception() is None:
            fetch.result().close()

    async def confirm(self, staged: StagedAdapter) -> None:
        """Call after the engine has loaded `staged.path`.

        Raises:
            DigestMismatchError: somebody changed the path meanwhile; the engine must drop what it read.
        """
        await asyncio.to_thread(self._handoffs[staged.digest].confirm)

    def pieces(self, staged: StagedAdapter) -> int:
        """See `AdapterSource.pieces`."""
        handoff = self._handoffs.get(staged.digest)
        here = handoff is not None and handoff.staged is staged and staged.digest not in self._settled
        return handoff.pieces if handoff and here else 0

    async def recheck(self, staged: StagedAdapter, piece: int) -> float:
        """Look at a piece of what was staged again.

        Returns:
            Processor time, in seconds.

        Raises:
            DigestMismatchError: it changed, or was let go of meanwhile.
        """
        handoff = self._handoffs[staged.digest]

        def look() -> float:
            started = time.thread_time()
            handoff.recheck(piece)
            return time.thread_time() - started

        return await asyncio.to_thread(look)

    async def settle(self, staged: StagedAdapter) -> None:
        """Let go of the sealed bytes of an adapter that an engine holds; its entry stays in the cache."""
        self._settled.add(staged.digest)
        await asyncio.to_thread(self._handoffs[staged.digest].settle)

    async def discard(self, staged: StagedAdapter) -> None:
        """Let go of a path; what is on disk stays in the cache. Doing it twice does nothing."""
        self._settled.discard(staged.digest)
        handoff = self._handoffs.pop(staged.digest, None)
        if handoff is not None:
            await asyncio.to_thread(handoff.close)

    def close(self) -> None:
        """Let go of every path; call it when the engine has ended."""
        while self._handoffs:
            self._handoffs.popitem()[1].close()


def _silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
