"""A store in a local directory, safe for many processes and for a crash at any moment.

- create: write a temporary file in the same directory, fsync, `link()` it to its name, fsync the directory. `link`
  fails when the name is taken, where the popular `exists()` and `rename()` silently replace.
- swap: under `flock` on a sidecar file compare the SHA-256 of what is there, then `rename` over it and fsync.
- blobs: temporary file, fsync, `rename`, mode 0444.

A crash leaves only `.tmp-…` files, which no reader looks at. `flock` does not hold across machines on NFS: keep such a
directory to one machine and use S3 for more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from .errors import (
    DamagedError,
    DigestMismatchError,
    InvalidReferenceError,
    KeyAbsentError,
    KeyConflictError,
    StoreRefusedError,
    StoreUnavailableError,
)
from .manifest import FileEntry
from .store import CHUNK_BYTES, BlobProgress, Item
from .weights import open_regular

_SEGMENT: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._~-]{0,126}[A-Za-z0-9])?")
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})


class LocalStore:
    """See the module. The directory is made by `prepare`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        """`file:///path`."""
        return self._root.as_uri()

    def prepare(self) -> None:
        """See `Store.prepare`."""
        with self._faults("the root"):
            self._root.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, *, limit_bytes: int) -> Item:
        """See `Store.get`."""
        with self._faults(key):
            body = _read(self._path(key), limit_bytes)
        if len(body) > limit_bytes:
            raise DamagedError(f"{key} in {self.url} is longer than {limit_bytes} bytes.")
        return Item(body, _etag(body))

    def create(self, key: str, body: bytes) -> str:
        """See `Store.create`."""
        path = self._path(key)
        with self._faults(key), self._temporary(path, body) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                raise KeyConflictError(f"{key} exists in {self.url}.") from error
            _sync_directory(path.parent)
        return _etag(body)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        """See `Store.swap`."""
        path = self._path(key)
        with self._faults(key), self._lock(path, key):
            try:
                current = _read(path, limit_bytes=1 << 30)
            except FileNotFoundError:
                current = None
            if current is None or _etag(current) != etag:
                raise KeyConflictError(f"{key} changed in {self.url}.")
            with self._temporary(path, body) as temporary:
                os.rename(temporary, path)
                _sync_directory(path.parent)
        return _etag(body)

    def put_blob(self, key: str, path: Path, file: FileEntry, *, progress: BlobProgress | None = None) -> int:
        """See `Store.put_blob`."""
        target = self._path(key)
        with self._faults(key):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.parent / f".tmp-{secrets.token_hex(8)}"
            try:
                _copy_checked(path, temporary, file, progress)
                os.rename(temporary, target)
                _sync_directory(target.parent)
            finally:
                temporary.unlink(missing_ok=True)
        return 1

    def read_blob(self, key: str, *, size_bytes: int) -> Iterator[bytes]:
        """See `Store.read_blob`."""
        with self._faults(key), _open(self._path(key)) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size_bytes:
                raise DigestMismatchError(f"{key} in {self.url} has {found} bytes, {size_bytes} were signed.")
            left = size_bytes
            while left > 0:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise DigestMismatchError(f"{key} in {self.url} became shorter while it was read.")
                left -= len(chunk)
                yield chunk

    def children(self, prefix: str) -> Iterator[str]:
        """See `Store.children`."""
        directory = self._path(prefix.rstrip("/"))
        names: list[str] = []
        with self._faults(prefix), contextlib.suppress(KeyAbsentError, FileNotFoundError):
            self._require_root()
            with os.scandir(directory) as entries:
                names = [
                    entry.name + ("/" if entry.is_dir(follow_symlinks=False) else "")
                    for entry in entries
                    if _SEGMENT.fullmatch(entry.name)
                ]
        yield from sorted(names)

    def _path(self, key: str) -> Path:
        """Return where a key lies; a key that could leave the root is refused."""
        segments = key.split("/")
        if not all(_SEGMENT.fullmatch(segment) and ".." not in segment for segment in segments):
            raise InvalidReferenceError(f"key {key[:200]!r} is not allowed.")
        return self._root.joinpath(*segments)

    def _require_root(self) -> None:
        """A directory that is not there (an unmounted disk) must not look like an empty registry."""
        if not self._root.is_dir():
            raise StoreUnavailableError(
                f"Registry directory {self._root} does not exist; make it with `registry init`, or mount it."
            )

    @contextlib.contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        """Turn operating system errors into store errors."""
        try:
            yield
        except FileNotFoundError as error:
            self._require_root()
            raise KeyAbsentError(f"{key} is not in {self.url}.") from error
        except OSError as error:
            if error.errno in _REFUSED:
                raise StoreRefusedError(f"{self.url} refuses access to {key}: {error.strerror}.") from error
            raise StoreUnavailableError(
                f"{self.url} failed at {key}: {error.strerror}.", ambiguous=True
            ) from error

    @contextlib.contextmanager
    def _temporary(self, path: Path, body: bytes) -> Iterator[Path]:
        """Write `body` durably beside `path`; the file is gone afterwards unless it was renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".tmp-{secrets.token_hex(8)}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self, path: Path, key: str) -> Iterator[None]:
        """Hold the exclusive lock that guards the compare and the rename of one key."""
        if not path.parent.is_dir():
            raise KeyConflictError(f"{key} is gone from {self.url}.")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path.parent / f".{path.name}.lock", flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _open(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "not a regular file")
    return os.fdopen(descriptor, "rb")


def _read(path: Path, limit_bytes: int) -> bytes:
    with _open(path) as file:
        return file.read(limit_bytes + 1)


def _copy_checked(source: Path, target: Path, expected: FileEntry, progress: BlobProgress | None) -> None:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    with os.fdopen(descriptor, "wb") as sink, open_regular(source) as origin:
        while chunk := origin.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            sink.write(chunk)
            if progress is not None:
                progress(len(chunk))
        sink.flush()
        os.fsync(sink.fileno())
    if (size, digest.hexdigest()) != (expected.size, expected.sha256):
        raise DigestMismatchError(
            f"{source.name} changed while it was published; leave it alone and push again."
        )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
