"""The files of a local store: made whole and durable before they have a name, and read without following links.

`Tree` knows the order that crash safety needs: bytes, then the name, then every directory up to the root. It makes each
change through a `Disk`, so that the order can be recorded or made to fail. What lies in the files, and when one may
replace another, is `local`'s business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import StoreRefusedError, StoreUnavailableError
from .disk import Disk
from .store import CHUNK_BYTES, StoredBlob, is_name

TEMPORARY_DIRECTORY: Final = ".tmp"

_TRIES_MAX: Final = 3  # temporary files that a sweep takes before they are locked
_DURABLE_MAX: Final = 10_000  # directories remembered as durable; forgetting one costs a few fsyncs


class Tree:
    """A root directory and what is made below it."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self.root = root
        self._disk = disk
        self._durable: set[Path] = set()  # changed by single set operations only, which are atomic

    def prepare(self) -> None:
        """Make the root, and remove what crashed writers left in `.tmp`."""
        if not self.root.is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
            self._disk.sync_directory(self.root.parent)
        self._disk.make_directory(self.root / TEMPORARY_DIRECTORY)
        self._sweep()

    def require_root(self) -> None:
        """A directory that is not there (an unmounted disk) must not look like an empty registry."""
        if not self.root.is_dir():
            raise StoreUnavailableError(
                f"Registry directory {self.root} does not exist; make it with `registry init`, or mount it."
            )

    def settle(self, path: Path, *, removable: bool = False) -> None:
        """Make a written name durable, and those of the directories above it.

        A directory that another process made may not be durable yet either, so existing is not enough. What was made
        durable once is remembered, except for directories that `delete_blobs` may have removed in between.

        An object that is visible but may not be durable must not be taken for written by the read-back that follows an
        ambiguous error, so a failure is a refusal.
        """
        try:
            self._disk.sync_directory(path.parent)
            self._settle_directory(path.parent, again=removable)
        except OSError as error:
            raise StoreRefusedError(
                f"{self.root} could not make {path.name} durable: {error.strerror}; check the disk."
            ) from error

    def _settle_directory(self, directory: Path, *, again: bool = False) -> None:
        if directory == self.root or (directory in self._durable and not again):
            return
        self._disk.sync_directory(directory.parent)
        self._settle_directory(directory.parent)
        if len(self._durable) >= _DURABLE_MAX:
            self._durable.clear()
        self._durable.add(directory)

    def make_parent(self, path: Path) -> None:
        """Make the directory of `path`, and those above it, up to the root."""
        directory = path.parent
        if directory == self.root or directory.is_dir():
            return
        self.make_parent(directory)
        self._disk.make_directory(directory)
        self._durable.discard(directory)

    @contextlib.contextmanager
    def temporary(self, pieces: Iterable[bytes], *, mode: int = 0o644) -> Iterator[Path]:
        """Yield a durable file of these bytes; it is gone afterwards unless it was renamed."""
        path, descriptor = self._new_temporary(mode)
        try:
            for piece in pieces:
                self._write(descriptor, piece)
            self._disk.sync(descriptor)
            yield path
        finally:
            with contextlib.suppress(OSError):  # the sweep gets it later
                self._disk.unlink(path)
            os.close(descriptor)

    def _new_temporary(self, mode: int) -> tuple[Path, int]:
        """Create a temporary file, locked so that no sweep takes it for a left-over."""
        for _ in range(_TRIES_MAX):
            path = self.root / TEMPORARY_DIRECTORY / secrets.token_hex(16)
            try:
                descriptor = self._disk.create(path, mode)
            except FileNotFoundError:
                self.require_root()
                self._disk.make_directory(path.parent)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # a sweep may have come before the lock
                return path, descriptor
            os.close(descriptor)
        raise StoreUnavailableError(f"{self.root.as_uri()} cannot be written: its temporary files vanish.")

    def _sweep(self) -> None:
        """Remove the temporary files of writers that are gone: those that nobody holds locked."""
        for path in (self.root / TEMPORARY_DIRECTORY).iterdir():
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._disk.unlink(path)
                finally:
                    os.close(descriptor)

    def _write(self, descriptor: int, piece: bytes) -> None:
        """Write all of it; the system may take less at a time."""
        rest = memoryview(piece)
        while rest:
            rest = rest[self._disk.write(descriptor, rest) :]


@contextlib.contextmanager
def locked(directory: Path, kind: int) -> Iterator[None]:
    """Hold a `flock` on a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; a link, or anything else, is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EPERM, "not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_file(path: Path, limit_bytes: int) -> bytes:
    """Read at most one byte more than the limit."""
    with open_file(path) as file:
        chunks: list[bytes] = []
        left = limit_bytes + 1
        step = min(os.fstat(file.fileno()).st_size + 1, CHUNK_BYTES)  # a read allocates all it asks for
        while left > 0 and (chunk := file.read(min(left, step))):
            chunks.append(chunk)
            left -= len(chunk)
    return b"".join(chunks)


def entries(directory: Path) -> list[tuple[str, os.DirEntry[str]]]:
    """Return what lies in a directory, in byte order; a directory's name ends in '/'. Nothing when it is not there."""
    try:
        with os.scandir(directory) as items:
            found = [
                (item.name + ("/" if item.is_dir(follow_symlinks=False) else ""), item)
                for item in items
                if is_name(item.name)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda pair: pair[0])


def walk(directory: Path, before: str = "") -> Iterator[StoredBlob]:
    """Yield every regular file below a directory, in byte order, as `before` and its path there."""
    for name, entry in entries(directory):
        if name.endswith("/"):
            yield from walk(directory / entry.name, before + name)
            continue
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                yield StoredBlob(before + name, status.st_size, status.st_mtime)
