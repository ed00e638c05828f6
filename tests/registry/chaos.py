"""A store that fails at random: requests and replies are lost at a rate, and the process may die at a chosen call."""

import contextlib
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from loraplex_registry.errors import StoreError, StoreUnavailableError
from loraplex_registry.storage.store import BlobProgress, Item, Piece, Store, StoredBlob
from tests.registry.flaky_store import WRITES, CrashError


class ChaosStore:
    """Passes calls on to `store`. Everything random comes from `rng`, so a seed tells all.

    Args:
        store: a real store.
        rng: decides.
        rate: share of calls whose request or reply is lost.
        crash_at: number of the call (from 0) at which the process dies, before or after it took effect.
    """

    def __init__(
        self, store: Store, rng: random.Random, *, rate: float = 0.0, crash_at: int | None = None
    ) -> None:
        self._store = store
        self._rng = rng
        self._rate = rate
        self._crash_at = crash_at
        self.calls = 0
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
        return iter(self._call("read_range", key, start=start, length=length, size_bytes=size_bytes))

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        return iter(self._call("children", prefix, after=after))

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        return iter(self._call("blobs", prefix))

    def delete_blobs(self, keys: Iterable[str]) -> int:
        return self._call("delete_blobs", list(keys))

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        if self.dead:
            raise CrashError
        number = self.calls
        self.calls += 1
        if number == self._crash_at:
            if self._rng.random() < 0.5:
                self._silently(name, *args, **options)
            self.dead = True
            raise CrashError
        if self._rng.random() < self._rate:
            if self._rng.random() < 0.5:
                self._silently(name, *args, **options)
            raise StoreUnavailableError("lost", ambiguous=name in WRITES)
        return self._do(name, *args, **options)

    def _do(self, name: str, *args: Any, **options: Any) -> Any:
        """Do a call at this moment: listings are read to their end, as one page is."""
        answer = getattr(self._store, name)(*args, **options)
        return list(map(_kept, answer)) if name in {"read_range", "children", "blobs"} else answer

    def _silently(self, name: str, *args: Any, **options: Any) -> None:
        with contextlib.suppress(StoreError):  # whatever the answer is, it does not arrive
            self._do(name, *args, **options)


def _kept(item: Any) -> Any:
    return bytes(item) if isinstance(item, memoryview) else item
