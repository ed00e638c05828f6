"""The commit record of a version: its states, and how each is read and written.

```
 (absent) ──create──▶ pending ──swap──▶ committed ──swap──▶ deleting ──swap──▶ deleted
                        │  ▲               ▲  │                │
            lease over  ▼  │ next pusher   │  └─ new storage,  │ still referenced
                      aborted              │     new signature │
                                           └───────────────────┘
```

Each arrow is one conditional write on one object, so a version is either wholly there or not there at all, whoever
crashes whenever. A lease only says when another pusher *may try*; whether it wins is decided by the swap, never by a
clock. `pid` is random per push, so no two bodies are ever equal and an ETag never comes back. A deleted record stays
as a tombstone: a version's name never comes to mean something else.

Nothing in a record is believed: the manifest in it is signed, the rest can only make a verification fail.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ..errors import DamagedError
from ..refs import Version
from .canonical import StrictJsonError, b64decode, b64encode, canonical, exact_object, parse_canonical
from .layout import blob_name
from .manifest import FILES_MAX, MANIFEST_BYTES_MAX, Manifest, digest_of

FORMAT: Final = 1
RECORD_BYTES_MAX: Final = 1 << 20
"""Longest record or tag object, in bytes (1 MiB)."""

INLINE_FILE_BYTES_MAX: Final = 64 << 10
"""Longest file kept inside the record, in bytes (64 KiB)."""

INLINE_TOTAL_BYTES_MAX: Final = 256 << 10
"""Most bytes kept inside one record (256 KiB)."""

ATTESTATIONS_MAX: Final = 8
"""Most signed statements attached to a version."""

ATTESTATION_BYTES_MAX: Final = 64 << 10
"""Longest attached statement in canonical JSON, in bytes (64 KiB)."""

ATTESTATIONS_BYTES_MAX: Final = 256 << 10
"""Most bytes of attached statements of one record (256 KiB)."""

WRAPPED_KEY_BYTES_MAX: Final = 8 << 10
"""Longest wrapped data key, in bytes (8 KiB)."""

CIPHER_OVERHEAD_BYTES_MAX: Final = 1 << 10
"""Most bytes encryption adds to an inline file (1 KiB)."""

LEASE_S: Final = 3600
"""Seconds after which another pusher may try to take over a pending push."""

_PID = re.compile(r"[0-9a-f]{32}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_INT_MAX = 1 << 50


@dataclass(frozen=True, slots=True)
class PendingRecord:
    """A reservation: push `pid` by key `by` began at `started_s` (seconds since 1970) and may take `lease_s`."""

    pid: str
    by: str
    started_s: int
    lease_s: int

    def lease_over(self, now_s: float) -> bool:
        """Say whether another pusher may try to take over."""
        return now_s > self.started_s + self.lease_s

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        return canonical(
            {
                "fmt": FORMAT,
                "state": "pending",
                "pid": self.pid,
                "by": self.by,
                "t": self.started_s,
                "lease_s": self.lease_s,
            }
        )


@dataclass(frozen=True, slots=True)
class AbortedRecord:
    """A push that was given up; its blobs can never be referenced again."""

    pid: str
    reason: str

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        return canonical({"fmt": FORMAT, "state": "aborted", "pid": self.pid, "reason": self.reason})


@dataclass(frozen=True, slots=True)
class Encryption:
    """How the stored bytes are encrypted: algorithm, the key-encryption key's URI, the data key wrapped by it."""

    alg: str
    kek: str
    wrapped: bytes

    def to_value(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"alg": self.alg, "kek": self.kek, "wrapped": b64encode(self.wrapped)}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Where a file's bytes are: `inline` holds them, or `blob` is their key relative to the adapter.

    In an encrypted version both hold ciphertext; `size` and `sha256` are of the plaintext always.
    """

    name: str
    size: int
    sha256: str
    inline: bytes | None = None
    blob: str | None = None

    def to_value(self) -> dict[str, Any]:
        """Return the JSON form."""
        where = {"key": self.blob} if self.inline is None else {"inline": b64encode(self.inline)}
        return {"name": self.name, "size": self.size, "sha256": self.sha256, **where}


@dataclass(frozen=True, slots=True)
class CommittedRecord:
    """A published version: the signed manifest, its bundle, and where the files are.

    `rev` grows by one with every change of the record after the commit, so that the bytes of an earlier state never
    come back, and a request of then that arrives late finds another etag. Records that differ in nothing else are
    equal.
    """

    pid: str
    manifest_bytes: bytes
    bundle: dict[str, Any]
    files: tuple[StoredFile, ...]
    attest: tuple[dict[str, Any], ...] = ()
    encryption: Encryption | None = None
    rev: int = field(default=0, compare=False)

    def revised(self, **changes: Any) -> CommittedRecord:
        """Return the record with fields changed, as the next state after this one."""
        return replace(self, rev=self.rev + 1, **changes)

    @property
    def digest(self) -> str:
        """`sha256:` and the hex SHA-256 of the manifest: the version's identity."""
        return digest_of(self.manifest_bytes)

    def file(self, name: str) -> StoredFile:
        """Return where a file is.

        Raises:
            DamagedError: the record does not say.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        raise DamagedError(f"The record of push {self.pid[:8]} lacks {name}; publish the adapter again.")

    def manifest_unverified(self) -> Manifest:
        """Return the manifest without any check of its signature: for listings, never for loading."""
        return Manifest.from_bytes(self.manifest_bytes)

    def to_value(self) -> dict[str, Any]:
        """Return the JSON form, as stored and as embedded in tags."""
        encryption = {} if self.encryption is None else {"enc": self.encryption.to_value()}
        return {
            "fmt": FORMAT,
            "state": "committed",
            "pid": self.pid,
            "rev": self.rev,
            "manifest": b64encode(self.manifest_bytes),
            "bundle": self.bundle,
            "attest": list(self.attest),
            "storage": {"files": [file.to_value() for file in self.files], **encryption},
        }

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        return canonical(self.to_value())


@dataclass(frozen=True, slots=True)
class DeletingRecord:
    """A version being deleted since `started_s` by key or person `by`: not readable, but nothing is lost yet."""

    by: str
    started_s: int
    record: CommittedRecord

    @property
    def pid(self) -> str:
        """Push id of the version."""
        return self.record.pid

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        return canonical(
            {
                "fmt": FORMAT,
                "state": "deleting",
                "pid": self.pid,
                "by": self.by,
                "t": self.started_s,
                "record": self.record.to_value(),
            }
        )


@dataclass(frozen=True, slots=True)
class DeletedRecord:
    """A tombstone: what the version was and since when (seconds since 1970) it is gone. Its blobs may be removed."""

    pid: str
    manifest_sha256: str
    deleted_s: int
    reason: str

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        return canonical(
            {
                "fmt": FORMAT,
                "state": "deleted",
                "pid": self.pid,
                "manifest_sha256": self.manifest_sha256,
                "t": self.deleted_s,
                "reason": self.reason,
            }
        )


Record = PendingRecord | AbortedRecord | CommittedRecord | DeletingRecord | DeletedRecord


def read_record(body: bytes, *, version: Version, where: str) -> Record:
    """Read a record.

    Args:
        body: the stored bytes.
        version: the version the record was found under; blob keys must agree with it.
        where: the reference, for messages.

    Raises:
        DamagedError: not the canonical bytes of a record of format 1.
    """
    try:
        return record_from_value(parse_canonical(body, limit_bytes=RECORD_BYTES_MAX), version=version)
    except StrictJsonError as error:
        raise DamagedError(
            f"The record of {where} is damaged ({error}); `registry fsck --repair --from REGISTRY` restores it."
        ) from error


def record_from_value(value: object, *, version: Version) -> Record:
    """Return the record in a parsed JSON value.

    Raises:
        StrictJsonError: not a record of format 1.
    """
    if not isinstance(value, dict) or type(value.get("fmt")) is not int or value["fmt"] != FORMAT:
        raise StrictJsonError(f"fmt is not {FORMAT}")
    state = value.get("state")
    if state == "pending":
        fields = exact_object(value, frozenset({"fmt", "state", "pid", "by", "t", "lease_s"}))
        return PendingRecord(
            _pid(fields["pid"]), _text(fields["by"]), _whole(fields["t"]), _whole(fields["lease_s"])
        )
    if state == "aborted":
        fields = exact_object(value, frozenset({"fmt", "state", "pid", "reason"}))
        return AbortedRecord(_pid(fields["pid"]), _text(fields["reason"]))
    if state == "committed":
        return _committed(value, version)
    if state == "deleting":
        return _deleting(value, version)
    if state == "deleted":
        fields = exact_object(value, frozenset({"fmt", "state", "pid", "manifest_sha256", "t", "reason"}))
        if not isinstance(fields["manifest_sha256"], str) or not _HEX64.fullmatch(fields["manifest_sha256"]):
            raise StrictJsonError("a digest is out of shape")
        return DeletedRecord(
            _pid(fields["pid"]), fields["manifest_sha256"], _whole(fields["t"]), _text(fields["reason"])
        )
    raise StrictJsonError("unknown state")


def _deleting(value: dict[str, Any], version: Version) -> DeletingRecord:
    fields = exact_object(value, frozenset({"fmt", "state", "pid", "by", "t", "record"}))
    record = record_from_value(fields["record"], version=version)
    if not isinstance(record, CommittedRecord) or record.pid != fields["pid"]:
        raise StrictJsonError("the record being deleted is not a committed one of this push")
    return DeletingRecord(_text(fields["by"]), _whole(fields["t"]), record)


def _committed(value: dict[str, Any], version: Version) -> CommittedRecord:
    fields = exact_object(
        value, frozenset({"fmt", "state", "pid", "rev", "manifest", "bundle", "attest", "storage"})
    )
    pid = _pid(fields["pid"])
    manifest = b64decode(fields["manifest"])
    if len(manifest) > MANIFEST_BYTES_MAX or not isinstance(fields["bundle"], dict):
        raise StrictJsonError("manifest or bundle is out of shape")
    storage = exact_object(fields["storage"], frozenset({"files"}), optional=frozenset({"enc"}))
    entries = storage["files"]
    if not isinstance(entries, list) or not 0 < len(entries) <= FILES_MAX:
        raise StrictJsonError("storage.files is not a list of acceptable length")
    encryption = _encryption(storage["enc"]) if "enc" in storage else None
    files = tuple(_stored_file(entry, encrypted=encryption is not None) for entry in entries)
    blobs = [file.blob for file in files if file.blob is not None]
    if blobs != [blob_name(version, pid, index) for index in range(len(blobs))]:
        raise StrictJsonError("a blob key does not belong to this push")
    return CommittedRecord(
        pid,
        manifest,
        fields["bundle"],
        files,
        check_attestations(fields["attest"]),
        encryption,
        _whole(fields["rev"]),
    )


def check_attestations(value: object) -> tuple[dict[str, Any], ...]:
    """Return a record's attached statements, checked for number and size alone.

    Raises:
        StrictJsonError: more or longer ones than a record may hold.
    """
    if not isinstance(value, list) or len(value) > ATTESTATIONS_MAX:
        raise StrictJsonError("attest is not a list of acceptable length")
    if not all(isinstance(item, dict) for item in value):
        raise StrictJsonError("an attestation is not an object")
    sizes = [len(canonical(item)) for item in value]
    if any(size > ATTESTATION_BYTES_MAX for size in sizes) or sum(sizes) > ATTESTATIONS_BYTES_MAX:
        raise StrictJsonError("the attestations are too long")
    return tuple(value)


def _encryption(value: object) -> Encryption:
    fields = exact_object(value, frozenset({"alg", "kek", "wrapped"}))
    wrapped = b64decode(fields["wrapped"])
    if not 0 < len(wrapped) <= WRAPPED_KEY_BYTES_MAX:
        raise StrictJsonError("the wrapped key is empty or too long")
    return Encryption(_text(fields["alg"]), _text(fields["kek"], limit=1024), wrapped)


def _stored_file(value: object, *, encrypted: bool) -> StoredFile:
    fields = exact_object(value, frozenset({"name", "size", "sha256"}), optional=frozenset({"key", "inline"}))
    if ("key" in fields) == ("inline" in fields) or not isinstance(fields["sha256"], str):
        raise StrictJsonError("a file must be either inline or a blob")
    if not _HEX64.fullmatch(fields["sha256"]):
        raise StrictJsonError("a digest is out of shape")
    name, size = _text(fields["name"]), _whole(fields["size"])
    if "key" in fields:
        return StoredFile(name, size, fields["sha256"], blob=_text(fields["key"]))
    inline = b64decode(fields["inline"])
    if size > INLINE_FILE_BYTES_MAX:
        raise StrictJsonError("an inline file is too long")
    if encrypted:  # its plaintext is checked when it is decrypted
        if not size < len(inline) <= size + CIPHER_OVERHEAD_BYTES_MAX:
            raise StrictJsonError("an inline file has another size than encryption gives it")
    elif len(inline) != size:
        raise StrictJsonError("an inline file has another size than stated")
    elif hashlib.sha256(inline).hexdigest() != fields["sha256"]:
        raise StrictJsonError("an inline file has another digest than stated")
    return StoredFile(name, size, fields["sha256"], inline=inline)


def _pid(value: object) -> str:
    if not isinstance(value, str) or not _PID.fullmatch(value):
        raise StrictJsonError("pid is out of shape")
    return value


def _text(value: object, *, limit: int = 256) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise StrictJsonError("a text is missing or too long")
    return value


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < _INT_MAX:
        raise StrictJsonError("a number is not whole or out of range")
    return value
