"""The audit log of a tenant: who did what, append-only, each entry signed and chained to the one before.

Entry number n is an object that is only ever created, never replaced, and whose payload names the SHA-256 of object
n-1. Appending is therefore one create-if-absent of the next number: of two writers one wins, the other reads the
winner's entry and takes the number after it. There is no head object that all writers would fight for, and an entry
taken out, changed or put in breaks the chain of everything behind it.

What the log proves: everything in it was said by the key named, in this order. What it cannot prove by itself: that
nobody cut off its end, or acted without writing to it. `reconcile` compares it with what the registry holds, and
keeping the last number and hash elsewhere (`registry audit verify` prints them) shows a cut.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from ..errors import ConflictError, DamagedError, KeyAbsentError, KeyConflictError, RegistryError
from ..format import layout
from ..format.canonical import StrictJsonError, b64decode, canonical, exact_object, parse_canonical
from ..format.record import FORMAT
from ..refs import check_name
from ..signing import PublicKey, Signer, envelope_keyids, sign_envelope, verify_envelope
from ..storage.store import Store, write_conditionally

SCHEMA: Final = "loraplex.audit/1"
PAYLOAD_TYPE: Final = "application/vnd.loraplex.audit.v1+json"
ENTRY_BYTES_MAX: Final = 64 << 10
"""Longest audit entry, in bytes (64 KiB)."""

ENTRIES_MAX: Final = 1 << 39
"""Entries are numbered below this."""

APPENDS_MAX: Final = 64
"""How often an append goes on to the next number when rivals take it."""

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
        return cls(**fields, detail=_details(detail))


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `verify_log` found.

    Attributes:
        entries: number of entries whose place in the chain is proven.
        head: hex SHA-256 of the last object, empty for an empty log; with `entries` it shows a cut end later on.
        findings: what is wrong, one sentence each; empty when all is well.
    """

    entries: int
    head: str
    findings: tuple[str, ...]


class AuditLog:
    """The log of one tenant in a store. Remembers where the end was, so that appending again is one request."""

    def __init__(self, store: Store, tenant: str) -> None:
        check_name("tenant", tenant)
        self._store = store
        self._tenant = tenant
        self._last: tuple[int, str] = (0, "")  # number and hash of the last entry known

    @property
    def last(self) -> int:
        """Number of the last entry known to this object, 0 before it looked."""
        return self._last[0]

    def append(
        self,
        action: str,
        subject: str,
        signer: Signer,
        now: dt.datetime,
        *,
        detail: Mapping[str, str] | None = None,
        near: int = 0,
    ) -> AuditEntry:
        """Add an entry and return it.

        Takes one request when the end is known, else about 2 * log2(entries behind `near`).

        Args:
            action: one of ACTIONS.
            subject: what it was done to, as `acme/orders@3`.
            signer: whose key did it.
            now: the time, with its zone.
            detail: short names and texts.
            near: an entry number known to exist, where the search for the end begins.

        Raises:
            ConflictError: rivals kept taking the next number.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        self._find_end(near)
        at = now.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for _ in range(APPENDS_MAX):
            number, prev = self._last
            entry = AuditEntry(
                self._tenant,
                number + 1,
                prev,
                at,
                signer.keyid,
                action,
                subject,
                _details(dict(detail or {})),
            )
            body = canonical({"fmt": FORMAT, "entry": sign_envelope(entry.to_bytes(), PAYLOAD_TYPE, signer)})
            try:
                write_conditionally(self._store, self._key(number + 1), body, etag=None)
            except KeyConflictError:
                self._step()
                continue
            self._last = (number + 1, hashlib.sha256(body).hexdigest())
            return entry
        raise ConflictError(f"The audit log of {self._tenant} keeps growing under this write; try again.")

    def bodies(self, *, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield number and stored bytes of every entry behind number `after`, in order; one request each."""
        for name in self._store.children(
            layout.audit_prefix(self._tenant), after=f"{after:012d}.json" if after else ""
        ):
            stem = name.removesuffix(".json")
            if stem != name and len(stem) == 12 and stem.isascii() and stem.isdigit():
                yield int(stem), self._store.get(self._key(int(stem)), limit_bytes=ENTRY_BYTES_MAX).body

    def entries(self, *, after: int = 0) -> Iterator[AuditEntry]:
        """Yield entries in order, unverified.

        Raises:
            DamagedError: one cannot be read.
        """
        for number, body in self.bodies(after=after):
            yield self._read(number, body)[0]

    def hash_of(self, number: int) -> str | None:
        """Return the hex SHA-256 of entry `number` as stored, None when there is no such entry."""
        if number == 0:
            return ""
        try:
            body = self._store.get(self._key(number), limit_bytes=ENTRY_BYTES_MAX).body
        except KeyAbsentError:
            return None
        return hashlib.sha256(body).hexdigest()

    def _find_end(self, near: int) -> None:
        """Gallop from the last entry known: 1, 2, 4 .. further, then halve between the last hit and the first miss."""
        if self._last[0]:
            return  # a rival's entry behind it is met, and stepped over, by the write itself
        low, step = near if near and self._exists(near) else 0, 1
        while self._exists(low + step):
            low, step = low + step, step * 2
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._exists(middle) else (low, middle)
        if low:
            self._remember(low)

    def _exists(self, number: int) -> bool:
        try:
            self._store.get(self._key(number), limit_bytes=ENTRY_BYTES_MAX)
        except KeyAbsentError:
            return False
        return True

    def _step(self) -> None:
        self._remember(self._last[0] + 1)

    def _remember(self, number: int) -> None:
        body = self._store.get(self._key(number), limit_bytes=ENTRY_BYTES_MAX).body
        self._last = (number, hashlib.sha256(body).hexdigest())

    def _key(self, number: int) -> str:
        return layout.audit_key(self._tenant, number)

    def _read(self, number: int, body: bytes) -> tuple[AuditEntry, Any]:
        try:
            value = exact_object(
                parse_canonical(body, limit_bytes=ENTRY_BYTES_MAX), frozenset({"fmt", "entry"})
            )
            if (
                type(value["fmt"]) is not int
                or value["fmt"] != FORMAT
                or not isinstance(value["entry"], dict)
            ):
                raise StrictJsonError(f"fmt is not {FORMAT}")
            return AuditEntry.from_bytes(b64decode(value["entry"].get("payload"))), value["entry"]
        except StrictJsonError as error:
            raise DamagedError(
                f"Audit entry {number} of {self._tenant} is damaged ({error}); restore it from a backup."
            ) from error

    def verify(self, key_of: Callable[[str], PublicKey | None]) -> AuditReport:
        """Check the whole log: numbers without gap, chain, tenant, and every signature.

        Args:
            key_of: returns the public key of a key id, None when it is not known.
        """
        findings: list[str] = []
        count, head = 0, ""
        for number, body in self.bodies():
            if number != count + 1:
                findings.append(f"entry {count + 1} is missing; the log was cut or an entry removed")
            fault = self._fault(number, body, head if number == count + 1 else None, key_of)
            if fault is not None:
                findings.append(f"entry {number}: {fault}")
            count, head = number, hashlib.sha256(body).hexdigest()
        return AuditReport(count, head, tuple(findings))

    def _fault(
        self, number: int, body: bytes, prev: str | None, key_of: Callable[[str], PublicKey | None]
    ) -> str | None:
        try:
            entry, envelope = self._read(number, body)
            if (entry.tenant, entry.number) != (self._tenant, number):
                return f"it was signed as number {entry.number} of {entry.tenant}"
            if prev is not None and entry.prev != prev:
                return "it does not follow from the entry before; one of the two was replaced"
            keyids = envelope_keyids(envelope)
            key = key_of(entry.actor)
            if key is None or keyids != (entry.actor,):
                return f"it is signed by key {keyids[0][:16]}…, which is not known here"
            verify_envelope(envelope, PAYLOAD_TYPE, key)
        except RegistryError as error:
            return error.message
        return None


def reconcile(entries: Iterator[AuditEntry], held: Iterator[tuple[str, str]]) -> list[str]:
    """Return what the registry holds although the log does not tell of it.

    Args:
        entries: the log.
        held: pairs of action and subject that must have been recorded, as `("push", "acme/orders@3")`.
    """
    told = {(entry.action, entry.subject) for entry in entries}
    # An imported version was pushed elsewhere.
    told |= {("push", subject) for action, subject in told if action == "import"}
    return [
        f"{action} of {subject} is not in the log"
        for action, subject in held
        if (action, subject) not in told
    ]


def _details(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or len(value) > DETAILS_MAX:
        raise StrictJsonError("detail is not an object of acceptable length")
    for name, text in value.items():
        if not isinstance(name, str) or not _DETAIL_NAME.fullmatch(name):
            raise StrictJsonError("a detail has a name out of shape")
        if not isinstance(text, str) or len(text) > 512 or not (text == "" or text.isprintable()):
            raise StrictJsonError("a detail is too long or not printable")
    return tuple(sorted(value.items()))
