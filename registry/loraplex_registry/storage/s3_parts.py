"""The parts of a long file: which there are, whether a listed one is the signed one, and one as a readable body."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..errors import DigestMismatchError
from ..format.hashing import PIECE_BYTES, FileHasher
from ..format.manifest import CHUNK_BYTES, FileEntry
from .store import BlobProgress


@dataclass(frozen=True, slots=True)
class Part:
    """A part: number from 1, where it lies in the file, and its signed digest."""

    number: int
    start: int
    length: int
    sha256: str

    @property
    def checksum(self) -> str:
        """The digest as S3 writes it."""
        return base64.b64encode(bytes.fromhex(self.sha256)).decode("ascii")


def plan_parts(file: FileEntry) -> list[Part]:
    """Return the parts of a file that has chunk digests.

    Law: they are numbered from 1, lie one behind the other from 0 to the file's end, and all but the last have
    CHUNK_BYTES; part n has the n-th chunk's digest.
    """
    return [
        Part(index + 1, index * CHUNK_BYTES, min(CHUNK_BYTES, file.size - index * CHUNK_BYTES), digest)
        for index, digest in enumerate(file.chunk_digests)
    ]


def changed_error(name: str) -> DigestMismatchError:
    """Return the refusal of a file that is not the one that was checked any more."""
    return DigestMismatchError(f"{name} changed while it was published; leave it alone and push again.")


def with_chunks(source: BinaryIO, file: FileEntry) -> FileEntry:
    """Return the entry with chunk digests, made in one pass when it has none."""
    if file.chunks or file.size <= CHUNK_BYTES:
        return file
    hasher = FileHasher()
    source.seek(0)
    while piece := source.read(PIECE_BYTES):
        hasher.update(piece)
    found = hasher.entry(file.name)
    if (found.size, found.sha256) != (file.size, file.sha256):
        raise changed_error(file.name)
    return found


def is_good(entry: Any, part: Part) -> bool:
    """Say whether a listed part is the one that was signed."""
    return (
        entry.get("Size") == part.length
        and entry.get("ChecksumSHA256") == part.checksum
        and isinstance(entry.get("ETag"), str)
    )


class PartBody:
    """A part's bytes as a file that tells how far it was read; the SDK rewinds it to sign or to send again."""

    def __init__(self, body: bytes, told: BlobProgress) -> None:
        self._body = memoryview(body)
        self._told = told
        self._position = 0
        self._counted = 0

    def __len__(self) -> int:
        return len(self._body)

    def rewound(self) -> Any:
        """Return this file, at its start."""
        self._position = 0
        return self

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, at most `size`; all that are left when it is negative."""
        end = len(self._body) if size < 0 else self._position + size
        piece = bytes(self._body[self._position : end])
        self._position += len(piece)
        self._told(max(0, self._position - self._counted))
        self._counted = max(self._counted, self._position)
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move, and return the new position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._body)}[whence]
        self._position = min(max(0, start + offset), len(self._body))
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position
