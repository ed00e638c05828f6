"""From a name to a verified digest, and from a verified digest to bytes on disk.

Promises: what `resolve` returns carries a signature that the trust policy accepts for exactly that tenant,
adapter, version and base model; a tag is asked for again after `tag_ttl_s`; while the store is down, names
resolved within `stale_s_max` keep their meaning, so adapters in memory go on serving. Failures are never
remembered. The registry library is synchronous: its calls run on threads.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

from loraplex_registry.base import BaseModel
from loraplex_registry.errors import StoreUnavailableError
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry, StagedAdapter
from loraplex_registry.trust import TrustPolicy, VerifiedManifest
from loraplex_registry.weights import Limits

CACHED_NAMES_MAX = 10_000

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


class AdapterSource(Protocol):
    """Where residency gets an adapter's bytes."""

    async def stage(self, version: AdapterVersion, progress: Progress) -> StagedAdapter:
        """Fetch, check and lay down the bytes. Raises RegistryError; leaves nothing behind then."""

    async def discard(self, staged: StagedAdapter) -> None:
        """Remove the bytes again."""


class Versions:
    """Resolves names against one registry and one trust policy, for one base model."""

    def __init__(
        self,
        *,
        registry: Registry,
        policy: TrustPolicy,
        base: BaseModel,
        limits: Limits,
        staging_dir: Path,
        tag_ttl_s: float,
        stale_s_max: float,
        fetches_max: int,
        clock: Callable[[], float],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._base = base
        self._limits = limits
        self._staging_dir = staging_dir
        self._tag_ttl_s = tag_ttl_s
        self._stale_s_max = stale_s_max
        self._fetches = asyncio.Semaphore(fetches_max)
        self._clock = clock
        self._now = now
        self._left_behind: dict[str, asyncio.Task[StagedAdapter]] = {}
        self._known: OrderedDict[str, tuple[float, AdapterVersion]] = OrderedDict()

    async def resolve(self, ref: AdapterRef, progress: Progress | None = None) -> AdapterVersion:
        """Turn a reference into a verified version.

        Raises:
            AdapterNotFoundError: nothing committed under that name.
            StoreUnavailableError: the store does not answer and the name is not known well enough.
            RegistryError: the record or its signature was refused; `.code` says why.
        """
        key = str(ref)
        known = self._known.get(key)
        if known and self._clock() - known[0] < self._tag_ttl_s:
            return known[1]
        try:
            version = await asyncio.to_thread(self._resolve, ref, progress or _silent)
        except StoreUnavailableError:
            if known and self._clock() - known[0] < self._stale_s_max:
                return known[1]
            raise
        except Exception:
            self._known.pop(key, None)
            raise
        self._remember(key, version)
        return version

    def _resolve(self, ref: AdapterRef, progress: Progress) -> AdapterVersion:
        progress("resolve", 0, 0)
        resolved = self._registry.resolve(ref)
        progress("verify", 0, 0)
        verified = self._registry.verify(
            resolved, self._policy, base_digest=self._base.digest, now=self._now()
        )
        manifest = verified.manifest
        return AdapterVersion(
            name=f"{manifest.tenant}/{manifest.adapter}@{manifest.digest}",
            tenant=manifest.tenant,
            adapter=manifest.adapter,
            version=str(manifest.version),
            digest=manifest.digest,
            verified=verified,
        )

    def _remember(self, key: str, version: AdapterVersion) -> None:
        self._known[key] = (self._clock(), version)
        self._known.move_to_end(key)
        while len(self._known) > CACHED_NAMES_MAX:
            self._known.popitem(last=False)

    async def stage(self, version: AdapterVersion, progress: Progress) -> StagedAdapter:
        """Bring a verified version's bytes into a read-only directory named by its digest.

        A thread cannot be stopped: a fetch whose caller left goes on, is taken over by the next caller for the same
        digest, and is removed if none comes.

        Raises:
            RegistryError: the bytes are not the signed ones, do not fit the base, or the store failed.
        """
        fetch = self._left_behind.pop(version.digest, None)
        if fetch is None:
            fetch = asyncio.create_task(self._fetch(version, progress), name=f"fetch {version.name}")
        try:
            return await asyncio.shield(fetch)
        except asyncio.CancelledError:
            self._left_behind[version.digest] = fetch
            fetch.add_done_callback(partial(self._clear_up, version.digest))
            raise

    async def _fetch(self, version: AdapterVersion, progress: Progress) -> StagedAdapter:
        async with self._fetches:
            return await asyncio.to_thread(
                self._registry.fetch,
                version.verified,
                self._staging_dir,
                base=self._base,
                limits=self._limits,
                progress=progress,
            )

    def _clear_up(self, digest: str, fetch: "asyncio.Task[StagedAdapter]") -> None:
        if self._left_behind.get(digest) is not fetch:
            return  # somebody took it over
        del self._left_behind[digest]
        if not fetch.cancelled() and fetch.exception() is None:
            remove_staged(fetch.result().path)

    async def discard(self, staged: StagedAdapter) -> None:
        """Remove a staged directory; removing it twice does nothing."""
        await asyncio.to_thread(remove_staged, staged.path)


def remove_staged(path: Path) -> None:
    """Delete one staged directory, which is read-only on purpose."""
    if not path.is_dir():
        return
    path.chmod(0o700)
    for item in path.iterdir():
        item.unlink()
    path.rmdir()


def clear_staging(directory: Path) -> None:
    """Empty a staging directory at start: what an earlier process left belongs to no slot."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for item in directory.iterdir():
        if item.is_dir():
            remove_staged(item)
        else:
            item.unlink()


def _silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
