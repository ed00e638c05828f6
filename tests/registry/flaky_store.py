"""A store that loses requests, replies or its process at a chosen call; everything else is a real store."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loraplex_registry.errors import StoreError, StoreUnavailableError
from loraplex_registry.storage.store import BlobProgress, Item, Piece, Store, StoredBlob

WRITES = ("create", "swap", "put_blob", "delete_blobs")


class CrashError(BaseException):
    """The process dies here; nobody may catch it and tidy up."""


class FlakyStore:
    """Passes calls on to `store`; call number `at` (from 0, all methods counted) fails in the way `how` says.

    `lost request`: nothing happens. `lost reply`: it happens. Both raise an ambiguous error. `down` loses this request
    and all after it. `crash before` and
    `crash after` raise CrashError from then on at every call, as a dead process would make none.
    """

    def __init__(self, store: Store, *, at: int | None = None, how: str = "lost reply") -> None:
        self._store = store
        self._at = at
        self._how = how
        self.calls: list[str] = []
        self.dead = False

    @property
    def url(self) -> str:
        return self._store.url

    def prepare(self) -> None:
        self._store.prepare()

    def get(self, key: str, *, limit_bytes: int) -> Item:
        return self._call("get", key, limit_bytes=limit_bytes)

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        return self._call("changed", key, etag=etag, limit_bytes=limit_bytes)

    def create(self, key: str, body: bytes) -> str:
        return self._call("create", key, body)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        return self._call("swap", key, body, etag=etag)

    def put_blob(self, key: str, path: Path, file: Any, *, progress: BlobProgress | None = None) -> int:
        return self._call("put_blob", key, path, file, progress=progress)

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        return self._call("read_range", key, start=start, length=length, size_bytes=size_bytes)

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        return self._call("children", prefix, after=after)

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        return self._call("blobs", prefix)

    def delete_blobs(self, keys: Iterable[str]) -> int:
        return self._call("delete_blobs", list(keys))

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        if self.dead:
            raise CrashError
        number = len(self.calls)
        self.calls.append(name)
        method = getattr(self._store, name)
        down = self._how == "down" and self._at is not None and number >= self._at
        if number != self._at and not down:
            return method(*args, **options)
        if self._how in {"lost reply", "crash after"}:
            with contextlib.suppress(StoreError):  # whatever the answer is, it does not arrive
                method(*args, **options)
        if self._how.startswith("crash"):
            self.dead = True
            raise CrashError
        raise StoreUnavailableError("lost", ambiguous=name in WRITES)
