"""The cache on disk: directories named by a digest, shared by any number of processes, capped by size.

```
<root>/                     0700, ours, not a link
  sha256-<hex>/             one entry: a few read-only files; its mtime is the last use
  .tmp-<hex>-<bytes>/       one download at work, locked by who works in it; the size is the room it has claimed
  .tmp-<random>/            an entry on its way out, or another user's work
```

Promises, for threads and processes alike:

- an entry appears by one rename, complete; one that is a link, belongs to somebody else, or can be written by others is
  removed, never opened;
- `obtain` of one digest by many makes it once: the others wait for the one that works;
- the least recently used entries go first, until the total is within the cap; an entry that somebody holds a lease on
  never goes, even when the leased ones alone exceed the cap;
- SIGKILL at any moment leaves at most unlocked `.tmp-` directories, which the next user sweeps.

It does not know what the right bytes are: who opens a lease checks them, and gives a wrong entry to `discard`.

Locks are `flock`, which the kernel drops when a process dies: shared on an entry's directory (a lease), exclusive on a
`.tmp-` directory (its owner), exclusive on the root for the few steps that move entries in or out. Clocks only order
evictions. Network file systems without `flock` between machines are not supported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..errors import StoreUnavailableError
from ..refs import check_digest
from .cache_entries import CacheEntry, Lease, claimed_bytes, is_leased, list_entries, touch
from .private_dirs import (
    DIRECTORY_FLAGS,
    NOT_A_DIRECTORY,
    TEMPORARY,
    claim,
    declared,
    is_at,
    is_private,
    private_root,
    remove_tree,
    says_disk_full,
    sweep,
    temporary_name,
)

CACHE_BYTES_MAX: Final = 20 << 30
"""Default cap of a cache, in bytes (20 GiB)."""

WAIT_S_MAX: Final = 600.0
"""Longest wait for another process that downloads the same digest, in seconds."""

_PUBLISH_ATTEMPTS: Final = 8

__all__ = ["CACHE_BYTES_MAX", "Cache", "CacheEntry", "Lease", "default_cache_root"]

Make = Callable[[Path], Path]
"""Called with an empty private directory; makes the entry's directory below it and returns that directory."""


class Cache:
    """A cache directory; see the module. Objects are cheap and hold nothing open; any number may share a root."""

    def __init__(
        self, root: str | Path, *, max_bytes: int = CACHE_BYTES_MAX, wait_s: float = WAIT_S_MAX
    ) -> None:
        """Open or make the directory.

        Args:
            root: made with mode 0700 when absent.
            max_bytes: cap on the bytes of all entries; 0 keeps only what is leased.
            wait_s: longest wait for another download of the same digest, in seconds.

        Raises:
            SettingsError: the root is a link, belongs to another user, or others may enter it.
            StoreUnavailableError: it cannot be made or opened.
        """
        self.root = Path(root).absolute()
        self.max_bytes = max_bytes
        self._wait_s = wait_s
        with declared(self.root), private_root(self.root):
            pass

    def lease(self, digest: str) -> Lease | None:
        """Return a lease on an entry, or None when there is none. The bytes are the caller's to check.

        Raises:
            StoreUnavailableError, SettingsError: the directory cannot be used.
        """
        path = self._path(digest)
        with declared(self.root):
            try:
                descriptor = os.open(path, DIRECTORY_FLAGS)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno not in NOT_A_DIRECTORY:
                    raise
                self._remove_entry(path, None)  # a link or a file where a directory belongs
                return None
            try:
                held = self._lock_entry(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if held:
                return Lease(digest, path, descriptor, fresh=False, given_back=self.prune)
            os.close(descriptor)
            return None

    def obtain(self, digest: str, *, size_bytes: int, make: Make) -> Lease:
        """Return a lease on an entry, made now if it is not there; of many who ask at once one makes it.

        Args:
            digest: `sha256:<hex>`.
            size_bytes: expected size; older entries go first to make room for it.
            make: see `Make`; whatever it raises is passed on, and nothing of its work stays.

        Raises:
            StoreUnavailableError: the disk is full or failing, or another process has been busy with this digest
                for longer than `wait_s`. The cache stays usable.
        """
        path = self._path(digest)
        for _ in range(_PUBLISH_ATTEMPTS):
            lease = self.lease(digest)
            if lease is not None:
                return lease
            with self._flight(digest, size_bytes) as place:
                lease = self.lease(digest)
                if lease is not None:
                    return lease
                self.sweep()
                self._evict(self.max_bytes)
                lease = self._publish(digest, path, self._made(make, place))
            if lease is not None:
                self.prune()
                return lease
        raise StoreUnavailableError(f"{path} keeps changing hands; look who else writes there.")

    def discard(self, lease: Lease) -> None:
        """Remove a leased entry because its bytes are wrong, and close the lease.

        Other holders of the same entry lose its path. A right entry that took its place meanwhile stays.

        Raises:
            StoreUnavailableError: it cannot be moved away.
        """
        try:
            with declared(self.root):
                self._remove_entry(lease.path, os.fstat(lease.descriptor))
        finally:
            lease.close()

    def entries(self) -> list[CacheEntry]:
        """Return every entry, least recently used first.

        Raises:
            StoreUnavailableError, SettingsError: the directory cannot be read.
        """
        with self._moving():
            return [
                replace(entry, leased=is_leased(self._path(entry.digest)))
                for entry in list_entries(self.root)
            ]

    def prune(self, max_bytes: int | None = None) -> list[CacheEntry]:
        """Evict least recently used entries down to `max_bytes` (default: the cap) and return them.

        Entries in use stay; downloads at work count as entries of their size.

        Raises:
            StoreUnavailableError, SettingsError: the directory cannot be used.
        """
        self.sweep()
        with declared(self.root):
            return self._evict(self.max_bytes if max_bytes is None else max_bytes)

    def sweep(self) -> int:
        """Remove the `.tmp-` directories that nobody holds, left by processes that died, and return their number."""
        with declared(self.root), private_root(self.root):
            return sweep(self.root)

    @contextlib.contextmanager
    def workplace(self) -> Iterator[tuple[Path, int]]:
        """Yield a new private directory and its descriptor, removed at the end or swept after a crash."""
        path = self.root / temporary_name()
        with self._temporary(path, wait_s=1.0) as descriptor:
            yield path, descriptor

    def _path(self, digest: str) -> Path:
        check_digest(digest)
        return self.root / digest.replace(":", "-")

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """Hold the root's lock: entries come and go only under it."""
        with declared(self.root), private_root(self.root) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _temporary(self, path: Path, *, wait_s: float) -> Iterator[int]:
        """Hold a temporary of this name, removed at the end."""
        with declared(self.root):
            with private_root(self.root):
                descriptor = claim(path, wait_s=wait_s)
            try:
                yield descriptor
            finally:
                remove_tree(path)
                os.close(descriptor)

    def _lock_entry(self, path: Path, descriptor: int) -> bool:
        """Take the shared lock; False when the entry is on its way out, or was not private and has been removed."""
        found = os.fstat(descriptor)
        if not is_private(found):
            self._remove_entry(path, found)
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # held exclusively for moments only: see _evicted
        if not is_at(path, descriptor):  # evicted between open and lock
            return False
        touch(descriptor)
        return True

    @contextlib.contextmanager
    def _flight(self, digest: str, size_bytes: int) -> Iterator[Path]:
        """Be the only one who makes this digest; the directory yielded is empty and gone afterwards."""
        path = self.root / f"{TEMPORARY}{digest.partition(':')[2]}-{size_bytes:d}"
        with self._temporary(path, wait_s=self._wait_s):
            for leftover in os.listdir(path):  # of a process that died here
                remove_tree(path / leftover)
            yield path

    def _made(self, make: Make, place: Path) -> Path:
        """Run `make`; when the disk is full, once more after everything idle was evicted."""
        try:
            return make(place)
        except (StoreUnavailableError, OSError) as error:
            if not says_disk_full(error) or not self._evict(0):
                raise
            for leftover in os.listdir(place):
                remove_tree(place / leftover)
            return make(place)

    def _publish(self, digest: str, path: Path, made: Path) -> Lease | None:
        """Move a finished directory under its name, leased before anybody can see it; None when one is there."""
        made.chmod(0o700)  # a directory that changes its parent must be writable itself
        descriptor = os.open(made, DIRECTORY_FLAGS)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            touch(descriptor)
            with self._moving():
                published = _renamed(made, path)
            os.fchmod(descriptor, 0o555)
        except BaseException:
            os.close(descriptor)
            raise
        if not published:
            os.close(descriptor)
            return None
        return Lease(digest, path, descriptor, fresh=True, given_back=self.prune)

    def _remove_entry(self, path: Path, found: os.stat_result | None) -> None:
        """Move an entry out of the way, whoever holds it, if it is still the one that was found, and delete it."""
        grave = self.root / temporary_name()
        with self._moving():
            try:
                now = os.lstat(path)
            except FileNotFoundError:
                return
            if found is not None and (now.st_dev, now.st_ino) != (found.st_dev, found.st_ino):
                return
            os.rename(path, grave)
        remove_tree(grave)

    def _evict(self, max_bytes: int) -> list[CacheEntry]:
        graves: list[Path] = []
        gone: list[CacheEntry] = []
        with self._moving():
            entries = list_entries(self.root)
            total = sum(entry.size_bytes for entry in entries) + claimed_bytes(self.root)
            for entry in entries:
                if total <= max_bytes:
                    break
                grave = self._evicted(entry)
                if grave is not None:
                    graves.append(grave)
                    gone.append(entry)
                    total -= entry.size_bytes
        for grave in graves:
            remove_tree(grave)
        return gone

    def _evicted(self, entry: CacheEntry) -> Path | None:
        """Move one entry out unless somebody holds it."""
        path = self._path(entry.digest)
        grave = self.root / temporary_name()
        try:
            descriptor = os.open(path, DIRECTORY_FLAGS)
        except OSError as error:
            if error.errno not in NOT_A_DIRECTORY:
                return None
            os.rename(path, grave)  # a link or a file: nobody can hold that
            return grave
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(path, grave)
        except BlockingIOError:
            return None
        finally:
            os.close(descriptor)
        return grave


def default_cache_root(environment: Mapping[str, str]) -> Path:
    """Return `$XDG_CACHE_HOME/loraplex/adapters` or `~/.cache/loraplex/adapters` (XDG Base Directory Specification)."""
    named = environment.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    cache = Path(named) if named.startswith("/") else Path(environment.get("HOME") or Path.home()) / ".cache"
    return cache / "loraplex" / "adapters"


def _renamed(made: Path, path: Path) -> bool:
    """Give a directory its name; False when something is there already, which stays."""
    try:
        os.rename(made, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False
    return True
