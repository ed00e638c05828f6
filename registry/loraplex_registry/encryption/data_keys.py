"""Client-side encryption of a version's files: what the storage holds is ciphertext, and only of this version.

Every push makes one random data key. Its files, inline ones too, are encrypted with it by Tink's streaming AEAD
(AES-256-GCM in segments of 1 MiB, https://developers.google.com/tink/streaming-aead) and read by `segments`. The data
key lies in the record, wrapped by a key-encryption key (`key_providers`) that does not.

What is promised:

- a file decrypts only as the file of this name, size and SHA-256, of this push of this version of this adapter of
  this tenant; anything else, and any change, cut, reordering or exchange of ciphertext or wrapped key, is refused with
  one of the declared errors, never with Tink's;
- at most `ciphertext_size(size)` bytes of a file are ever read, and no more than two MiB per range are held;
- plaintext never touches disk here; ciphertext may;
- no `repr`, message or log holds a key.

What is not: Tink's AEAD does not commit to a key. That is harmless only because size and SHA-256 of the plaintext are
signed, and every reader compares them; do not use this module without the manifest. The manifest itself is not
encrypted: whoever reads the bucket learns names, sizes and digests, and can confirm a guess of a whole file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from ..errors import DigestMismatchError, PolicyRefusedError
from ..format.manifest import FileEntry
from ..format.record import Encryption
from ..refs import AdapterRef, Version
from ..storage.store import Piece, ReadRange
from ..validation.weights import open_regular
from .key_providers import KeyContext, KeyProvider, KeyRing
from .keysets import KeysetError, Kind, key_value, new_keyset, primitive
from .segments import SegmentedFile, SegmentError, ciphertext_size

ALGORITHM: Final = "tink-AES256_GCM_HKDF_1MB"
"""The one algorithm accepted, as records name it."""

PIECE_BYTES: Final = 1 << 20
"""Bytes of plaintext encrypted at once."""


class DataKey:
    """The key of one push. Made by `new_data_key` and `open_data_key`; safe to use from many threads."""

    __slots__ = ("_encryption", "_key", "_keyset", "_tink", "context")

    def __init__(self, keyset: bytes, encryption: Encryption, context: KeyContext) -> None:
        self._key = key_value(keyset, Kind.STREAMING)
        self._keyset = keyset
        self._tink: Any = None  # made when something is encrypted; reading does without
        self._encryption = encryption
        self.context = context

    @property
    def encryption(self) -> Encryption:
        """What the record says: algorithm, key-encryption key, wrapped data key."""
        return self._encryption

    def inline(self, file: FileEntry, body: bytes) -> bytes:
        """Return the ciphertext of a small file. `file` describes the plaintext.

        Raises:
            DigestMismatchError: `body` is not the file described.
        """
        sink = _Sink(io.BytesIO())
        self._encrypt(io.BytesIO(body), file, sink)
        return sink.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    @contextlib.contextmanager
    def blob(self, file: FileEntry, path: Path) -> Iterator[tuple[Path, FileEntry]]:
        """Encrypt the file at `path` into a temporary file and yield that, with the ciphertext's size and SHA-256.

        The temporary file lies in a directory that only this user can enter, below `$TMPDIR`, and is gone afterwards.

        Args:
            file: name, size and SHA-256 of the plaintext.
            path: where it is, a regular file.

        Raises:
            DigestMismatchError: the file is not the one described.
        """
        with tempfile.TemporaryDirectory(prefix="loraplex-") as directory:
            target = Path(directory) / "ciphertext"
            with target.open("xb") as out, open_regular(path) as source:
                sink = _Sink(out)
                self._encrypt(source, file, sink)
            yield target, FileEntry(file.name, sink.size, sink.digest.hexdigest())

    def opened(self, ciphertext: bytes, file: FileEntry) -> bytes:
        """Return the plaintext of a file whose ciphertext is held in memory; `file` is from the signed manifest.

        Raises:
            DigestMismatchError: not the ciphertext of this file under this key.
        """
        if len(ciphertext) != ciphertext_size(file.size):
            _refuse(self.context, file)
        read = self.decrypting(lambda start, length: iter([ciphertext[start : start + length]]), file)
        return b"".join(map(bytes, read(0, file.size)))

    def decrypting(self, read: ReadRange, file: FileEntry) -> ReadRange:
        """Return what reads ranges of a file's plaintext, on any number of threads; see `segments`.

        Args:
            read: reads ranges of the ciphertext, a blob of `ciphertext_size(file.size)` bytes. What it raises is passed
                on unchanged; its ranges are closed when those of the plaintext are.
            file: the file wanted, from the signed manifest.

        Raises:
            DigestMismatchError: while it is read: not the ciphertext of this file under this key.
        """
        segmented = SegmentedFile(read, self._key, self.context.of_file(file), file.size)

        def plain(start: int, length: int) -> Iterator[Piece]:
            try:
                yield from segmented.read(start, length)
            except SegmentError as error:
                _refuse(self.context, file, error)

        return plain

    def _encrypt(self, source: BinaryIO, file: FileEntry, sink: _Sink) -> None:
        """Encrypt `source` to its end into `sink`, checking that it is the file described."""
        digest, size = hashlib.sha256(), 0
        self._tink = self._tink or primitive(self._keyset, Kind.STREAMING)
        with self._tink.new_encrypting_stream(sink, self.context.of_file(file)) as stream:
            while chunk := source.read(PIECE_BYTES):
                size += len(chunk)
                digest.update(chunk)
                stream.write(chunk)
        if (size, digest.hexdigest()) != (file.size, file.sha256):
            raise DigestMismatchError(
                f"{file.name} changed while it was published; leave it alone and push again."
            )

    def __repr__(self) -> str:
        return f"DataKey({self.context}, {self._encryption.kek})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a data key is not copied or stored")


class RingSealer:
    """Encrypts pushes: each with a new data key under the first key of a ring. See `content.Sealer`."""

    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring

    def begin(self, ref: AdapterRef, version: Version, pid: str) -> DataKey:
        """Make the data key of one push and wrap it.

        Raises:
            SettingsError: no key is configured, or its file cannot be used.
            PolicyRefusedError, StoreUnavailableError, StoreRefusedError: see `KeyProvider.wrap`.
        """
        return new_data_key(self._ring.wrapping(ref.tenant), KeyContext.of(ref, version, pid))


def new_data_key(provider: KeyProvider, context: KeyContext) -> DataKey:
    """Make the data key of a push and wrap it.

    Raises:
        PolicyRefusedError, StoreUnavailableError, StoreRefusedError: see `KeyProvider.wrap`.
    """
    keyset = new_keyset(Kind.STREAMING)
    encryption = Encryption(ALGORITHM, provider.uri, provider.wrap(keyset, context))
    return DataKey(keyset, encryption, context)


def open_data_key(ring: KeyRing, encryption: Encryption, context: KeyContext) -> DataKey:
    """Return the data key of a record, for the version it was asked for.

    Args:
        ring: the configured keys; the record's word only selects among them.
        encryption: from the record, not believed.
        context: tenant, adapter and version as verified, and the record's push id.

    Raises:
        PolicyRefusedError: an unknown algorithm, or a key that is not configured for this tenant.
        DigestMismatchError: the data key was not wrapped for this context.
        SettingsError, StoreUnavailableError, StoreRefusedError: the key.
    """
    keyset = unwrapped_keyset(ring, encryption, context)
    try:
        return DataKey(keyset, encryption, context)
    except KeysetError as error:
        raise DigestMismatchError(
            f"What the record of {context} wraps is not a data key; push it again."
        ) from error


def unwrapped_keyset(ring: KeyRing, encryption: Encryption, context: KeyContext) -> bytes:
    """Return the serialised data key, a secret; see `open_data_key`. For wrapping it again."""
    if encryption.alg != ALGORITHM:
        raise PolicyRefusedError(
            f"{context} is encrypted with {encryption.alg[:64]!r}, which is not accepted; {ALGORITHM} is."
        )
    return ring.unwrapping(context.tenant, encryption.kek).unwrap(encryption.wrapped, context)


class _Sink(io.RawIOBase):
    """Passes ciphertext on to a file, counting and hashing it. Does not close the file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, body: Any) -> int:
        self.file.write(body)
        self.digest.update(body)
        self.size += len(body)
        return len(body)


def _refuse(context: KeyContext, file: FileEntry, error: BaseException | None = None) -> NoReturn:
    raise DigestMismatchError(
        f"{file.name} of {context} does not decrypt to the signed file; the store is damaged or was tampered with."
    ) from error
