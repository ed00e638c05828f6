"""A store in this process's memory: for programs that try things out, for tests and for models of the other backends.

It keeps every promise of `Store` and is linearizable: each call takes effect at one moment, under one lock. Nothing
outlives the process.
"""

from __future__ import annotations

import bisect
import hashlib
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from ..errors import (
    DamagedError,
    DigestMismatchError,
    InvalidReferenceError,
    KeyAbsentError,
    KeyConflictError,
)
from ..format.manifest import FileEntry
from ..validation.weights import open_regular
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

BLOB_BYTES_MAX: Final = 1 << 30
"""Longest blob taken into memory, in bytes (1 GiB)."""


@dataclass(frozen=True, slots=True)
class _Object:
    body: bytes
    modified_s: float


class MemoryStore:
    """See the module. `MemoryStore()` is a store of its own; `named` finds or makes one by name.

    Args:
        name: part of the address; random when empty.
        clock: seconds since 1970, the storage's clock.
    """

    _named: ClassVar[weakref.WeakValueDictionary[str, MemoryStore]] = weakref.WeakValueDictionary()
    _named_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, name: str = "", *, clock: Callable[[], float] = time.time) -> None:
        self._name = name or secrets.token_hex(8)
        self._clock = clock
        self._objects: dict[str, _Object] = {}
        self._keys: list[str] = []  # the keys of _objects, sorted
        self._lock = threading.Lock()  # guards _objects and _keys

    @classmethod
    def named(cls, name: str) -> MemoryStore:
        """Return the store of that name, made on first use; without a name always a new one."""
        with cls._named_lock:
            store = cls._named.get(name) if name else None
            if store is None:
                store = cls(name)
                cls._named[store._name] = store
            return store

    @property
    def url(self) -> str:
        """`memory:NAME`."""
        return f"memory:{self._name}"

    def prepare(self) -> None:
        """See `Store.prepare`; there is nothing to do."""

    def get(self, key: str, *, limit_bytes: int) -> Item:
        """See `Store.get`."""
        body = self._find(key).body
        if len(body) > limit_bytes:
            raise DamagedError(f"{key} in {self.url} is longer than {limit_bytes} bytes.")
        return Item(body, _etag(body))

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        """See `Store.changed`."""
        if _etag(self._find(key).body) == etag:
            return None
        item = self.get(key, limit_bytes=limit_bytes)
        return None if item.etag == etag else item

    def create(self, key: str, body: bytes) -> str:
        """See `Store.create`."""
        require_key(key)
        with self._lock:
            if key in self._objects:
                raise KeyConflictError(f"{key} exists in {self.url}.")
            self._put(key, bytes(body))
        return _etag(body)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        """See `Store.swap`."""
        require_key(key)
        with self._lock:
            found = self._objects.get(key)
            if found is None or _etag(found.body) != etag:
                raise KeyConflictError(f"{key} changed in {self.url}.")
            self._put(key, bytes(body))
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
        require_key(key)
        if file.size > BLOB_BYTES_MAX:
            raise InvalidReferenceError(
                f"{file.name} has {file.size} bytes, {self.url} takes {BLOB_BYTES_MAX}; use a directory or S3."
            )
        with open_regular(path) as source:
            body = source.read(file.size + 1)
        if (len(body), hashlib.sha256(body).hexdigest()) != (file.size, file.sha256):
            raise DigestMismatchError(
                f"{path.name} changed while it was published; leave it alone and push again."
            )
        with self._lock:
            self._put(key, body)
        if progress is not None:
            progress(len(body))
        return 1

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        """See `Store.read_range`."""
        require_range(key, start=start, length=length, size_bytes=size_bytes)
        body = memoryview(self._find(key).body)
        if len(body) != size_bytes:
            raise DigestMismatchError(f"{key} in {self.url} has {len(body)} bytes, {size_bytes} were signed.")
        for position in range(start, start + length, CHUNK_BYTES):
            yield body[position : min(position + CHUNK_BYTES, start + length)]

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        """See `Store.children`."""
        require_prefix(prefix)
        last = after
        while True:
            # Everything below a level that was yielded is passed over: no key goes beyond '~'.
            cursor = prefix + last + "~" * last.endswith("/")
            with self._lock:
                found = bisect.bisect_right(self._keys, cursor)
                key = self._keys[found] if found < len(self._keys) else ""
            if not key or not key.startswith(prefix):
                return
            name, slash, _ = key.removeprefix(prefix).partition("/")
            last = name + slash
            yield last

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        """See `Store.blobs`."""
        for key in self._below(prefix):
            with self._lock:
                found = self._objects.get(key)
            if found is not None:
                yield StoredBlob(key.removeprefix(prefix), len(found.body), found.modified_s)

    def delete_blobs(self, keys: Iterable[str]) -> int:
        """See `Store.delete_blobs`."""
        wanted = list(keys)
        for key in wanted:
            require_blob_key(key)
        with self._lock:
            for key in wanted:
                if self._objects.pop(key, None) is not None:
                    del self._keys[bisect.bisect_left(self._keys, key)]
        return int(bool(wanted))

    def uploads(self, prefix: str, *, before_s: float) -> Iterator[StoredUpload]:  # noqa: ARG002
        """See `Store.uploads`; there are no parts here."""
        return iter(())

    def abort_upload(self, key: str, upload_id: str) -> None:
        """See `Store.abort_upload`."""

    def _below(self, prefix: str) -> list[str]:
        require_prefix(prefix)
        with self._lock:
            if not prefix:
                return list(self._keys)
            start = bisect.bisect_left(self._keys, prefix)
            end = bisect.bisect_left(self._keys, prefix.removesuffix("/") + "0")  # '0' follows '/'
            return self._keys[start:end]

    def _find(self, key: str) -> _Object:
        require_key(key)
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise KeyAbsentError(f"{key} is not in {self.url}.")
        return found

    def _put(self, key: str, body: bytes) -> None:
        if key not in self._objects:
            bisect.insort(self._keys, key)
        self._objects[key] = _Object(body, self._clock())


def _etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
