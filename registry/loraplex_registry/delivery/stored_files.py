"""The files of one verified version as the store holds them: inline or as a blob, in clear or encrypted.

Everything handed over has the signed digest. A tag embeds a copy of the version's record that may be older than the
record itself (`repair` and `rewrap` replace where the bytes lie and which key opens them): when a blob is missing or
damaged, or no key opens the data key, the record is read again once, and the download goes on from there if it holds
the same signed manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, TypeVar

from ..encryption.data_keys import DataKey, open_data_key
from ..encryption.key_providers import KeyContext, KeyRing
from ..encryption.segments import ciphertext_size
from ..errors import (
    DamagedError,
    DigestMismatchError,
    KeyAbsentError,
    PolicyRefusedError,
    RegistryError,
    SettingsError,
)
from ..format import layout
from ..format.manifest import FileEntry
from ..format.record import CommittedRecord, StoredFile
from ..lifecycle.versions import get_record
from ..storage.store import ReadRange, Store, blob_reader, resumed
from ..trust.verdict import VerifiedManifest
from ..validation.base import Progress
from .download import Look, download

_T = TypeVar("_T")

_OLD_COPY: Final = (KeyAbsentError, DigestMismatchError, PolicyRefusedError, SettingsError)
"""What reading by an older record may end with: blobs collected or damaged since, a data key wrapped by another key."""


class StoredFiles:
    """See the module. One per download; used by one thread at a time."""

    def __init__(self, store: Store, verified: VerifiedManifest, keys: KeyRing | None = None) -> None:
        """Look at a version; nothing is requested yet.

        Args:
            store: where it lies.
            verified: the version.
            keys: the keys that may unwrap an encrypted version's data key.
        """
        self.verified = verified
        self._store = store
        self._ring = keys
        self._record = verified.record
        self._reread = False
        self._key: DataKey | None = None

    def body(self, name: str) -> bytes:
        """Return one small file.

        Raises:
            DigestMismatchError: the store holds other bytes than were signed.
            DamagedError: its blob is gone.
            PolicyRefusedError, SettingsError: it is encrypted and no key fits.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        file = self.verified.manifest.file(name)

        def read(stored: StoredFile) -> bytes:
            body = self._body(stored, file)
            if (len(body), hashlib.sha256(body).hexdigest()) != (file.size, file.sha256):
                raise DigestMismatchError(
                    f"{self._what(name)} differs from the signed digest; the store is damaged or was tampered with."
                )
            return body

        return self._found(name, read)

    def into(
        self,
        name: str,
        target: int,
        *,
        look: Look | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Download one file into a new file; see `download.download`.

        Raises:
            As `body`, and what `look` raises.
            OSError: the disk.
        """
        file = self.verified.manifest.file(name)
        what = self._what(name)

        def fill(stored: StoredFile) -> None:
            read = self._reader(stored, file)
            download(read, file, target, what=what, look=look, progress=progress)

        self._found(name, fill)

    def _body(self, stored: StoredFile, file: FileEntry) -> bytes:
        return b"".join(map(bytes, resumed(self._reader(stored, file))(0, file.size)))

    def _reader(self, stored: StoredFile, file: FileEntry) -> ReadRange:
        """Return what reads ranges of the plaintext."""
        encrypted = self._record.encryption is not None
        if stored.inline is not None:
            body = self._data_key().opened(stored.inline, file) if encrypted else stored.inline
            return lambda start, length: iter([body[start : start + length]])
        key = f"{layout.adapter_prefix(self.verified.ref)}{stored.blob}"
        if not encrypted:
            return blob_reader(self._store, key, size_bytes=file.size)
        ciphertext = blob_reader(self._store, key, size_bytes=ciphertext_size(file.size))
        return self._data_key().decrypting(ciphertext, file)

    def _data_key(self) -> DataKey:
        if self._key is None:
            envelope, ref = self._record.encryption, self.verified.ref
            assert envelope is not None
            if not self._ring:
                raise PolicyRefusedError(
                    f"{ref} is encrypted; set encryption_key to the key it was pushed with."
                )
            version = self.verified.manifest.version
            context = KeyContext.of(ref, version, self._record.pid)
            self._key = open_data_key(self._ring, envelope, context)
        return self._key

    def _found(self, name: str, use: Callable[[StoredFile], _T]) -> _T:
        try:
            return use(self._record.file(name))
        except _OLD_COPY as error:
            if not self._reread and self._read_record_again():
                return self._found(name, use)
            told = self._told(name, error)
            if told is None:
                raise
            raise told from error

    def _told(self, name: str, error: RegistryError) -> RegistryError | None:
        """Return damage in words that name the next step; None for what is no damage."""
        next_step = (
            f"run `registry fsck {self.verified.ref.name} --deep` to see what is damaged, and `--repair --from COPY` "
            "to mend it from a pulled directory or another registry."
        )
        if isinstance(error, KeyAbsentError):
            return DamagedError(f"{self._what(name)} is gone from the store; {next_step}")
        if isinstance(error, DigestMismatchError):
            return DigestMismatchError(f"{error.message.rstrip('.')}: {next_step}")
        return None

    def _read_record_again(self) -> bool:
        """Take the version's own record instead of a tag's copy, if it is another one of the same manifest."""
        self._reread = True
        found = get_record(self._store, self.verified.ref, self.verified.manifest.version)
        record = None if found is None else found[0]
        if not isinstance(record, CommittedRecord) or record.manifest_bytes != self._record.manifest_bytes:
            return False
        if record == self._record:
            return False
        if (record.encryption is None) != (self._record.encryption is None):
            return False  # the policy judged what the tag carried; encryption must not be taken off behind its back
        self._record, self._key = record, None
        return True

    def _what(self, name: str) -> str:
        return f"{name} of {self.verified.ref}"


class Meter:
    """Adds up bytes for a progress callback; it never runs past the total when a part is fetched again."""

    def __init__(self, progress: Progress | None, *, total_bytes: int) -> None:
        self._progress = progress
        self._total = total_bytes
        self._done = 0

    def add(self, size_bytes: int) -> None:
        """Count bytes newly done."""
        self._done = min(self._done + size_bytes, self._total)
        if self._progress is not None:
            self._progress("fetch", self._done, self._total)
