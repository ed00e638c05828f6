"""From a verified version to a path an engine may load, by way of the cache on disk.

Promises of `hand_off`:

- an entry of the cache is checked before it is used: its configuration byte for byte against the one that follows from
  the signed one, its weights against the signed digests of their chunks, its shapes against this base and these limits;
  a wrong one is removed and fetched anew, never handed on;
- the entry stays in the cache, leased, until `Handoff.close`;
- sealed (the default): the engine reads memory that nobody can change, and `Handoff.confirm` tells afterwards whether
  its path led there all the time. Not sealed: the engine reads the entry's own files; `confirm` finds files that were
  replaced or rewritten meanwhile, but not a writer who had one mapped into memory before, nor a whole directory that
  was swapped out and back;
- the plaintext of an encrypted version never lies on a disk: it is always sealed, and not kept. (Memory may be swapped
  out; use encrypted swap or none.)

Why sealed memory is the default: docs/adr/0002-verified-bytes.md.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import DigestMismatchError, RegistryError, StoreUnavailableError, UnsupportedAdapterError
from ..format.hashing import chunk_digest
from ..format.manifest import FileEntry
from ..registry import Registry
from ..trust.verdict import VerifiedManifest
from ..validation.base import BaseModel, Progress
from ..validation.lora_config import CONFIG_NAME, AdapterConfig, read_config
from ..validation.weights import WEIGHTS_NAME, Limits, check_weights
from .cache import Cache, Lease
from .download import matches
from .fetch import StagedAdapter
from .private_dirs import declared, is_at
from .sealed import SealedDirectory, SealedFile, wait_past

DEADLINE_S: Final = 3600.0
"""Longest time a hand-over takes unless the caller says otherwise, in seconds."""

_ATTEMPTS_MAX: Final = 3


class Handoff:
    """A verified adapter that an engine may load from `staged.path`, until `close`."""

    def __init__(
        self,
        staged: StagedAdapter,
        guard: SealedDirectory | _Files,
        held: contextlib.ExitStack,
        config: bytes,
    ) -> None:
        self.staged = staged
        self._guard = guard
        self._config = config
        self._held = held
        self._lease: Lease | None = None

    def keep(self, lease: Lease) -> Handoff:
        """Hold this lease until `close`, and return the same object."""
        self._lease = lease
        return self

    def confirm(self) -> None:
        """Call this after the engine has read everything, and drop what it read if this raises.

        Raises:
            DigestMismatchError: what the engine read may not be what was verified.
        """
        self._guard.confirm()

    @property
    def pieces(self) -> int:
        """Pieces that `recheck` looks at: the signed chunks of the weights."""
        return len(self.staged.manifest.file(WEIGHTS_NAME).chunk_digests)

    def recheck(self, piece: int) -> None:
        """Look again at one piece, of 8 MiB at most; the first looks at the path and the configuration too.

        For idle moments: memory fails, and files on a disk can be changed by whoever may write there.

        Args:
            piece: from 0 to `pieces`, exclusive.

        Raises:
            DigestMismatchError: it is not what was verified any more, or was closed meanwhile.
        """
        weights = self.staged.manifest.file(WEIGHTS_NAME)
        try:
            right = True
            if piece == 0:
                self.confirm()
                right = (self.staged.path / CONFIG_NAME).read_bytes() == self._config
            with (self.staged.path / WEIGHTS_NAME).open("rb") as file:
                found = chunk_digest(file.fileno(), piece, size_bytes=weights.size)
            right = right and found == weights.chunk_digests[piece]
        except OSError as error:
            raise DigestMismatchError(f"{self.staged.path} cannot be read any more.") from error
        if not right:
            raise DigestMismatchError(f"The bytes of {self.staged.digest} changed after they were verified.")

    def settle(self) -> None:
        """Let go of memory and links, and keep the entry in the cache: whoever read it all holds it now.

        The path leads nowhere any more where it was sealed. May be called twice.
        """
        self._held.close()

    def close(self) -> None:
        """Let go of memory, links and lease; the engine must not open the path any more. May be called twice."""
        self._held.close()
        if self._lease is not None:
            self._lease.close()


def hand_off(
    registry: Registry,
    verified: VerifiedManifest,
    cache: Cache,
    *,
    base: BaseModel,
    limits: Limits | None = None,
    sealed: bool = True,
    progress: Progress | None = None,
    deadline_s: float = DEADLINE_S,
) -> Handoff:
    """Bring a verified version's bytes to where an engine can load them; see the module. Blocks; safe from threads.

    Args:
        registry: where it is fetched from if the cache has no right copy.
        verified: from `Registry.verify`.
        cache: where fetched bytes are kept.
        base: the base that will serve it.
        limits: default `Limits()`.
        sealed: False hands on the entry's own directory instead; ignored for an encrypted version.
        progress: phases "fetch" and "check".
        deadline_s: longest time for everything, in seconds, seen at every piece that arrives: a store that drips is
            left alone. One that sends nothing at all ends by the store's own timeout.

    Raises:
        BaseMismatchError, RankTooLargeError, UnsupportedAdapterError: it does not fit here.
        DigestMismatchError, DamagedError: the bytes are not the signed ones, or somebody changes them in the cache.
        StoreUnavailableError, StoreRefusedError: the storage, the disk or memory; the cache stays usable.
    """
    limits = limits or Limits()
    manifest = verified.manifest
    base.require(manifest.base_model.digest, what=str(verified.ref))
    if manifest.file(WEIGHTS_NAME).size > limits.max_bytes:
        raise UnsupportedAdapterError(
            f"{WEIGHTS_NAME} has {manifest.file(WEIGHTS_NAME).size} bytes, the limit is {limits.max_bytes}."
        )
    job = _Job(registry, verified, cache, base, limits, _watched(progress, deadline_s))
    try:
        return _handed_off(job, cache, sealed=sealed)
    except _LateError as error:
        raise StoreUnavailableError(
            f"{verified.ref} was not here after {deadline_s:g} s; the storage is too slow, try again."
        ) from error


def _handed_off(job: _Job, cache: Cache, *, sealed: bool) -> Handoff:
    if job.encrypted:
        return job.from_memory()
    for attempt in range(_ATTEMPTS_MAX):
        lease = job.obtain()
        try:
            return job.sealed(lease) if sealed else job.in_place(lease)
        except DigestMismatchError:
            cache.discard(lease)
            if attempt + 1 == _ATTEMPTS_MAX:
                raise
        except BaseException:
            lease.close()
            raise
    raise AssertionError("the loop returns or raises")


class _Job:
    """One hand-over: what it needs, and the steps."""

    def __init__(
        self,
        registry: Registry,
        verified: VerifiedManifest,
        cache: Cache,
        base: BaseModel,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._registry = registry
        self._verified = verified
        self._cache = cache
        self._base = base
        self._limits = limits
        self._progress = progress
        self._weights: FileEntry = verified.manifest.file(WEIGHTS_NAME)
        self._config: AdapterConfig | None = None

    def obtain(self) -> Lease:
        """Lease the entry, fetching it if there is none."""
        size = self._weights.size + len(self.config.to_json())
        return self._cache.obtain(
            self._verified.digest, size_bytes=size, make=lambda place: self._fetch(place).path
        )

    def sealed(self, lease: Lease) -> Handoff:
        """Copy an entry into sealed memory and check it there."""
        if lease.names() != [CONFIG_NAME, WEIGHTS_NAME]:
            raise self._wrong(lease)
        with lease.open(WEIGHTS_NAME) as source, contextlib.ExitStack() as held:
            return self._sealed_from(source, held).keep(lease)

    def in_place(self, lease: Lease) -> Handoff:
        """Check an entry where it lies and hand on its own path."""
        self._report(0)
        try:
            files = _Files(lease)
        except OSError as error:
            raise self._wrong(lease) from error
        with lease.open(CONFIG_NAME) as file:
            right = lease.names() == [CONFIG_NAME, WEIGHTS_NAME] and _holds(file, self.config.to_json())
        with lease.open(WEIGHTS_NAME) as file:
            # A fresh entry too: its maker checked it before `files` was there to see changes.
            if not (right and matches(file.fileno(), self._weights)):
                raise self._wrong(lease)
            check_weights(file, self.config, self._base, self._limits)
        self._report(self._weights.size)
        return Handoff(self._staged(lease.path), files, contextlib.ExitStack(), self.config.to_json()).keep(
            lease
        )

    def from_memory(self) -> Handoff:
        """Fetch a version whose plaintext must not touch a disk, straight into memory."""
        with contextlib.ExitStack() as held:
            weights = held.enter_context(SealedFile(WEIGHTS_NAME))
            try:
                self._config = self._registry.fetch_into(
                    self._verified,
                    weights.descriptor,
                    base=self._base,
                    limits=self._limits,
                    progress=self._progress,
                )
            except OSError as error:
                raise StoreUnavailableError(
                    f"No memory for {self._verified.ref} ({error.strerror})."
                ) from error
            return self._laid_out(weights, held)

    @property
    def encrypted(self) -> bool:
        """Whether the plaintext must not touch a disk."""
        return self._verified.record.encryption is not None

    @property
    def config(self) -> AdapterConfig:
        """The checked settings, read from the signed configuration."""
        if self._config is None:
            signed = self._registry.read_file(self._verified, CONFIG_NAME)
            self._config = read_config(signed, rank_max=self._limits.max_rank)
        return self._config

    def _fetch(self, place: Path) -> StagedAdapter:
        # Not `place` itself: it is locked by us, and `fetch` locks the root it is given.
        return self._registry.fetch(
            self._verified, place / "fetch", base=self._base, limits=self._limits, progress=self._progress
        )

    def _sealed_from(self, source: BinaryIO, held: contextlib.ExitStack) -> Handoff:
        weights = held.enter_context(SealedFile(WEIGHTS_NAME))
        weights.copy(source, size_bytes=self._weights.size)
        return self._laid_out(weights, held)

    def _laid_out(self, weights: SealedFile, held: contextlib.ExitStack) -> Handoff:
        """Seal what was written, check it, and give it a path."""
        weights.seal()
        config = held.enter_context(SealedFile(CONFIG_NAME))
        config.write(self.config.to_json())
        config.seal()
        place, descriptor = held.enter_context(self._cache.workplace())
        self._report(0)
        name = self._verified.digest.replace(":", "-")
        with declared(self._cache.root):
            directory = SealedDirectory(place, descriptor, name, {CONFIG_NAME: config, WEIGHTS_NAME: weights})
            weights.check(self._weights)
            directory.watch()
        with weights.open() as file:
            # Another server with other limits or another base may have put it into the cache.
            check_weights(file, self.config, self._base, self._limits)
        self._report(self._weights.size)
        return Handoff(self._staged(directory.path), directory, held.pop_all(), self.config.to_json())

    def _report(self, done: int) -> None:
        self._progress("check", done, self._weights.size)

    def _staged(self, path: Path) -> StagedAdapter:
        manifest = self._verified.manifest
        size = self._weights.size + len(self.config.to_json())
        return StagedAdapter(self._verified.digest, path, manifest, size, manifest.lora.rank)

    def _wrong(self, lease: Lease) -> DigestMismatchError:
        return DigestMismatchError(
            f"{lease.path} does not hold {self._verified.ref} as signed; it is fetched anew."
        )


class _Files:
    """The files of an entry as they were before they were checked."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._before = self._look()
        wait_past(max((changed_ns for _, _, changed_ns in self._before.values()), default=0))
        if self._look() != self._before:
            raise DigestMismatchError(f"{lease.path} is being changed; look who writes in the cache.")

    def confirm(self) -> None:
        """Raise DigestMismatchError unless the entry is where it was and its files are the same, never changed."""
        try:
            unchanged = is_at(self._lease.path, self._lease.descriptor) and self._look() == self._before
        except OSError:
            unchanged = False
        if not unchanged:
            raise DigestMismatchError(
                f"{self._lease.path} was changed while an engine read it; look who writes in the cache."
            )

    def _look(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        for name in self._lease.names():
            status = os.stat(name, dir_fd=self._lease.descriptor, follow_symlinks=False)
            found[name] = (status.st_ino, status.st_size, status.st_ctime_ns)
        return found


class _LateError(RegistryError):
    """The deadline has passed. Never leaves this module."""


def _watched(progress: Progress | None, deadline_s: float) -> Progress:
    until = time.monotonic() + deadline_s

    def tell(phase: str, done: int, total: int) -> None:
        if time.monotonic() > until:
            raise _LateError("late")
        if progress is not None:
            progress(phase, done, total)

    return tell


def _holds(file: BinaryIO, body: bytes) -> bool:
    return file.read(len(body) + 1) == body
