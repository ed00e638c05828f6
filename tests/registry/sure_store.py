"""A client of a store that does what the product does about faults: read back, take up again, ask again."""

from collections.abc import Iterator

from loraplex_registry.errors import StoreUnavailableError
from loraplex_registry.storage.store import Piece, write_conditionally
from tests.registry.flaky_store import FaultyStore

TRIES_MAX = 5


class SureStore(FaultyStore):
    """Writes by `write_conditionally`, reads ranges whole before it hands them on; for stores with lost replies.

    Bodies must be unique to each write, as `write_conditionally` demands.
    """

    def create(self, key: str, body: bytes) -> str:
        return write_conditionally(self.store, key, body, etag=None)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        return write_conditionally(self.store, key, body, etag=etag)

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        for attempt in range(1, TRIES_MAX + 1):
            try:
                whole = list(super().read_range(key, start=start, length=length, size_bytes=size_bytes))
            except StoreUnavailableError:
                if attempt == TRIES_MAX:
                    raise
                continue
            yield from whole
            return
