"""The audit log of a tenant: who did what, append-only, each entry signed and chained to the one before.

Entry number n is an object that is only ever created, never replaced, and whose payload names the SHA-256 of object
n-1. Appending is therefore one create-if-absent of the next number: of two writers one wins, the other reads the
winner's entry and takes the number after it. There is no head object that all writers would fight for, and an entry
taken out, changed or put in breaks the chain of everything behind it.

What the log proves (`audit_check`): everything in it was said by the key named, in this order. What it cannot prove by
itself: that nobody cut off its end, or acted without writing to it. `audit_check.reconcile` compares it with what the
registry holds, and keeping the last number and hash elsewhere (`registry audit verify` prints them) shows a cut.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterator, Mapping
from typing import Final

from ..errors import ConflictError, KeyAbsentError, KeyConflictError
from ..format import layout
from ..format.canonical import canonical
from ..format.record import FORMAT
from ..refs import check_name
from ..signing import Signer, sign_envelope
from ..storage.store import Store, write_conditionally
from .audit_check import AuditReport, Dates, Following, KeyOf
from .audit_entry import ENTRY_BYTES_MAX, PAYLOAD_TYPE, AuditEntry, details_of, read_entry

APPENDS_MAX: Final = 64
"""How often an append goes on to the next number when rivals take it."""


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
                details_of(dict(detail or {})),
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
            yield read_entry(self._tenant, number, body)[0]

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

    def verify(self, key_of: KeyOf, *, dates: Dates | None = None) -> AuditReport:
        """Check the whole log: numbers without gap, chain, tenant, every signature, and every signer's dates.

        A key is judged by the time of the entry it signed, so what a key signed before it was retired stays good. An
        entry follows the one before, so it counts as no earlier than that (but for CLOCK_SLACK_S): the holder of a
        retired key cannot date new entries back behind what others have written since.

        Args:
            key_of: returns the public key of a key id, None when it is not known.
            dates: raises ExpiredError when a key did not count at a time; None lets every known key count ever.
        """
        following = Following(self._tenant, key_of, dates)
        for number, body in self.bodies():
            following.hear(number, body)
        return following.report()
