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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from ..errors import (
    DamagedError,
    DigestMismatchError,
    KeyAbsentError,
    KeyConflictError,
    StoreRefusedError,
    StoreUnavailableError,
    what_to_do,
)
from ..format.manifest import FileEntry
from ..validation.weights import open_regular
from .disk import Disk
from .local_files import Tree, entries, locked, open_file, read_file, walk
from .store import (
    CHUNK_BYTES,
    BlobProgress,
    Item,
    Piece,
    StoredBlob,
    StoredUpload,
    UploadLog,
    require_blob_key,
    require_key,
    require_prefix,
    require_range,
)

_SWAP_BYTES_MAX: Final = 1 << 30
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})
_NOT_HERE = frozenset({errno.ENOTDIR, errno.EISDIR})  # a key with a longer or a shorter one in its place
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class LocalStore:
    """See the module. The directory is made by `prepare`."""

    def __init__(self, root: Path, *, disk: Disk | None = None) -> None:
        self._root = root
        self._disk = disk or Disk()
        self._tree = Tree(root, self._disk)

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
            self._tree.prepare()

    def get(self, key: str, *, limit_bytes: int) -> Item:
        """See `Store.get`."""
        with self._faults(key):
            body = read_file(self._path(key), limit_bytes)
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
            self._tree.temporary([body]) as temporary,
        ):
            self._tree.make_parent(path)
            try:
                self._disk.link(temporary, path)
            except FileExistsError as error:
                # Whoever acts on this answer must find the rival's object after a power cut too.
                self._tree.settle(path)
                raise KeyConflictError(f"{key} exists in {self.url}.") from error
            self._tree.settle(path)
        return _etag(body)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        """See `Store.swap`."""
        path = self._path(key)
        with self._faults(key, write=True), self._lock(path, key):
            try:
                current = read_file(path, _SWAP_BYTES_MAX)
            except FileNotFoundError:
                current = None
            if current is None or _etag(current) != etag:
                raise KeyConflictError(f"{key} changed in {self.url}.")
            with self._tree.temporary([body]) as temporary:
                self._tree.make_parent(path)
                self._disk.rename(temporary, path)
                self._tree.settle(path)
        return _etag(body)

    def put_blob(
        self,
        key: str,
        path: Path,
        file: FileEntry,
        *,
        progress: BlobProgress | None = None,
        upload: UploadLog | None = None,  # noqa: ARG002  (no parts here)
    ) -> int:
        """See `Store.put_blob`."""
        target = self._path(key)
        with (
            self._faults(key, write=True),
            self._tree.temporary(_checked(path, file, progress), mode=0o444) as temporary,
        ):
            above = target.parent.parent if target.parent != self._root else self._root
            self._tree.make_parent(above / target.parent.name)
            with locked(above, fcntl.LOCK_SH):  # keeps `delete_blobs` from removing the directory in between
                self._tree.make_parent(target)
                self._disk.rename(temporary, target)
            self._tree.settle(target, removable=True)
        return 1

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        """See `Store.read_range`."""
        require_range(key, start=start, length=length, size_bytes=size_bytes)
        with self._faults(key), open_file(self._path(key)) as file:
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
            self._tree.require_root()
            names = [name for name, _ in entries(directory) if name > after]
        yield from names

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        """See `Store.blobs`."""
        directory = self._directory(prefix)
        with self._faults(prefix):
            self._tree.require_root()
            yield from walk(directory)

    def delete_blobs(self, keys: Iterable[str]) -> int:
        """See `Store.delete_blobs`. A directory that becomes empty goes too."""
        wanted = list(keys)
        for key in wanted:
            require_blob_key(key)
        for key in wanted:
            path = self._path(key)
            with self._faults(key, write=True), contextlib.suppress(NotADirectoryError):
                self._tree.require_root()
                self._disk.unlink(path)
        for directory in sorted({self._path(key).parent for key in wanted} - {self._root}):
            # Not empty, gone, or being written to: all are fine.
            with contextlib.suppress(OSError), locked(directory.parent, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._disk.remove_directory(directory)
        return int(bool(wanted))

    def uploads(self, prefix: str, *, before_s: float) -> Iterator[StoredUpload]:  # noqa: ARG002
        """See `Store.uploads`; there are no parts here."""
        return iter(())

    def abort_upload(self, key: str, upload_id: str) -> None:
        """See `Store.abort_upload`."""

    def _path(self, key: str) -> Path:
        """Return where a key lies; a key that could leave the root is refused."""
        require_key(key)
        return self._root.joinpath(*key.split("/"))

    def _directory(self, prefix: str) -> Path:
        require_prefix(prefix)
        return self._path(prefix[:-1]) if prefix else self._root

    @contextlib.contextmanager
    def _faults(self, key: str, *, write: bool = False) -> Iterator[None]:
        """Turn operating system errors into store errors."""
        try:
            yield
        except FileNotFoundError as error:
            self._tree.require_root()
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
                f"{self.url} failed at {key} ({error.strerror}); {what_to_do(error)}.",
                ambiguous=write and error.errno not in _FULL,
            ) from error

    @contextlib.contextmanager
    def _lock(self, path: Path, key: str) -> Iterator[None]:
        """Hold the exclusive lock that guards the compare and the rename of one key."""
        if not path.parent.is_dir():
            self._tree.require_root()
            raise KeyConflictError(f"{key} is gone from {self.url}.")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path.parent / f".{path.name}.lock", flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _checked(source: Path, expected: FileEntry, progress: BlobProgress | None) -> Iterator[bytes]:
    """Yield a file's bytes; raises DigestMismatchError after the last one when they are not the expected."""
    digest, size = hashlib.sha256(), 0
    with open_regular(source) as origin:
        while chunk := origin.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            yield chunk
            if progress is not None:
                progress(len(chunk))
    if (size, digest.hexdigest()) != (expected.size, expected.sha256):
        raise DigestMismatchError(
            f"{source.name} changed while it was published; leave it alone and push again."
        )


def _etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
