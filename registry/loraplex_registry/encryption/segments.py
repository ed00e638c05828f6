"""Reading any range of a file that Tink's AES256_GCM_HKDF_1MB encrypted, on as many threads as one likes.

The wire format (https://developers.google.com/tink/streaming-aead/aes_gcm_hkdf_streaming): a header of 40 bytes, its
own length, a salt and a nonce prefix; then segments of 1 MiB of AES-256-GCM ciphertext with its tag, the header being
part of the first one's 1 MiB, and the last being shorter. The file's key is HKDF-SHA256 of the data key with the salt
and the associated data; a segment's nonce is the prefix, its number, and whether it is the last. So every segment can
be decrypted and authenticated by itself, and one that was moved, exchanged, changed or left out is noticed.

Tink's own reader takes a file from its beginning to its end on one thread, at a third of the speed of AES-GCM here.

Promises: each piece handed over is authentic, as the bytes at this place of this file; only the segments that a range
touches are asked for, and the header once; at most two segments are held per range being read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Final

from ..storage.store import Piece, ReadRange

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SEGMENT_BYTES: Final = 1 << 20
"""Bytes of one ciphertext segment (1 MiB); the last one is shorter."""

HEADER_BYTES: Final = 40
"""Bytes before the first segment's ciphertext: its own length, a salt of 32 and a nonce prefix of 7."""

TAG_BYTES: Final = 16
"""Bytes of authentication tag at the end of every segment."""

KEY_BYTES: Final = 32
"""Bytes of a data key, and of the key of each file that is derived from it."""

_PLAIN_BYTES: Final = SEGMENT_BYTES - TAG_BYTES
_SALT_BYTES: Final = 32


class SegmentError(ValueError):
    """Not the ciphertext of this file under this key."""


def segments_of(plain_bytes: int) -> int:
    """Return how many segments so many bytes of plaintext (0 or more) have; there is always one."""
    return max(1, -(-(plain_bytes + HEADER_BYTES) // _PLAIN_BYTES))


def ciphertext_size(plain_bytes: int) -> int:
    """Return the exact bytes of ciphertext for so many bytes of plaintext (0 or more)."""
    return HEADER_BYTES + plain_bytes + TAG_BYTES * segments_of(plain_bytes)


class SegmentedFile:
    """One encrypted file. Safe for many threads."""

    def __init__(self, read: ReadRange, key: bytes, associated_data: bytes, size_bytes: int) -> None:
        """Read nothing yet.

        Args:
            read: gives ranges of the ciphertext.
            key: the data key, KEY_BYTES.
            associated_data: what the ciphertext is bound to.
            size_bytes: of the plaintext, as signed; it says where the ciphertext must end.
        """
        self._read = read
        self._key = key
        self._associated_data = associated_data
        self._size = size_bytes
        self._lock = threading.Lock()  # guards _cipher, and that one thread alone asks for the header
        self._cipher: _Cipher | None = None

    def read(self, start: int, length: int) -> Iterator[Piece]:
        """Yield `length` bytes of plaintext from `start`, in order, in pieces of less than SEGMENT_BYTES.

        A piece is good until the next one is asked for.

        Raises:
            SegmentError: not this file, or the range is not within it.
            Others: what `read` raises.
        """
        if not 0 <= start <= start + length <= self._size:
            raise SegmentError("the range is not within the file")
        number = (start + HEADER_BYTES) // _PLAIN_BYTES
        last = (start + max(length, 1) - 1 + HEADER_BYTES) // _PLAIN_BYTES
        begin = number * SEGMENT_BYTES
        end = min((last + 1) * SEGMENT_BYTES, ciphertext_size(self._size))
        cipher = self._known_cipher() if number else None
        plain = memoryview(bytearray(min(end - begin, _PLAIN_BYTES)))
        with contextlib.closing(_segments(self._read(begin, end - begin), end - begin)) as segments:
            for segment in segments:
                if number == 0:
                    cipher = self._learned(bytes(segment[:HEADER_BYTES]))
                    segment = segment[HEADER_BYTES:]
                assert cipher is not None
                opened = plain[: len(segment) - TAG_BYTES]
                cipher.open(segment, opened, number, last=number == segments_of(self._size) - 1)
                offset = max(number * _PLAIN_BYTES - HEADER_BYTES, 0)
                wanted = opened[max(start - offset, 0) : start + length - offset]
                if len(wanted):
                    yield wanted
                number += 1

    def _known_cipher(self) -> _Cipher:
        with self._lock:
            if self._cipher is None:
                with contextlib.closing(_segments(self._read(0, HEADER_BYTES), HEADER_BYTES)) as pieces:
                    self._cipher = self._derived(bytes(next(pieces)))
            return self._cipher

    def _learned(self, header: bytes) -> _Cipher:
        """Return the cipher of a header that came with the first segment, and spare others to ask for it."""
        cipher = self._derived(header)
        with self._lock:
            self._cipher = self._cipher or cipher
        return cipher

    def _derived(self, header: bytes) -> _Cipher:
        if len(header) != HEADER_BYTES or header[0] != HEADER_BYTES:
            raise SegmentError("the header is damaged")
        return _Cipher(
            self._key, header[1 : 1 + _SALT_BYTES], self._associated_data, header[1 + _SALT_BYTES :]
        )


class _Cipher:
    """AES-256-GCM with the key of one file."""

    def __init__(self, key: bytes, salt: bytes, associated_data: bytes, nonce_prefix: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        derived = HKDF(SHA256(), KEY_BYTES, salt, associated_data).derive(key)
        self._aead: AESGCM = AESGCM(derived)
        self._nonce_prefix = nonce_prefix

    def open(self, segment: memoryview, plain: memoryview, number: int, *, last: bool) -> None:
        """Decrypt a segment into `plain`, which has exactly its length; other Python threads run meanwhile."""
        from cryptography.exceptions import InvalidTag

        nonce = self._nonce_prefix + number.to_bytes(4, "big") + bytes([last])
        try:
            self._aead.decrypt_into(nonce, segment, None, plain)
        except InvalidTag as error:
            raise SegmentError(f"segment {number} is not authentic") from error


def _segments(pieces: Iterator[Piece], length: int) -> Generator[memoryview, None, None]:
    """Cut `length` bytes that begin with a segment into segments; one that lies within a piece is not copied."""
    held, gathered = memoryview(bytearray(min(SEGMENT_BYTES, length))), 0
    try:
        for piece in pieces:
            view = memoryview(piece)
            while len(view):
                size = min(SEGMENT_BYTES, length)
                if size == 0:
                    raise SegmentError("the storage sends more than was asked for")
                if not gathered and len(view) >= size:
                    segment, view = view[:size], view[size:]
                else:
                    part, view = view[: size - gathered], view[size - gathered :]
                    held[gathered : gathered + len(part)] = part
                    gathered += len(part)
                    if gathered < size:
                        continue
                    segment, gathered = held[:size], 0
                length -= size
                yield segment
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
    if length:
        raise SegmentError("the storage sends less than was asked for")
