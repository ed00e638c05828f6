"""Stores that lie: a real store behind them, but blobs that never end, drip, are short, or are padded with nothing."""

import time
from collections.abc import Iterator
from typing import Any

from loraplex_registry.errors import StoreUnavailableError
from loraplex_registry.storage.store import Piece, Store
from tests.registry.flaky_store import FaultyStore

PIECE_BYTES = 1 << 20
WAYS = (
    "endless",
    "endless zeros",
    "endless nothing",
    "one byte more",
    "one byte less",
    "drip",
    "breaks off",
    "huge piece",
)


class LyingStore(FaultyStore):
    """Answers every range in the way `how` says and counts the bytes it gave; metadata is told truly."""

    def __init__(self, store: Store, how: str) -> None:
        super().__init__(store)
        self._how = how
        self.given_bytes = 0
        self.asked_bytes = 0
        self.pieces = 0

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        self.asked_bytes += length
        for piece in self._pieces(key, start, length, size_bytes):
            self.given_bytes += len(piece)
            self.pieces += 1
            yield piece

    def _pieces(self, key: str, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        honest: Any = self.store.read_range(key, start=start, length=length, size_bytes=size_bytes)
        if self._how == "endless nothing":
            while True:
                yield b""
        if self._how == "endless zeros":
            while True:
                yield bytes(PIECE_BYTES)
        if self._how == "drip":
            for piece in honest:
                for at in range(len(piece)):
                    time.sleep(0.01)
                    yield bytes(piece[at : at + 1])
        if self._how == "huge piece":
            yield bytes(64 * PIECE_BYTES)
        body = b"".join(bytes(piece) for piece in honest)
        if self._how == "one byte less":
            yield body[:-1]
            return
        if self._how == "breaks off":
            yield body[: len(body) // 2]
            raise StoreUnavailableError("reset")
        yield body
        yield b"x"
        while self._how == "endless":
            yield bytes(PIECE_BYTES)
