"""Proving that nobody rewrote an audit log: numbers, chain, signatures, and whether each signer counted at the time.

An entry that is missing, altered or put in breaks the chain. That is another thing than an entry in its place whose
signer is not known here, or whose key was used outside its dates: the log is whole then, and somebody has to be asked.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import ExpiredError, RegistryError
from ..format.canonical import StrictJsonError
from ..format.moments import parse_moment, written
from ..signing import PublicKey, envelope_keyids, verify_envelope
from ..trust.marks import CLOCK_SLACK_S
from .audit_entry import PAYLOAD_TYPE, AuditEntry, read_entry

KeyOf = Callable[[str], PublicKey | None]
"""Returns the public key of a key id, None when it is not known."""

Dates = Callable[[str, dt.datetime], None]
"""Raises ExpiredError when the key with an id did not count at a time."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `verify_log` found.

    Attributes:
        entries: number of the last entry.
        head: hex SHA-256 of the last object, empty for an empty log; with `entries` it shows a cut end later on.
        findings: what is broken, one sentence each: an entry missing, altered, put in, or not signed by who it names.
        unknown: entries in their place, signed by keys that are not known here, one sentence each.
        outdated: entries in their place, with a good signature of a key outside its dates, one sentence each.
    """

    entries: int
    head: str
    findings: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()


class Following:
    """Follows a log entry by entry and notes what is wrong with it."""

    def __init__(self, tenant: str, key_of: KeyOf, dates: Dates | None) -> None:
        self._tenant = tenant
        self._key_of = key_of
        self._dates = dates
        self._newest: dt.datetime | None = None  # time of the latest entry whose signer is known and counted
        self.count, self.head = 0, ""
        self.broken: list[str] = []
        self.unknown: list[str] = []
        self.outdated: list[str] = []

    def hear(self, number: int, body: bytes) -> None:
        """Take the next entry."""
        if number != self.count + 1:
            self.broken.append(f"entry {self.count + 1} is missing; the log was cut or an entry removed")
        try:
            entry, envelope = read_entry(self._tenant, number, body)
            fault = self._misplaced(entry, number)
            if fault is None:
                self._signed(entry, envelope)
            else:
                self.broken.append(f"entry {number}: {fault}")
        except StrictJsonError as error:
            self.broken.append(f"entry {number}: {error}")
        except RegistryError as error:
            self.broken.append(f"entry {number}: {error.message}")
        self.count, self.head = number, hashlib.sha256(body).hexdigest()

    def _misplaced(self, entry: AuditEntry, number: int) -> str | None:
        if (entry.tenant, entry.number) != (self._tenant, number):
            return f"it was signed as number {entry.number} of {entry.tenant}"
        if number == self.count + 1 and entry.prev != self.head:
            return "it does not follow from the entry before; one of the two was replaced"
        return None

    def _signed(self, entry: AuditEntry, envelope: object) -> None:
        """Note what is wrong with an entry's signer.

        Raises:
            SignatureInvalidError: the signature is bad.
        """
        keyids = envelope_keyids(envelope)
        if keyids != (entry.actor,):
            self.broken.append(
                f"entry {entry.number}: it names key {entry.actor[:16]}… and is signed by {keyids[0][:16]}…"
            )
            return
        key, at = self._key_of(entry.actor), parse_moment(entry.at)
        if key is None:
            self.unknown.append(
                f"entry {entry.number} of {entry.at} is signed by key {entry.actor[:16]}…, which is not known here"
            )
            return
        verify_envelope(envelope, PAYLOAD_TYPE, key)
        floor = at if self._newest is None else self._newest - dt.timedelta(seconds=CLOCK_SLACK_S)
        try:
            if self._dates is not None:
                self._dates(entry.actor, at)
                self._dates(entry.actor, max(at, floor))
        except ExpiredError as error:
            later = f", behind one of {written(self._newest)}" if self._newest and at < floor else ""
            self.outdated.append(f"entry {entry.number} of {entry.at}{later}: {error.message}")
            return
        self._newest = at if self._newest is None else max(at, self._newest)

    def report(self) -> AuditReport:
        """Return what was found."""
        return AuditReport(
            self.count, self.head, tuple(self.broken), tuple(self.unknown), tuple(self.outdated)
        )


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
