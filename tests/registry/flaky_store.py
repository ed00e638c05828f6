"""A store that loses requests, replies or its process at a chosen call; everything else is a real store."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraplex_registry.errors import StoreError, StoreUnavailableError
from loraplex_registry.store import BlobProgress, Item, Store

WRITES = ("create", "swap", "put_blob")


class CrashError(BaseException):
    """The process dies here; nobody may catch it and tidy up."""


class FlakyStore:
    """Passes calls on to `store`; call number `at` (from 0, all methods counted) fails in the way `how` says.

    `lost request`: nothing happens. `lost reply`: it happens. Both raise an ambiguous error. `crash before` and
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

    def create(self, key: str, body: bytes) -> str:
        return self._call("create", key, body)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        return self._call("swap", key, body, etag=etag)

    def put_blob(self, key: str, path: Path, file: Any, *, progress: BlobProgress | None = None) -> int:
        return self._call("put_blob", key, path, file, progress=progress)

    def read_blob(self, key: str, *, size_bytes: int) -> Iterator[bytes]:
        return self._call("read_blob", key, size_bytes=size_bytes)

    def children(self, prefix: str) -> Iterator[str]:
        return self._call("children", prefix)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        if self.dead:
            raise CrashError
        number = len(self.calls)
        self.calls.append(name)
        method = getattr(self._store, name)
        if number != self._at:
            return method(*args, **options)
        if self._how in {"lost reply", "crash after"}:
            with contextlib.suppress(StoreError):  # whatever the answer is, it does not arrive
                method(*args, **options)
        if self._how.startswith("crash"):
            self.dead = True
            raise CrashError
        raise StoreUnavailableError("lost", ambiguous=name in WRITES)
