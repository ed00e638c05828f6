"""What lies in a cache: entries as listed, and the lease that keeps one from being evicted; see `cache`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import DigestMismatchError, RegistryError
from .private_dirs import DIRECTORY_FLAGS, FILE_FLAGS, is_private_file

_ENTRY: Final = re.compile(r"sha256-([0-9a-f]{64})")
_CLAIM: Final = re.compile(r"\.tmp-[0-9a-f]{64}-(\d{1,15})")


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One entry as listed.

    Attributes:
        digest: `sha256:<hex>`.
        size_bytes: bytes of its files.
        used_s: last use, seconds since 1970 by this machine's clock.
        leased: somebody holds it now.
    """

    digest: str
    size_bytes: int
    used_s: float
    leased: bool = False


class Lease:
    """The right to use one entry: until `close`, or the end of the process, no cache evicts it.

    Attributes:
        digest: `sha256:<hex>`.
        path: the entry's directory.
        fresh: made by this very call, so its maker has just checked the bytes.
    """

    def __init__(
        self, digest: str, path: Path, descriptor: int, *, fresh: bool, given_back: Callable[[], object]
    ) -> None:
        """Take over an open directory that is locked shared; `given_back` is called after `close`."""
        self._given_back = given_back
        self._descriptor: int | None = descriptor
        self.digest = digest
        self.path = path
        self.fresh = fresh

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def descriptor(self) -> int:
        """The open directory; names are looked up in it, so that a directory put in its place is not seen."""
        if self._descriptor is None:
            raise ValueError("the lease is closed")
        return self._descriptor

    def names(self) -> list[str]:
        """Return the names in the entry, sorted."""
        return sorted(os.listdir(self.descriptor))

    def open(self, name: str) -> BinaryIO:
        """Open one file of the entry for reading.

        Raises:
            DigestMismatchError: it is not as the cache made it: absent, a link, linked twice, not ours, or writable by
                others.
        """
        try:
            descriptor = os.open(name, FILE_FLAGS, dir_fd=self.descriptor)
        except OSError as error:
            raise DigestMismatchError(
                f"{name!a} cannot be opened in {self.path} ({error.strerror}); fetch it again."
            ) from error
        if not is_private_file(os.fstat(descriptor)):
            os.close(descriptor)
            raise DigestMismatchError(f"{name!a} in {self.path} may be written by others; fetch it again.")
        return os.fdopen(descriptor, "rb")

    def close(self) -> None:
        """Give the entry back; it may be evicted from now on. Closing twice does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        with contextlib.suppress(OSError):
            touch(descriptor)
        os.close(descriptor)
        with contextlib.suppress(RegistryError, OSError):
            self._given_back()


def list_entries(root: Path) -> list[CacheEntry]:
    """Return the entries of a cache, least recently used first; whether they are leased is not looked up."""
    found = []
    with os.scandir(root) as items:
        for item in items:
            match = _ENTRY.fullmatch(item.name)
            if match is not None:
                with contextlib.suppress(OSError):
                    found.append(_described(f"sha256:{match[1]}", Path(item.path)))
    return sorted(found, key=lambda entry: (entry.used_s, entry.digest))


def touch(descriptor: int) -> None:
    """Make an entry the most recently used."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))


def _described(digest: str, path: Path) -> CacheEntry:
    found = os.lstat(path)
    size = found.st_size
    if stat.S_ISDIR(found.st_mode):
        with os.scandir(path) as items:
            size = sum(item.stat(follow_symlinks=False).st_size for item in items)
    return CacheEntry(digest, size, found.st_mtime_ns / 1e9)


def is_leased(path: Path) -> bool:
    """Say whether somebody holds a lease. Call it under the root's lock: it takes the entry's own for a moment."""
    try:
        descriptor = os.open(path, DIRECTORY_FLAGS)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def claimed_bytes(root: Path) -> int:
    """Return the bytes that downloads at work have claimed by the names of their directories."""
    claims = (_CLAIM.fullmatch(name) for name in os.listdir(root))
    return sum(int(claim[1]) for claim in claims if claim is not None)
