"""A client of a store that does what the product does about faults: read back, take up again, ask again."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loraplex_registry.errors import StoreUnavailableError
from loraplex_registry.storage.store import BlobProgress, Item, Piece, Store, StoredBlob, write_conditionally

TRIES_MAX = 5


class SureStore:
    """Writes by `write_conditionally`, reads ranges whole before it hands them on; for stores with lost replies.

    Bodies must be unique to each write, as `write_conditionally` demands.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def url(self) -> str:
        return self.store.url

    def prepare(self) -> None:
        self.store.prepare()

    def get(self, key: str, *, limit_bytes: int) -> Item:
        return self.store.get(key, limit_bytes=limit_bytes)

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        return self.store.changed(key, etag=etag, limit_bytes=limit_bytes)

    def create(self, key: str, body: bytes) -> str:
        return write_conditionally(self.store, key, body, etag=None)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        return write_conditionally(self.store, key, body, etag=etag)

    def put_blob(self, key: str, path: Path, file: Any, *, progress: BlobProgress | None = None) -> int:
        return self.store.put_blob(key, path, file, progress=progress)

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        for attempt in range(1, TRIES_MAX + 1):
            try:
                pieces = self.store.read_range(key, start=start, length=length, size_bytes=size_bytes)
                whole = [bytes(piece) for piece in pieces]
            except StoreUnavailableError:
                if attempt == TRIES_MAX:
                    raise
                continue
            yield from whole
            return

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        return self.store.children(prefix, after=after)

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        return self.store.blobs(prefix)

    def delete_blobs(self, keys: Iterable[str]) -> int:
        return self.store.delete_blobs(keys)
