"""Tags: mutable names for versions, each move a signed statement.

A tag object carries the signed statement *and* a copy of the record it points to, so resolving a tag is one request.
The statement is DSSE with a payload type of its own: the signature of an adapter can never pass for the signature of
a tag, nor the other way round. `generation` grows by one with every move and `prev` is the SHA-256 of the statement
before, which makes the history a chain.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Final

from .canonical import StrictJsonError, b64decode, canonical, exact_object, parse_canonical
from .errors import DamagedError, InvalidReferenceError, SignatureInvalidError
from .record import FORMAT, RECORD_BYTES_MAX, CommittedRecord, record_from_value
from .refs import AdapterRef, check_digest, check_name, check_tag, check_version
from .signing import PAYLOAD_BYTES_MAX, PublicKey, Signer, sign_envelope, verify_envelope

SCHEMA: Final = "loraplex.tag/1"
PAYLOAD_TYPE: Final = "application/vnd.loraplex.tag.v1+json"
GENERATION_MAX: Final = 1 << 50
"""Largest generation number."""

_FIELDS = frozenset(
    {"schema", "tenant", "adapter", "tag", "generation", "version", "manifest_sha256", "prev", "issued"}
)


@dataclass(frozen=True, slots=True)
class TagStatement:
    """What is signed: `tenant/adapter@tag` means `version` with manifest digest `manifest_sha256` from `issued` on.

    `prev` is the hex SHA-256 of the previous statement's payload, empty for generation 1.
    """

    tenant: str
    adapter: str
    tag: str
    generation: int
    version: int
    manifest_sha256: str
    prev: str
    issued: str

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
            if fields.pop("schema") != SCHEMA or not all(
                isinstance(fields[key], str) for key in fields if key not in {"generation", "version"}
            ):
                raise StrictJsonError("a field of the wrong kind")
            if type(fields["generation"]) is not int or not 1 <= fields["generation"] < GENERATION_MAX:
                raise StrictJsonError("generation is out of range")
            statement = cls(**fields)
            check_name("tenant", statement.tenant)
            check_name("adapter", statement.adapter)
            check_tag(statement.tag)
            check_version(statement.version)
            check_digest("sha256:" + statement.manifest_sha256)
        except (StrictJsonError, InvalidReferenceError) as error:
            raise SignatureInvalidError(
                f"The tag statement is refused ({error}); set the tag again."
            ) from error
        return statement


@dataclass(frozen=True, slots=True)
class TagObject:
    """A tag as stored: the envelope, the unverified statement in it, and the record it points to."""

    envelope: dict[str, Any]
    statement: TagStatement
    record: CommittedRecord

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        return canonical({"fmt": FORMAT, "tag": self.envelope, "record": self.record.to_value()})


def make_tag(statement: TagStatement, record: CommittedRecord, signer: Signer) -> TagObject:
    """Sign a statement and return the tag object."""
    return TagObject(sign_envelope(statement.to_bytes(), PAYLOAD_TYPE, signer), statement, record)


def read_tag(body: bytes, *, where: str) -> TagObject:
    """Read a tag object without verifying anything.

    Raises:
        DamagedError: not the canonical bytes of a tag object of format 1.
    """
    try:
        value = exact_object(
            parse_canonical(body, limit_bytes=RECORD_BYTES_MAX), frozenset({"fmt", "tag", "record"})
        )
        envelope = value["tag"]
        if type(value["fmt"]) is not int or value["fmt"] != FORMAT or not isinstance(envelope, dict):
            raise StrictJsonError(f"fmt is not {FORMAT}")
        statement = TagStatement.from_bytes(b64decode(envelope.get("payload")))
        record = record_from_value(value["record"], version=statement.version)
        if not isinstance(record, CommittedRecord):
            raise StrictJsonError("the record is not committed")
    except (StrictJsonError, SignatureInvalidError) as error:
        raise DamagedError(f"The tag {where} is damaged ({error}); set it again.") from error
    return TagObject(envelope, statement, record)


def verify_tag(tag: TagObject, key: PublicKey, *, ref: AdapterRef) -> TagStatement:
    """Return the statement, proven to be about `ref` (which has a tag), this record and signed by `key`.

    Raises:
        SignatureInvalidError: it is not.
    """
    statement = TagStatement.from_bytes(verify_envelope(tag.envelope, PAYLOAD_TYPE, key))
    if (statement.tenant, statement.adapter, statement.tag) != (ref.tenant, ref.adapter, ref.tag):
        raise SignatureInvalidError(
            f"The tag statement under {ref} was signed for {statement.tenant}/{statement.adapter}@{statement.tag}."
        )
    if "sha256:" + statement.manifest_sha256 != tag.record.digest:
        raise SignatureInvalidError(
            f"The tag {ref} was signed for another digest than it carries; set it again."
        )
    return statement
