"""What an entry of the audit log is: its signed payload and its stored form. Nothing is verified here."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from ..errors import DamagedError
from ..format.canonical import StrictJsonError, b64decode, canonical, exact_object, parse_canonical
from ..format.record import FORMAT

SCHEMA: Final = "loraplex.audit/1"
PAYLOAD_TYPE: Final = "application/vnd.loraplex.audit.v1+json"
ENTRY_BYTES_MAX: Final = 64 << 10
"""Longest audit entry, in bytes (64 KiB)."""

ENTRIES_MAX: Final = 1 << 39
"""Entries are numbered below this."""

ACTIONS: Final = frozenset(
    {
        "push",
        "tag",
        "untag",
        "delete",
        "revoke",
        "resign",
        "rewrap",
        "attest",
        "repair",
        "shred",
        "key",
        "import",
    }
)
"""What may be recorded."""

DETAILS_MAX: Final = 16
_DETAIL_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_FIELDS = frozenset({"schema", "tenant", "number", "prev", "at", "actor", "action", "subject", "detail"})


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One entry: key `actor` did `action` to `subject` at `at` (UTC, `2026-01-31T09:00:00Z`).

    `prev` is the hex SHA-256 of the object before, empty for number 1; `detail` holds at most DETAILS_MAX short texts.
    """

    tenant: str
    number: int
    prev: str
    at: str
    actor: str
    action: str
    subject: str
    detail: tuple[tuple[str, str], ...] = ()

    def to_bytes(self) -> bytes:
        """Return the canonical payload that is signed."""
        return canonical({"schema": SCHEMA, **asdict(self), "detail": dict(self.detail)})

    @classmethod
    def from_bytes(cls, body: bytes) -> AuditEntry:
        """Read a payload.

        Raises:
            StrictJsonError: not the canonical bytes of an audit entry.
        """
        fields = exact_object(parse_canonical(body, limit_bytes=ENTRY_BYTES_MAX), _FIELDS)
        detail, number = fields.pop("detail"), fields["number"]
        if fields.pop("schema") != SCHEMA or type(number) is not int or not 1 <= number < ENTRIES_MAX:
            raise StrictJsonError("another schema, or a number out of range")
        texts = [fields[name] for name in ("tenant", "prev", "at", "actor", "action", "subject")]
        if not all(isinstance(text, str) and len(text) <= 512 for text in texts):
            raise StrictJsonError("a field of the wrong kind")
        if fields["action"] not in ACTIONS:
            raise StrictJsonError("an unknown action")
        return cls(**fields, detail=details_of(detail))


def read_entry(tenant: str, number: int, body: bytes) -> tuple[AuditEntry, dict[str, Any]]:
    """Read a stored entry without verifying anything; return it with the envelope it lies in.

    Raises:
        DamagedError: not the canonical bytes of an audit entry of format 1.
    """
    try:
        value = exact_object(parse_canonical(body, limit_bytes=ENTRY_BYTES_MAX), frozenset({"fmt", "entry"}))
        if type(value["fmt"]) is not int or value["fmt"] != FORMAT or not isinstance(value["entry"], dict):
            raise StrictJsonError(f"fmt is not {FORMAT}")
        return AuditEntry.from_bytes(b64decode(value["entry"].get("payload"))), value["entry"]
    except StrictJsonError as error:
        raise DamagedError(
            f"Audit entry {number} of {tenant} is damaged ({error}); restore it from a backup."
        ) from error


def details_of(value: object) -> tuple[tuple[str, str], ...]:
    """Return an entry's short facts in order.

    Raises:
        StrictJsonError: not an object of at most DETAILS_MAX short printable texts.
    """
    if not isinstance(value, dict) or len(value) > DETAILS_MAX:
        raise StrictJsonError("detail is not an object of acceptable length")
    for name, text in value.items():
        if not isinstance(name, str) or not _DETAIL_NAME.fullmatch(name):
            raise StrictJsonError("a detail has a name out of shape")
        if not isinstance(text, str) or len(text) > 512 or not (text == "" or text.isprintable()):
            raise StrictJsonError("a detail is too long or not printable")
    return tuple(sorted(value.items()))
