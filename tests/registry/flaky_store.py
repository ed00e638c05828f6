"""Stores that lose requests, replies or their process, or where others get in between; behind them is a real store."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from loraplex_registry.errors import StoreError, StoreUnavailableError
from loraplex_registry.storage.store import Item, Piece, Store, StoredBlob, StoredUpload

WRITES = ("create", "swap", "put_blob", "delete_blobs", "abort_upload")

LISTS = ("read_range", "children", "blobs", "uploads")


class CrashError(BaseException):
    """The process dies here; nobody may catch it and tidy up."""


class FaultyStore:
    """Passes calls on to `store`, one by one as `fate` decides. Listings and ranges are read to their end at once.

    `lost request`: nothing happens. `lost reply`: it happens. Both raise an ambiguous error. `crash before` and
    `crash after` raise CrashError, from then on at every call, as a dead process would make none.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.calls: list[str] = []
        self.dead = False

    def fate(self, name: str) -> str:
        """Say what becomes of a call: nothing in particular (""), or one of the four ways."""
        return ""

    @property
    def url(self) -> str:
        return self.store.url

    def prepare(self) -> None:
        self.store.prepare()

    def get(self, key: str, *, limit_bytes: int) -> Item:
        return self._call("get", key, limit_bytes=limit_bytes)

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        return self._call("changed", key, etag=etag, limit_bytes=limit_bytes)

    def create(self, key: str, body: bytes) -> str:
        return self._call("create", key, body)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        return self._call("swap", key, body, etag=etag)

    def put_blob(self, key: str, path: Path, file: Any, **options: Any) -> int:
        return self._call("put_blob", key, path, file, **options)

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        return iter(self._call("read_range", key, start=start, length=length, size_bytes=size_bytes))

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        return iter(self._call("children", prefix, after=after))

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        return iter(self._call("blobs", prefix))

    def delete_blobs(self, keys: Iterable[str]) -> int:
        return self._call("delete_blobs", list(keys))

    def uploads(self, prefix: str, *, before_s: float) -> Iterator[StoredUpload]:
        return iter(self._call("uploads", prefix, before_s=before_s))

    def abort_upload(self, key: str, upload_id: str) -> None:
        self._call("abort_upload", key, upload_id)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        if self.dead:
            raise CrashError
        fate = self.fate(name)
        self.calls.append(name)
        if fate in {"lost reply", "crash after"}:
            with contextlib.suppress(StoreError):  # whatever the answer is, it does not arrive
                self._do(name, *args, **options)
        if fate.startswith("crash"):
            self.dead = True
            raise CrashError
        if fate:
            raise StoreUnavailableError("lost", ambiguous=name in WRITES)
        return self._do(name, *args, **options)

    def _do(self, name: str, *args: Any, **options: Any) -> Any:
        answer = getattr(self.store, name)(*args, **options)
        return list(map(_kept, answer)) if name in LISTS else answer


class FlakyStore(FaultyStore):
    """Call number `at` (from 0, all methods counted) fails in the way `how` says.

    `down` loses this request and all after it.
    """

    def __init__(self, store: Store, *, at: int | None = None, how: str = "lost reply") -> None:
        super().__init__(store)
        self._at = at
        self._how = how

    def fate(self, name: str) -> str:
        if self._at is None or len(self.calls) < self._at:
            return ""
        if self._how == "down":
            return "lost request"
        return self._how if len(self.calls) == self._at else ""


class ChaosStore(FaultyStore):
    """Fails at random. Everything random comes from `rng`, so a seed tells all.

    Args:
        store: a real store.
        rng: decides.
        rate: share of calls whose request or reply is lost.
        crash_at: number of the call (from 0) at which the process dies, before or after it took effect.
    """

    def __init__(
        self, store: Store, rng: random.Random, *, rate: float = 0.0, crash_at: int | None = None
    ) -> None:
        super().__init__(store)
        self._rng = rng
        self._rate = rate
        self._crash_at = crash_at

    def fate(self, name: str) -> str:
        if len(self.calls) == self._crash_at:
            return "crash after" if self._rng.random() < 0.5 else "crash before"
        if self._rng.random() < self._rate:
            return "lost reply" if self._rng.random() < 0.5 else "lost request"
        return ""


class Meanwhile(FaultyStore):
    """Somebody else acts just before each of the first calls of one method: the first act before the first call, …"""

    def __init__(self, store: Store, method: str, acts: Iterable[Callable[[], object]]) -> None:
        super().__init__(store)
        self._method = method
        self._acts = iter(acts)

    def fate(self, name: str) -> str:
        act = next(self._acts, None) if name == self._method else None
        if act is not None:
            act()
        return ""


def _kept(item: Any) -> Any:
    return bytes(item) if isinstance(item, memoryview) else item
