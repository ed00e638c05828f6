"""The seam between the registry and its storage: seven methods, two backends, one contract suite.

A store holds small objects that change only by compare-and-swap, and blobs that are written once under a key nobody
else uses. It knows nothing of adapters. What every backend promises:

- a read returns a whole object as some writer wrote it, and sees every write acknowledged before it began;
- of any number of concurrent `create` or `swap` calls from one state, exactly one succeeds;
- `etag` is opaque; equal etags mean equal bytes;
- a `StoreUnavailableError` with `ambiguous` set means the write may or may not have happened. Callers use
  `write_conditionally`, which reads back; nobody ever cleans up after a write with an unknown end.

Keys are paths of `[A-Za-z0-9._~-]` segments, built by `layout`. All methods may be called from many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from .errors import InvalidReferenceError, KeyAbsentError, KeyConflictError, StoreUnavailableError

if TYPE_CHECKING:
    from .manifest import FileEntry

WRITE_ATTEMPTS_MAX: Final = 4
"""How often one conditional write is tried when replies are lost."""

CHUNK_BYTES: Final = 1 << 20
"""Largest chunk a blob is handed over in, in bytes (1 MiB)."""

BlobProgress = Callable[[int], None]
"""Called with the number of bytes newly done."""


@dataclass(frozen=True, slots=True)
class Item:
    """A small object: its bytes and the etag to swap it by."""

    body: bytes
    etag: str


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
            DamagedError: longer than `limit_bytes`; at most that many are read.
            StoreUnavailableError, StoreRefusedError: the storage.
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

    def put_blob(self, key: str, path: Path, file: FileEntry, *, progress: BlobProgress | None = None) -> int:
        """Upload a file under a key of its own and return the number of requests it took. Repeating it is harmless.

        Raises:
            DigestMismatchError: the file is not the one `file` describes any more.
            StoreUnavailableError, StoreRefusedError: the storage.
        """

    def read_blob(self, key: str, *, size_bytes: int) -> Iterator[bytes]:
        """Yield a blob in order, in chunks of at most `CHUNK_BYTES`; never more than `size_bytes` in all.

        Raises:
            KeyAbsentError: no such blob.
            DigestMismatchError: the blob has another size.
            StoreUnavailableError, StoreRefusedError: the storage.
        """

    def children(self, prefix: str) -> Iterator[str]:
        """Yield the names directly under `prefix` (which ends in '/') in order; a deeper level appears as `name/`."""


def open_store(
    url: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    checksums: str = "when_required",
    timeout_s: float = 30.0,
) -> Store:
    """Return the store at `file:///path` (or a plain path) or `s3://bucket/prefix`. Touches neither disk nor network.

    Args:
        url: the root.
        endpoint_url: address of an S3 server other than AWS; default from `AWS_ENDPOINT_URL`.
        region: AWS region; default from the environment and profile.
        checksums: `when_required` or `when_supported`: whether the SDK adds checksums of its own to requests. Ours
            are always sent; the SDK's break some look-alikes (boto3#4392).
        timeout_s: longest silence of the storage within one request, in seconds.

    Raises:
        InvalidReferenceError: the address is neither form.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc and not parts.query and not parts.fragment:
        from .store_s3 import S3Store

        return S3Store(
            parts.netloc,
            parts.path.strip("/"),
            endpoint_url=endpoint_url,
            region=region,
            checksums=checksums,
            timeout_s=timeout_s,
        )
    if parts.scheme in {"file", ""} and not parts.netloc and parts.path:
        from .store_local import LocalStore

        return LocalStore(Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute())
    raise InvalidReferenceError(
        f"registry {url!r} is not an address; write file:///path or s3://bucket/prefix."
    )


def write_conditionally(store: Store, key: str, body: bytes, *, etag: str | None) -> str:
    """Create (`etag` None) or swap an object whose bytes nobody else could write, reading back when a reply is lost.

    Args:
        store: where.
        key: the object.
        body: must be unique to this call (it carries a random id), or a read-back could mistake another's for ours.
        etag: state the write applies to.

    Returns:
        The new etag.

    Raises:
        KeyConflictError: another writer was first.
        StoreUnavailableError: the storage stayed silent; `ambiguous` tells whether the write may have happened.
    """
    doubt = False
    for attempt in range(1, WRITE_ATTEMPTS_MAX + 1):
        try:
            return store.create(key, body) if etag is None else store.swap(key, body, etag=etag)
        except KeyConflictError:
            # After a lost reply, the state that stands in the way may be our own earlier write.
            written = _etag_if_ours(store, key, body) if doubt else None
            if written is None:
                raise
            return written
        except StoreUnavailableError as error:
            if not error.ambiguous and not doubt:
                raise
            doubt = True
            written = _read_back(store, key, body)
            if written is not None:
                return written
            if attempt == WRITE_ATTEMPTS_MAX:
                raise
    raise AssertionError("unreachable")


def _read_back(store: Store, key: str, body: bytes) -> str | None:
    try:
        return _etag_if_ours(store, key, body)
    except StoreUnavailableError as error:
        raise StoreUnavailableError(error.message, ambiguous=True) from error


def _etag_if_ours(store: Store, key: str, body: bytes) -> str | None:
    try:
        item = store.get(key, limit_bytes=max(len(body), 1) * 4 + (1 << 20))
    except KeyAbsentError:
        return None
    return item.etag if item.body == body else None
