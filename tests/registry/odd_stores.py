"""Storages that say yes and do not mean it: what look-alikes of S3 were found to do."""

import threading
import time
from collections.abc import Iterator

from loraplex_registry.errors import KeyAbsentError
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Item


class IgnoresCreate(MemoryStore):
    """Takes `If-None-Match: *` and replaces the object (mountx#19)."""

    def create(self, key: str, body: bytes) -> str:
        try:
            return super().swap(key, body, etag=self.get(key, limit_bytes=1 << 20).etag)
        except KeyAbsentError:
            return super().create(key, body)


class IgnoresSwap(MemoryStore):
    """Takes `If-Match` and writes whatever is there, or is not there."""

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        with self._lock:
            self._put(key, body)
        return self.get(key, limit_bytes=1 << 20).etag


class IgnoresBoth(IgnoresSwap):
    """Ignores both conditions."""

    def create(self, key: str, body: bytes) -> str:
        return super().swap(key, body, etag="")


class SwapMakes(MemoryStore):
    """Keeps `If-Match` where there is an object, and makes one where there is none."""

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        try:
            self.get(key, limit_bytes=1 << 20)
        except KeyAbsentError:
            return super().create(key, body)
        return super().swap(key, body, etag=etag)


class _TwoAtOnce(MemoryStore):
    """Lets the second of two writers that come at once win too; alone, everybody is treated right."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self._meeting = threading.Condition()
        self._inside: dict[str, int] = {}

    def _second(self, key: str) -> bool:
        """Say whether this is the second of at least two writers of `key` at this moment."""
        with self._meeting:
            number = self._inside[key] = self._inside.get(key, 0) + 1
            self._meeting.notify_all()
            if number == 1:
                self._meeting.wait_for(lambda: self._inside[key] >= 2, 0.002)
            return number == 2

    def _left(self, key: str) -> None:
        with self._meeting:
            self._inside[key] -= 1


class TwoCreate(_TwoAtOnce):
    """Two of many concurrent creates win (versitygw#2288)."""

    def create(self, key: str, body: bytes) -> str:
        second = self._second(key)
        try:
            if second:
                with self._lock:
                    self._put(key, body)
                return self.get(key, limit_bytes=1 << 20).etag
            return super().create(key, body)
        finally:
            self._left(key)


class TwoSwap(_TwoAtOnce):
    """Two of many concurrent swaps win (rustfs#1659)."""

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        second = self._second(key)
        try:
            if second:
                with self._lock:
                    self._put(key, body)
                return self.get(key, limit_bytes=1 << 20).etag
            return super().swap(key, body, etag=etag)
        finally:
            self._left(key)


class StaleReads(MemoryStore):
    """Serves some reads from a copy that lags behind."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self._old: dict[str, Item] = {}

    def get(self, key: str, *, limit_bytes: int) -> Item:
        item = super().get(key, limit_bytes=limit_bytes)
        return self._old.setdefault(key, item)


class StaleLists(MemoryStore):
    """Lists objects only when they are a moment old."""

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        late = time.time() - 0.5
        for name in super().children(prefix, after=after):
            found = self._objects.get(prefix + name)
            if found is None or found.modified_s < late:
                yield name


class AlwaysChanged(MemoryStore):
    """Answers a conditional read with the object, changed or not."""

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        return self.get(key, limit_bytes=limit_bytes)


class NeverChanged(MemoryStore):
    """Answers every conditional read with 304."""

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        return None


class WrongClock(MemoryStore):
    """Its clock is a day late."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name, clock=lambda: time.time() - 86_400)


class CannotDelete(MemoryStore):
    """Says that it deleted, and did not."""

    def delete_blobs(self, keys: object) -> int:
        return 1
