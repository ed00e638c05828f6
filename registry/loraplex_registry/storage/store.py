"""The seam between the registry and its storage: thirteen methods, three backends, one contract suite.

A store holds small objects that change only by compare-and-swap, and blobs that are written once under a key nobody
else uses. It knows nothing of adapters. What every backend promises:

- a read returns a whole object as some writer wrote it, and sees every write acknowledged before it began; a listing
  shows every object acknowledged before it began;
- of any number of concurrent `create` or `swap` calls from one state, exactly one succeeds;
- `etag` is opaque; equal etags of one key mean equal bytes;
- a `StoreUnavailableError` with `ambiguous` set means the write may or may not have happened. Callers use
  `write_conditionally`, which reads back; nobody ever cleans up after a write with an unknown end;
- only blobs can be deleted. Nothing here can remove a record, a tag or an entry of a log.

Keys are paths of `[A-Za-z0-9._~-]` segments that begin and end with a letter or digit, built by `layout`. All methods
may be called from many threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, runtime_checkable
from urllib.parse import unquote, urlsplit

from ..errors import InvalidReferenceError, StoreUnavailableError
from .conditional import WRITE_ATTEMPTS_MAX, write_conditionally
from .s3_options import S3Options
from .store_keys import is_name, require_blob_key, require_key, require_prefix, require_range

if TYPE_CHECKING:
    from ..format.manifest import FileEntry

__all__ = [
    "CHUNK_BYTES",
    "PAGE_KEYS",
    "WRITE_ATTEMPTS_MAX",
    "BlobProgress",
    "CountingStore",
    "Item",
    "Piece",
    "ReadRange",
    "Store",
    "StoredBlob",
    "StoredUpload",
    "UploadLog",
    "blob_reader",
    "is_name",
    "open_store",
    "require_blob_key",
    "require_key",
    "require_prefix",
    "require_range",
    "resumed",
    "write_conditionally",
]

CHUNK_BYTES: Final = 1 << 20
"""Largest piece a blob is handed over in, in bytes (1 MiB)."""

PAGE_KEYS: Final = 1000
"""Names of one page of a listing, and keys of one delete request: the limits of S3."""

BlobProgress = Callable[[int], None]
"""Called with the number of bytes newly done."""

_T = TypeVar("_T")

Piece = bytes | memoryview
"""A part of a blob. A memoryview is good until the next piece is asked for."""

ReadRange = Callable[[int, int], Iterator[Piece]]
"""Called with start and length in bytes; yields exactly those bytes of one blob (see `Store.read_range`)."""


@dataclass(frozen=True, slots=True)
class Item:
    """A small object: its bytes and the etag to swap it by."""

    body: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """An object of a listing.

    Attributes:
        key: relative to the prefix that was listed.
        size: bytes.
        modified_s: when it was written, in seconds since 1970, by the storage's clock.
    """

    key: str
    size: int
    modified_s: float


@dataclass(frozen=True, slots=True)
class StoredUpload:
    """An upload in parts that was begun and neither completed nor aborted; its parts take room, and are no object.

    Attributes:
        key: of the blob it would become, below the root.
        upload_id: the storage's name for it.
        size: bytes of the parts that are there.
        started_s: when it was begun, in seconds since 1970, by the storage's clock.
    """

    key: str
    upload_id: str
    size: int
    started_s: float


class UploadLog(Protocol):
    """What a push remembers of its uploads in parts, so that another process can go on with them."""

    def begun(self, key: str) -> str | None:
        """Return the id of the upload of `key` that was begun and not completed, None without one."""

    def begin(self, key: str, upload_id: str) -> None:
        """Remember an upload before its first part is sent; an earlier one of this key is forgotten."""

    def found(self, parts_there: int, parts: int) -> None:
        """Hear that an upload goes on: so many of its parts are there and are not sent again."""


@runtime_checkable
class Store(Protocol):
    """What a backend implements. See the module's promises."""

    @property
    def url(self) -> str:
        """The root, as a user would write it."""

    def prepare(self) -> None:
        """Make the root ready for a first write. Costs no request on S3; may be called at any time."""

    def get(self, key: str, *, limit_bytes: int) -> Item:
        """Return an object.

        Raises:
            KeyAbsentError: no such object.
            DamagedError: longer than `limit_bytes`; at most one byte more than that is read.
            StoreUnavailableError, StoreRefusedError: the storage.
        """

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        """Return an object unless it still has `etag`; None costs no body (RFC 9110, 13.1.2, answer 304).

        Raises:
            As `get`.
        """

    def create(self, key: str, body: bytes) -> str:
        """Write a new object and return its etag.

        Raises:
            KeyConflictError: the key is taken.
            StoreUnavailableError: possibly `ambiguous`.
        """

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        """Replace the object that has `etag` and return the new etag.

        Raises:
            KeyConflictError: it changed or is gone.
            StoreUnavailableError: possibly `ambiguous`.
        """

    def put_blob(
        self,
        key: str,
        path: Path,
        file: FileEntry,
        *,
        progress: BlobProgress | None = None,
        upload: UploadLog | None = None,
    ) -> int:
        """Upload a file under a key of its own and return the number of requests it took. Repeating it is harmless.

        With `upload`, a backend that sends long files in parts goes on with the upload that is remembered there, and
        leaves it in place when it fails. Without, it leaves nothing behind that it can remove.

        Raises:
            DigestMismatchError: the file is not the one `file` describes any more.
            StoreUnavailableError, StoreRefusedError: the storage.
        """

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        """Yield `length` bytes of a blob from `start`, in order, in pieces of at most `CHUNK_BYTES`.

        A piece is good until the next one is asked for. An end is reached only after exactly `length` bytes; a caller
        whose iteration is broken off by StoreUnavailableError asks for the range again. Errors come with the first
        piece or later, never from the call itself.

        Args:
            key: the blob.
            start: first byte.
            length: bytes wanted; at least 1, and 0 only of an empty blob.
            size_bytes: the size that was signed; the blob must have it.

        Raises:
            KeyAbsentError: no such blob.
            DigestMismatchError: the blob has another size.
            InvalidReferenceError: the range is not within `size_bytes`.
            StoreUnavailableError, StoreRefusedError: the storage.
        """

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        """Yield the names directly under `prefix` (empty, or ending in '/'), in byte order; a deeper level is `name/`.

        Only names greater than `after`, one that was yielded before, so that a listing can be taken up again.
        """

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        """Yield every object below `prefix` (empty, or ending in '/'), at any depth, in byte order of the keys."""

    def delete_blobs(self, keys: Iterable[str]) -> int:
        """Delete blobs and return the number of requests. Absent keys are fine; may be repeated.

        Raises:
            InvalidReferenceError: a key that is no blob's (see `require_blob_key`); nothing is deleted then.
            StoreUnavailableError, StoreRefusedError: the storage; some may be deleted.
        """

    def uploads(self, prefix: str, *, before_s: float) -> Iterator[StoredUpload]:
        """Yield the unfinished uploads in parts below `prefix` that were begun before a time (seconds since 1970).

        Backends that send no parts have none.
        """

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Remove an unfinished upload and its parts; one that is gone, or has become an object, is left alone.

        Raises:
            InvalidReferenceError: the key is no blob's.
            StoreUnavailableError, StoreRefusedError: the storage.
        """


class CountingStore:
    """A store that counts requests; the rest is passed through. One per operation; its threads share the count."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._requests = 0
        self._lock = threading.Lock()  # guards _requests

    @property
    def requests(self) -> int:
        """Requests so far; of a listing one per page of 1000 names begun."""
        return self._requests

    @property
    def url(self) -> str:
        """See `Store.url`."""
        return self._store.url

    def prepare(self) -> None:
        """See `Store.prepare`."""
        self._store.prepare()

    def get(self, key: str, *, limit_bytes: int) -> Item:
        """See `Store.get`."""
        self._count()
        return self._store.get(key, limit_bytes=limit_bytes)

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        """See `Store.changed`."""
        self._count()
        return self._store.changed(key, etag=etag, limit_bytes=limit_bytes)

    def create(self, key: str, body: bytes) -> str:
        """See `Store.create`."""
        self._count()
        return self._store.create(key, body)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        """See `Store.swap`."""
        self._count()
        return self._store.swap(key, body, etag=etag)

    def put_blob(
        self,
        key: str,
        path: Path,
        file: FileEntry,
        *,
        progress: BlobProgress | None = None,
        upload: UploadLog | None = None,
    ) -> int:
        """See `Store.put_blob`."""
        if upload is None:
            return self._count(self._store.put_blob(key, path, file, progress=progress))
        return self._count(self._store.put_blob(key, path, file, progress=progress, upload=upload))

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        """See `Store.read_range`."""
        self._count()
        return self._store.read_range(key, start=start, length=length, size_bytes=size_bytes)

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        """See `Store.children`."""
        return self._pages(self._store.children(prefix, after=after))

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        """See `Store.blobs`."""
        return self._pages(self._store.blobs(prefix))

    def delete_blobs(self, keys: Iterable[str]) -> int:
        """See `Store.delete_blobs`."""
        return self._count(self._store.delete_blobs(keys))

    def uploads(self, prefix: str, *, before_s: float) -> Iterator[StoredUpload]:
        """See `Store.uploads`."""
        for upload in self._pages(self._store.uploads(prefix, before_s=before_s)):
            self._count()  # its parts are listed
            yield upload

    def abort_upload(self, key: str, upload_id: str) -> None:
        """See `Store.abort_upload`."""
        self._count()
        self._store.abort_upload(key, upload_id)

    def _pages(self, items: Iterator[_T]) -> Iterator[_T]:
        self._count()
        for number, item in enumerate(items):
            if number and number % PAGE_KEYS == 0:
                self._count()
            yield item

    def _count(self, requests: int = 1) -> int:
        with self._lock:
            self._requests += requests
        return requests


def open_store(
    url: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    options: S3Options | None = None,
) -> Store:
    """Return the store at an address. Touches neither disk nor network.

    Args:
        url: `file:///path` or a plain path, `s3://bucket/prefix`, or `memory:` for a new store that lives as long as
            this process refers to it (`memory:NAME` is one store for all who name it in this process).
        endpoint_url: address of an S3 server other than AWS; default from `AWS_ENDPOINT_URL`.
        region: AWS region; default from the environment and profile.
        options: how to talk to S3; see `S3Options`.

    Raises:
        InvalidReferenceError: the address has none of these forms.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc and not parts.query and not parts.fragment:
        from .s3 import S3Store

        prefix = parts.path.strip("/")
        return S3Store(parts.netloc, prefix, endpoint_url=endpoint_url, region=region, options=options)
    if parts.scheme in {"file", ""} and not parts.netloc and parts.path:
        from .local import LocalStore

        return LocalStore(Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute())
    if parts.scheme == "memory" and not parts.netloc and not parts.query and not parts.fragment:
        from .memory import MemoryStore

        return MemoryStore.named(parts.path)
    raise InvalidReferenceError(
        f"registry {url!r} is not an address; write file:///path or s3://bucket/prefix."
    )


def blob_reader(store: Store, key: str, *, size_bytes: int) -> ReadRange:
    """Return what reads ranges of a blob of so many bytes; see `Store.read_range`."""
    return lambda start, length: store.read_range(key, start=start, length=length, size_bytes=size_bytes)


def resumed(read: ReadRange) -> ReadRange:
    """Return a reader that goes on where a range broke off, while every attempt brings something new."""

    def whole(start: int, length: int) -> Iterator[Piece]:
        end = start + length
        while True:
            before = start
            try:
                for piece in read(start, end - start):
                    start += len(piece)
                    yield piece
            except StoreUnavailableError:
                if start == before:
                    raise
                if start < end:
                    continue
            return

    return whole
