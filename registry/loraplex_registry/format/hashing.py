"""The digests of a file, made in one pass: SHA-256 of the whole and of each of its chunks."""

from __future__ import annotations

import hashlib
import os
from typing import Final

from .manifest import CHUNK_BYTES, FileEntry

PIECE_BYTES: Final = 1 << 20
"""A good size of the pieces handed to `FileHasher.update`, in bytes: small enough for a processor's cache."""


class FileHasher:
    """Takes a file's bytes in order, in pieces of any size, and gives its `FileEntry`.

    Law: the entry depends on the bytes alone, not on how they were cut into pieces.
    """

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._chunk = hashlib.sha256()
        self._chunks: list[str] = []
        self._size = 0

    def update(self, piece: bytes | memoryview) -> None:
        """Take the next bytes."""
        view = memoryview(piece)
        self._whole.update(view)
        while len(view):
            room = CHUNK_BYTES - self._size % CHUNK_BYTES
            self._chunk.update(view[:room])
            self._size += len(view[:room])
            view = view[room:]
            if self._size % CHUNK_BYTES == 0:
                self._end_chunk()

    def entry(self, name: str) -> FileEntry:
        """Return the entry of everything taken so far; nothing may be taken afterwards."""
        if self._size % CHUNK_BYTES:
            self._end_chunk()
        chunks = tuple(self._chunks) if len(self._chunks) > 1 else ()
        return FileEntry(name, self._size, self._whole.hexdigest(), chunks)

    def _end_chunk(self) -> None:
        self._chunks.append(self._chunk.hexdigest())
        self._chunk = hashlib.sha256()


def chunk_digest(descriptor: int, index: int, *, size_bytes: int) -> str:
    """Return the hex SHA-256 of one chunk of an open file of `size_bytes` bytes; its position stays.

    Raises:
        OSError: it cannot be read.
    """
    digest, start = hashlib.sha256(), index * CHUNK_BYTES
    end = min(start + CHUNK_BYTES, size_bytes)
    while start < end:
        piece = os.pread(descriptor, min(PIECE_BYTES, end - start), start)
        if not piece:
            break  # shorter than it should be, which shows in the digest
        digest.update(piece)
        start += len(piece)
    return digest.hexdigest()


def entry_of(name: str, body: bytes) -> FileEntry:
    """Return the entry of a file that holds `body`."""
    hasher = FileHasher()
    hasher.update(body)
    return hasher.entry(name)
