"""Tags: mutable names for versions, each move a signed statement.

A tag object carries the signed statement *and* a copy of the record it points to, so resolving a tag is one request.
The statement is DSSE with a payload type of its own: the signature of an adapter can never pass for the signature of
a tag, nor the other way round. `generation` grows by one with every move and `prev` is the SHA-256 of the statement
before, which makes the history a chain. Removing a tag is a move too, to nothing: the object stays and its
generations never begin again, so an older statement put back is always seen as older.

Before a statement is replaced it is kept under `layout.tag_log_key`, so `registry log` has no gaps.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from ..errors import DamagedError, InvalidReferenceError, SignatureInvalidError
from ..refs import Version, check_digest, check_name, check_tag, check_version
from ..signing import PAYLOAD_BYTES_MAX, Signer, sign_envelope
from .canonical import StrictJsonError, b64decode, canonical, exact_object, parse_canonical
from .record import FORMAT, RECORD_BYTES_MAX, CommittedRecord, record_from_value

SCHEMA: Final = "loraplex.tag/1"
PAYLOAD_TYPE: Final = "application/vnd.loraplex.tag.v1+json"
GENERATION_MAX: Final = 1_000_000_000
"""Generation numbers are below this."""

_FIELDS = frozenset(
    {
        "schema",
        "tenant",
        "adapter",
        "tag",
        "generation",
        "version",
        "manifest_sha256",
        "prev",
        "issued",
        "expires",
    }
)
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TagStatement:
    """What is signed: `tenant/adapter@tag` means `version` with manifest digest `manifest_sha256` from `issued` on.

    A removed tag has version None and an empty digest. `prev` is the hex SHA-256 of the previous statement's payload,
    empty for generation 1. `expires` is the time from which the statement is not believed any more, empty for never;
    both times are UTC to the second, `2026-01-31T09:00:00Z`.
    """

    tenant: str
    adapter: str
    tag: str
    generation: int
    version: Version | None
    manifest_sha256: str
    prev: str
    issued: str
    expires: str = ""

    def to_bytes(self) -> bytes:
        """Return the canonical payload that is signed."""
        return canonical({"schema": SCHEMA, **asdict(self)})

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the payload; the next statement's `prev`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, body: bytes) -> TagStatement:
        """Read a payload.

        Raises:
            SignatureInvalidError: not the canonical bytes of a tag statement.
        """
        try:
            fields = exact_object(parse_canonical(body, limit_bytes=PAYLOAD_BYTES_MAX), _FIELDS)
            if fields.pop("schema") != SCHEMA:
                raise StrictJsonError("another schema")
            statement = cls(**fields)
            _check_statement(statement)
        except (StrictJsonError, InvalidReferenceError) as error:
            raise SignatureInvalidError(
                f"The tag statement is refused ({error}); set the tag again."
            ) from error
        return statement


def _check_statement(statement: TagStatement) -> None:
    texts = (statement.tenant, statement.adapter, statement.tag, statement.prev, statement.issued)
    if not all(isinstance(text, str) for text in (*texts, statement.expires, statement.manifest_sha256)):
        raise StrictJsonError("a field of the wrong kind")
    check_name("tenant", statement.tenant)
    check_name("adapter", statement.adapter)
    check_tag(statement.tag)
    if type(statement.generation) is not int or not 1 <= statement.generation < GENERATION_MAX:
        raise StrictJsonError("generation is out of range")
    if (statement.generation == 1) != (statement.prev == "") or (
        statement.prev and not _HEX64.fullmatch(statement.prev)
    ):
        raise StrictJsonError("prev is out of shape")
    for moment in (statement.issued, statement.expires or statement.issued):
        _check_moment(moment)
    if statement.version is None:
        if statement.manifest_sha256:
            raise StrictJsonError("a removed tag names a digest")
        return
    if type(statement.version) is not int and not isinstance(statement.version, str):
        raise StrictJsonError("version is neither a number nor a text")
    check_version(statement.version)
    check_digest("sha256:" + statement.manifest_sha256)


def _check_moment(text: str) -> None:
    try:
        if not _MOMENT.fullmatch(text):
            raise ValueError(text)
        dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise StrictJsonError("a time is out of shape") from error


@dataclass(frozen=True, slots=True)
class TagObject:
    """A tag as stored: the envelope, the unverified statement in it, and the record it points to, None if removed."""

    envelope: dict[str, Any]
    statement: TagStatement
    record: CommittedRecord | None

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        record = None if self.record is None else self.record.to_value()
        return canonical({"fmt": FORMAT, "tag": self.envelope, "record": record})

    def to_log_bytes(self) -> bytes:
        """Return the form in which the statement is kept once it was replaced."""
        return canonical({"fmt": FORMAT, "tag": self.envelope})


def make_tag(statement: TagStatement, record: CommittedRecord | None, *signers: Signer) -> TagObject:
    """Sign a statement with every signer and return the tag object."""
    return TagObject(sign_envelope(statement.to_bytes(), PAYLOAD_TYPE, *signers), statement, record)


def read_tag(body: bytes, *, where: str) -> TagObject:
    """Read a tag object without verifying anything.

    Raises:
        DamagedError: not the canonical bytes of a tag object of format 1.
    """
    try:
        value = exact_object(
            parse_canonical(body, limit_bytes=RECORD_BYTES_MAX), frozenset({"fmt", "tag", "record"})
        )
        envelope, statement = _read_statement(value)
        record = None
        if statement.version is not None:
            record = record_from_value(value["record"], version=statement.version)
        elif value["record"] is not None:
            raise StrictJsonError("a removed tag carries a record")
        if record is not None and not isinstance(record, CommittedRecord):
            raise StrictJsonError("the record is not committed")
    except (StrictJsonError, SignatureInvalidError) as error:
        raise DamagedError(f"The tag {where} is damaged ({error}); set it again.") from error
    return TagObject(envelope, statement, record)


def read_tag_log(body: bytes, *, where: str) -> TagObject:
    """Read a statement kept in a tag's log, without verifying anything; its record is None.

    Raises:
        DamagedError: not the canonical bytes of a log entry of format 1.
    """
    try:
        value = exact_object(parse_canonical(body, limit_bytes=RECORD_BYTES_MAX), frozenset({"fmt", "tag"}))
        envelope, statement = _read_statement(value)
    except (StrictJsonError, SignatureInvalidError) as error:
        raise DamagedError(
            f"The log of tag {where} is damaged ({error}); restore it from a backup."
        ) from error
    return TagObject(envelope, statement, None)


def _read_statement(value: dict[str, Any]) -> tuple[dict[str, Any], TagStatement]:
    envelope = value["tag"]
    if type(value["fmt"]) is not int or value["fmt"] != FORMAT or not isinstance(envelope, dict):
        raise StrictJsonError(f"fmt is not {FORMAT}")
    return envelope, TagStatement.from_bytes(b64decode(envelope.get("payload")))
