"""Blobs in a store and bytes in memory, read as the product reads them."""

from collections.abc import Iterator

from loraplex_registry.storage.store import Piece, ReadRange, Store, blob_reader, resumed


def read_blob(store: Store, key: str, *, size_bytes: int) -> Iterator[Piece]:
    """Yield a whole blob in order, gone on with where the storage breaks off."""
    return resumed(blob_reader(store, key, size_bytes=size_bytes))(0, size_bytes)


def reader_of(body: bytes, *, piece_bytes: int = 1 << 20) -> ReadRange:
    """Return a reader of bytes that hands them over as a store does, in one buffer that is overwritten each time."""

    def read(start: int, length: int) -> Iterator[Piece]:
        buffer = bytearray(piece_bytes)
        for offset in range(start, start + length, piece_bytes):
            part = body[offset : min(offset + piece_bytes, start + length)]
            buffer[: len(part)] = part
            yield memoryview(buffer)[: len(part)]

    return read
