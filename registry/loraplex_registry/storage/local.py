"""A store in a local directory, safe for many processes and for a crash or a power cut at any moment.

- create: write a temporary file, fsync, `link()` it to its name, fsync the directory. `link` fails when the name is
  taken, where the popular `exists()` and `rename()` silently replace.
- swap: under `flock` on a sidecar file compare the SHA-256 of what is there, then `rename` over it and fsync.
- blobs: temporary file, fsync, `rename`, fsync the directory; mode 0444.
- a directory is made durable, up to the root, before the first name in it is acknowledged.

A crash leaves only files in `<root>/.tmp`, which no reader looks at and which `prepare` sweeps; so the root must be one
file system. `flock` does not hold across machines on network file systems: keep such a directory to one machine and
use S3 for more; `registry doctor` warns.

Between `link` or `rename` and the fsync after it, other processes see a write that a power cut could still undo. What
they write afterwards is safe wherever the file system keeps the order of names, as ext4, xfs and btrfs do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import (
    DamagedError,
    DigestMismatchError,
    KeyAbsentError,
    KeyConflictError,
    StoreRefusedError,
    StoreUnavailableError,
)
from ..format.manifest import FileEntry
from ..validation.weights import open_regular
from .disk import Disk
from .store import (
    CHUNK_BYTES,
    BlobProgress,
    Item,
    Piece,
    StoredBlob,
    is_name,
    require_blob_key,
    require_key,
    require_prefix,
    require_range,
)

TEMPORARY_DIRECTORY: Final = ".tmp"

_SWAP_BYTES_MAX: Final = 1 << 30
_TRIES_MAX: Final = 3  # temporary files that a sweep takes before they are locked
_DURABLE_MAX: Final = 10_000  # directories remembered as durable; forgetting one costs a few fsyncs
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})
_NOT_HERE = frozenset({errno.ENOTDIR, errno.EISDIR})  # a key with a longer or a shorter one in its place
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class LocalStore:
    """See the module. The directory is made by `prepare`."""

    def __init__(self, root: Path, *, disk: Disk | None = None) -> None:
        self._root = root
        self._disk = disk or Disk()
        self._durable: set[Path] = set()  # changed by single set operations only, which are atomic

    @property
    def url(self) -> str:
        """`file:///path`."""
        return self._root.as_uri()

    @property
    def root(self) -> Path:
        """The directory."""
        return self._root

    def prepare(self) -> None:
        """See `Store.prepare`; also removes what crashed writers left in `.tmp`."""
        with self._faults("the root", write=True):
            if not self._root.is_dir():
                self._root.mkdir(parents=True, exist_ok=True)
                self._disk.sync_directory(self._root.parent)
            self._disk.make_directory(self._root / TEMPORARY_DIRECTORY)
            self._sweep()

    def get(self, key: str, *, limit_bytes: int) -> Item:
        """See `Store.get`."""
        with self._faults(key):
            body = _read(self._path(key), limit_bytes)
        if len(body) > limit_bytes:
            raise DamagedError(f"{key} in {self.url} is longer than {limit_bytes} bytes.")
        return Item(body, _etag(body))

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        """See `Store.changed`."""
        item = self.get(key, limit_bytes=limit_bytes)
        return None if item.etag == etag else item

    def create(self, key: str, body: bytes) -> str:
        """See `Store.create`."""
        path = self._path(key)
        with (
            self._faults(key, write=True),
            self._temporary(lambda sink: self._write(sink, body)) as temporary,
        ):
            self._make_parent(path)
            try:
                self._disk.link(temporary, path)
            except FileExistsError as error:
                self._settle(
                    path
                )  # whoever acts on this answer must find the rival's object after a power cut too
                raise KeyConflictError(f"{key} exists in {self.url}.") from error
            self._settle(path)
        return _etag(body)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        """See `Store.swap`."""
        path = self._path(key)
        with self._faults(key, write=True), self._lock(path, key):
            try:
                current = _read(path, _SWAP_BYTES_MAX)
            except FileNotFoundError:
                current = None
            if current is None or _etag(current) != etag:
                raise KeyConflictError(f"{key} changed in {self.url}.")
            with self._temporary(lambda sink: self._write(sink, body)) as temporary:
                self._make_parent(path)
                self._disk.rename(temporary, path)
                self._settle(path)
        return _etag(body)

    def put_blob(self, key: str, path: Path, file: FileEntry, *, progress: BlobProgress | None = None) -> int:
        """See `Store.put_blob`."""
        target = self._path(key)
        with (
            self._faults(key, write=True),
            self._temporary(
                lambda sink: self._copy_checked(path, sink, file, progress), mode=0o444
            ) as temporary,
        ):
            above = target.parent.parent if target.parent != self._root else self._root
            self._make_parent(above / target.parent.name)
            with _locked(above, fcntl.LOCK_SH):  # keeps `delete_blobs` from removing the directory in between
                self._make_parent(target)
                self._disk.rename(temporary, target)
            self._settle(target, removable=True)
        return 1

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        """See `Store.read_range`."""
        require_range(key, start=start, length=length, size_bytes=size_bytes)
        with self._faults(key), _open(self._path(key)) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size_bytes:
                raise DigestMismatchError(f"{key} in {self.url} has {found} bytes, {size_bytes} were signed.")
            file.seek(start)
            left = length
            while left > 0:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise DigestMismatchError(f"{key} in {self.url} became shorter while it was read.")
                left -= len(chunk)
                yield chunk

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        """See `Store.children`."""
        directory = self._directory(prefix)
        with self._faults(prefix):
            self._require_root()
            names = [name for name, _ in _entries(directory) if name > after]
        yield from names

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        """See `Store.blobs`."""
        directory = self._directory(prefix)
        with self._faults(prefix):
            self._require_root()
            yield from _walk(directory, "")

    def delete_blobs(self, keys: Iterable[str]) -> int:
        """See `Store.delete_blobs`. A directory that becomes empty goes too."""
        wanted = list(keys)
        for key in wanted:
            require_blob_key(key)
        for key in wanted:
            path = self._path(key)
            with self._faults(key, write=True), contextlib.suppress(NotADirectoryError):
                self._require_root()
                self._disk.unlink(path)
        for directory in sorted({self._path(key).parent for key in wanted} - {self._root}):
            # Not empty, gone, or being written to: all are fine.
            with contextlib.suppress(OSError), _locked(directory.parent, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._disk.remove_directory(directory)
        return int(bool(wanted))

    def _path(self, key: str) -> Path:
        """Return where a key lies; a key that could leave the root is refused."""
        require_key(key)
        return self._root.joinpath(*key.split("/"))

    def _directory(self, prefix: str) -> Path:
        require_prefix(prefix)
        return self._path(prefix[:-1]) if prefix else self._root

    def _require_root(self) -> None:
        """A directory that is not there (an unmounted disk) must not look like an empty registry."""
        if not self._root.is_dir():
            raise StoreUnavailableError(
                f"Registry directory {self._root} does not exist; make it with `registry init`, or mount it."
            )

    @contextlib.contextmanager
    def _faults(self, key: str, *, write: bool = False) -> Iterator[None]:
        """Turn operating system errors into store errors."""
        try:
            yield
        except FileNotFoundError as error:
            self._require_root()
            if write:
                raise StoreUnavailableError(
                    f"{self.url}: somebody removes directories while {key} is written; try again."
                ) from error
            raise KeyAbsentError(f"{key} is not in {self.url}.") from error
        except OSError as error:
            if error.errno in _NOT_HERE and not write:
                raise KeyAbsentError(f"{key} is not in {self.url}.") from error
            if error.errno in _REFUSED:
                raise StoreRefusedError(f"{self.url} refuses access to {key}: {error.strerror}.") from error
            raise StoreUnavailableError(
                f"{self.url} failed at {key}: {error.strerror}.",
                ambiguous=write and error.errno not in _FULL,
            ) from error

    def _settle(self, path: Path, *, removable: bool = False) -> None:
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
                f"{self._root} could not make {path.name} durable: {error.strerror}; check the disk."
            ) from error

    def _settle_directory(self, directory: Path, *, again: bool = False) -> None:
        if directory == self._root or (directory in self._durable and not again):
            return
        self._disk.sync_directory(directory.parent)
        self._settle_directory(directory.parent)
        if len(self._durable) >= _DURABLE_MAX:
            self._durable.clear()
        self._durable.add(directory)

    def _make_parent(self, path: Path) -> None:
        """Make the directory of `path`, and those above it, up to the root."""
        directory = path.parent
        if directory == self._root or directory.is_dir():
            return
        self._make_parent(directory)
        self._disk.make_directory(directory)
        self._durable.discard(directory)

    @contextlib.contextmanager
    def _temporary(self, fill: Callable[[int], None], *, mode: int = 0o644) -> Iterator[Path]:
        """Yield a durable file that `fill` wrote; it is gone afterwards unless it was renamed."""
        path, descriptor = self._new_temporary(mode)
        try:
            fill(descriptor)
            self._disk.sync(descriptor)
            yield path
        finally:
            with contextlib.suppress(OSError):  # the sweep gets it later
                self._disk.unlink(path)
            os.close(descriptor)

    def _new_temporary(self, mode: int) -> tuple[Path, int]:
        """Create a temporary file, locked so that no sweep takes it for a left-over."""
        for _ in range(_TRIES_MAX):
            path = self._root / TEMPORARY_DIRECTORY / secrets.token_hex(16)
            try:
                descriptor = self._disk.create(path, mode)
            except FileNotFoundError:
                self._require_root()
                self._disk.make_directory(path.parent)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # a sweep may have come before the lock
                return path, descriptor
            os.close(descriptor)
        raise StoreUnavailableError(f"{self.url} cannot be written: its temporary files vanish.")

    def _sweep(self) -> None:
        """Remove the temporary files of writers that are gone: those that nobody holds locked."""
        for path in (self._root / TEMPORARY_DIRECTORY).iterdir():
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._disk.unlink(path)
                finally:
                    os.close(descriptor)

    @contextlib.contextmanager
    def _lock(self, path: Path, key: str) -> Iterator[None]:
        """Hold the exclusive lock that guards the compare and the rename of one key."""
        if not path.parent.is_dir():
            self._require_root()
            raise KeyConflictError(f"{key} is gone from {self.url}.")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path.parent / f".{path.name}.lock", flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, descriptor: int, data: bytes | memoryview) -> None:
        """Write all of `data`; the system may take less at a time."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._disk.write(descriptor, rest) :]

    def _copy_checked(
        self, source: Path, sink: int, expected: FileEntry, progress: BlobProgress | None
    ) -> None:
        digest, size = hashlib.sha256(), 0
        with open_regular(source) as origin:
            while chunk := origin.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                self._write(sink, chunk)
                if progress is not None:
                    progress(len(chunk))
        if (size, digest.hexdigest()) != (expected.size, expected.sha256):
            raise DigestMismatchError(
                f"{source.name} changed while it was published; leave it alone and push again."
            )


@contextlib.contextmanager
def _locked(directory: Path, kind: int) -> Iterator[None]:
    """Hold a `flock` on a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _open(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EPERM, "not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def _read(path: Path, limit_bytes: int) -> bytes:
    """Read at most one byte more than the limit."""
    with _open(path) as file:
        chunks: list[bytes] = []
        left = limit_bytes + 1
        step = min(os.fstat(file.fileno()).st_size + 1, CHUNK_BYTES)  # a read allocates all it asks for
        while left > 0 and (chunk := file.read(min(left, step))):
            chunks.append(chunk)
            left -= len(chunk)
    return b"".join(chunks)


def _entries(directory: Path) -> list[tuple[str, os.DirEntry[str]]]:
    """Return what lies in a directory, in byte order; a directory's name ends in '/'. Nothing when it is not there."""
    try:
        with os.scandir(directory) as entries:
            found = [
                (entry.name + ("/" if entry.is_dir(follow_symlinks=False) else ""), entry)
                for entry in entries
                if is_name(entry.name)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda pair: pair[0])


def _walk(directory: Path, before: str) -> Iterator[StoredBlob]:
    for name, entry in _entries(directory):
        if name.endswith("/"):
            yield from _walk(directory / entry.name, before + name)
            continue
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                yield StoredBlob(before + name, status.st_size, status.st_mtime)
