"""What a tenant does not trust any more: a signed list of versions and keys, one object per tenant.

- The list is a DSSE statement with a payload type of its own. Only keys the policy names as `revokers` may sign it.
- Its `serial` grows by one with every change and `prev` is the SHA-256 of the statement before. Nothing is ever taken
  off: an entry can only become stricter. So the newest list is the strictest, and an older one is a rollback, which
  `marks` sees.
- A list says when it was `issued`, and may say when it `expires`. How old it may be, `revocation.max_age`, is up to the
  policy; `registry revoke --refresh` signs the same entries again. Whoever withholds newer lists can do so that long.
- An entry counts however old the list that has it is.

`since` limits a revoked key to signatures of that time or later, by the statement's own word (`created`, `issued`). A
thief writes any time he likes: leave `since` out when a key was stolen, and re-sign what is good with another one.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import (
    DamagedError,
    ExpiredError,
    InvalidReferenceError,
    KeyAbsentError,
    RevokedError,
    SignatureInvalidError,
    StaleRevocationError,
)
from ..format import layout
from ..format.canonical import StrictJsonError, b64decode, canonical, exact_object, parse_canonical
from ..format.moments import parse_moment
from ..format.record import FORMAT, RECORD_BYTES_MAX
from ..refs import check_digest, check_name
from ..signing import PAYLOAD_BYTES_MAX, Signer, payload_unverified, sign_envelope
from ..signing.keys import is_keyid
from ..signing.quorum import signers_of
from ..storage.store import Store
from .marks import CLOCK_SLACK_S, REVOCATIONS, Mark, MemoryMarks
from .policy import TrustedKey, keys_of

SCHEMA: Final = "loraplex.revocations/1"
PAYLOAD_TYPE: Final = "application/vnd.loraplex.revocations.v1+json"
SERIAL_MAX: Final = 1_000_000_000
"""Serial numbers are below this."""

ENTRIES_MAX: Final = 500
"""Most entries of a list. A key's entry counts for everything it signed, so long lists are not needed."""

REASON_LENGTH_MAX: Final = 120
"""Longest reason, in characters."""

STATEMENTS_CACHED_MAX: Final = 64
"""Most lists kept parsed, of at most `PAYLOAD_BYTES_MAX` bytes each."""

_FIELDS = frozenset({"schema", "tenant", "serial", "prev", "issued", "expires", "entries"})


@dataclass(frozen=True, slots=True)
class Revocation:
    """One entry: the version with this digest (`sha256:…`), or everything signed with this key since a time.

    Exactly one of `digest` and `keyid` is set. `since` is for keys alone, empty for "ever".
    """

    reason: str
    digest: str | None = None
    keyid: str | None = None
    since: str = ""

    @property
    def subject(self) -> str:
        """The digest or the key id."""
        return self.digest or self.keyid or ""

    def to_value(self) -> dict[str, Any]:
        """Return the JSON form."""
        if self.digest is not None:
            return {"digest": self.digest, "reason": self.reason}
        return {"keyid": self.keyid, "reason": self.reason, "since": self.since}


@dataclass(frozen=True, slots=True)
class RevocationList:
    """What is signed. Entries are sorted by subject, each subject once; times are as in `moments`."""

    tenant: str
    serial: int
    prev: str
    issued: str
    expires: str
    entries: tuple[Revocation, ...]

    def to_bytes(self) -> bytes:
        """Return the canonical payload that is signed."""
        return canonical(
            {
                "schema": SCHEMA,
                "tenant": self.tenant,
                "serial": self.serial,
                "prev": self.prev,
                "issued": self.issued,
                "expires": self.expires,
                "entries": [entry.to_value() for entry in self.entries],
            }
        )

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the payload; the next list's `prev`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, body: bytes) -> RevocationList:
        """Read a payload.

        Raises:
            SignatureInvalidError: not the canonical bytes of a revocation list.
        """
        try:
            fields = exact_object(parse_canonical(body, limit_bytes=PAYLOAD_BYTES_MAX), _FIELDS)
            return _list_from(fields)
        except (StrictJsonError, InvalidReferenceError) as error:
            raise SignatureInvalidError(
                f"The revocation list is refused ({error}); sign it again."
            ) from error

    def check(
        self, digest: str | None, keyid: str, signed_at: dt.datetime | None = None, *, what: str = ""
    ) -> None:
        """Raise RevokedError when the version or the key is on the list.

        Args:
            digest: the version's, `sha256:…`; None to ask about the key alone.
            keyid: the key that signed.
            signed_at: when, by the signed statement's own word; None counts as later than any `since`.
            what: what was signed, for messages: "acme/orders@3".
        """
        by = f"by the revocation list of tenant {self.tenant}, serial {self.serial}"
        for entry in self.entries:
            if entry.digest is not None and entry.digest == digest:
                raise RevokedError(
                    f"{what or 'Version'} ({digest[:19]}…) was revoked {by}: {entry.reason}. Use another version."
                )
            if entry.keyid == keyid and (
                not entry.since or signed_at is None or signed_at >= parse_moment(entry.since)
            ):
                since = f" since {entry.since}" if entry.since else ""
                signed = f", which signed {what}," if what else ""
                raise RevokedError(
                    f"Key {keyid[:16]}…{signed} was revoked{since} {by}: {entry.reason}. "
                    "Sign again with a key that counts."
                )

    def check_fresh(self, now: dt.datetime, *, max_age_s: int) -> None:
        """Raise StaleRevocationError when the list has expired or was issued more than `max_age_s` seconds ago."""
        age_s = (now - parse_moment(self.issued)).total_seconds()
        expired = self.expires != "" and now >= parse_moment(self.expires)
        if expired or age_s > max_age_s:
            why = (
                f"expired at {self.expires}"
                if expired
                else f"was issued {self.issued}, more than the {max_age_s} s ago that the policy allows"
            )
            raise StaleRevocationError(
                f"The revocation list of tenant {self.tenant}, serial {self.serial}, {why}; sign it anew with "
                f"`registry revoke --refresh {self.tenant}`."
            )

    def merged(self, entries: Iterable[Revocation]) -> tuple[Revocation, ...]:
        """Return the entries with more of them; of two for one subject the stricter stays, the first if equal."""
        found = {entry.subject: entry for entry in self.entries}
        for entry in entries:
            known = found.get(entry.subject)
            if known is None or (known.since and (not entry.since or entry.since < known.since)):
                found[entry.subject] = entry
        return tuple(found[subject] for subject in sorted(found))


@dataclass(frozen=True, slots=True)
class RevocationObject:
    """A revocation list as stored, unverified: its envelope and the statement in it, and the etag to swap it by."""

    envelope: dict[str, Any]
    statement: RevocationList
    etag: str = ""

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        return canonical({"fmt": FORMAT, "list": self.envelope})


def make_revocations(statement: RevocationList, *signers: Signer) -> RevocationObject:
    """Sign a list and return the object."""
    return RevocationObject(sign_envelope(statement.to_bytes(), PAYLOAD_TYPE, *signers), statement)


def parse_revocations(body: bytes, *, tenant: str, etag: str = "") -> RevocationObject:
    """Read a stored list without verifying anything.

    Raises:
        DamagedError: not the canonical bytes of a revocation object of format 1.
    """
    try:
        value = exact_object(parse_canonical(body, limit_bytes=RECORD_BYTES_MAX), frozenset({"fmt", "list"}))
        envelope = value["list"]
        if type(value["fmt"]) is not int or value["fmt"] != FORMAT or not isinstance(envelope, dict):
            raise StrictJsonError(f"fmt is not {FORMAT}")
        statement = _statement_of(b64decode(envelope.get("payload")))
    except (StrictJsonError, SignatureInvalidError) as error:
        raise DamagedError(
            f"The revocation list of tenant {tenant} is damaged ({error}); restore it from a backup."
        ) from error
    return RevocationObject(envelope, statement, etag)


def poll(store: Store, tenant: str, previous: RevocationObject | None = None) -> RevocationObject | None:
    """Return a tenant's list as it is now, unverified: one small request.

    Args:
        store: where.
        tenant: whose.
        previous: what the last call returned; the same object is returned when nothing changed, and the storage then
            sends no body.

    Returns:
        None when the tenant has no list.

    Raises:
        DamagedError: the object is unreadable.
        StoreUnavailableError, StoreRefusedError: the storage.
    """
    key = layout.revocations_key(tenant)
    try:
        if previous is None or not previous.etag:
            item = store.get(key, limit_bytes=RECORD_BYTES_MAX)
        else:
            changed = store.changed(key, etag=previous.etag, limit_bytes=RECORD_BYTES_MAX)
            if changed is None:
                return previous
            item = changed
    except KeyAbsentError:
        return None
    return parse_revocations(item.body, tenant=tenant, etag=item.etag)


def verify_revocations(
    found: RevocationObject,
    tenant: str,
    revokers: Sequence[TrustedKey],
    *,
    now: dt.datetime,
    marks: MemoryMarks | None = None,
) -> RevocationList:
    """Return the list, proven to be the tenant's, signed by a revoker, and no older than one seen before.

    How old it may be is not asked here: see `RevocationList.check_fresh`.

    Raises:
        SignatureInvalidError: no signature of a revoker, or another tenant's list.
        ExpiredError: the revoker's key is outside its dates, or the list is from the future.
        RollbackError: see `marks`.
    """
    payload = payload_unverified(found.envelope)
    statement = _statement_of(payload)
    what = f"the revocation list of tenant {tenant}, serial {statement.serial},"
    signers = signers_of(
        found.envelope, PAYLOAD_TYPE, revokers, what=what, role="revokers", now=now, remedy=_remedy(tenant)
    )
    if statement.tenant != tenant:
        raise SignatureInvalidError(
            f"The revocation list of tenant {tenant} was signed for tenant {statement.tenant}; somebody put it there, "
            "restore the right one from the bucket's history."
        )
    issued = parse_moment(statement.issued)
    if issued > now + dt.timedelta(seconds=CLOCK_SLACK_S):
        raise ExpiredError(f"T{what[1:]} is issued in the future ({statement.issued}); set the clock.")
    if marks is not None:
        digest = hashlib.sha256(payload).hexdigest()
        mark = Mark(statement.serial, digest, tuple(item.key.keyid for item in signers))
        marks.advance(tenant, REVOCATIONS, mark, issued=issued, trusted=keys_of(revokers))
    return statement


def _remedy(tenant: str) -> str:
    """Return what ends the refusal of a list whose signer left the policy, or whose time there is over."""
    return (
        "Until then every adapter of the tenant is refused. If the key was a revoker, sign the list again with one of "
        f"now: `registry revoke --refresh {tenant} --signed-by OLD.pub`, OLD.pub being the public key that signed it."
    )


@functools.lru_cache(maxsize=STATEMENTS_CACHED_MAX)
def _statement_of(payload: bytes) -> RevocationList:
    """A list is asked for every load and changes rarely; reading 500 entries takes milliseconds."""
    return RevocationList.from_bytes(payload)


def _list_from(fields: dict[str, Any]) -> RevocationList:
    tenant, serial, prev, entries = (fields[key] for key in ("tenant", "serial", "prev", "entries"))
    if fields["schema"] != SCHEMA or not isinstance(tenant, str):
        raise StrictJsonError("another schema, or no tenant")
    check_name("tenant", tenant)
    if type(serial) is not int or not 1 <= serial < SERIAL_MAX:
        raise StrictJsonError("serial is out of range")
    if not (prev == "" if serial == 1 else is_keyid(prev)):
        raise StrictJsonError("prev is out of shape")
    issued = parse_moment(fields["issued"])
    if fields["expires"] != "" and parse_moment(fields["expires"]) <= issued:
        raise StrictJsonError("the list expires before it is issued")
    if not isinstance(entries, list) or len(entries) > ENTRIES_MAX:
        raise StrictJsonError("entries is not a list of acceptable length")
    read = tuple(_entry(item) for item in entries)
    subjects = [entry.subject for entry in read]
    if subjects != sorted(set(subjects)):
        raise StrictJsonError("entries are not sorted by subject, each once")
    return RevocationList(tenant, serial, prev, fields["issued"], fields["expires"], read)


def _entry(value: object) -> Revocation:
    fields = exact_object(value, frozenset({"reason"}), optional=frozenset({"digest", "keyid", "since"}))
    reason = fields["reason"]
    if not isinstance(reason, str) or not 0 < len(reason) <= REASON_LENGTH_MAX or not reason.isprintable():
        raise StrictJsonError("a reason is missing, too long or not printable")
    if fields.keys() == {"reason", "digest"}:
        if not isinstance(fields["digest"], str):
            raise StrictJsonError("a digest is no text")
        check_digest(fields["digest"])
        return Revocation(reason, digest=fields["digest"])
    if fields.keys() != {"reason", "keyid", "since"} or not is_keyid(fields["keyid"]):
        raise StrictJsonError("an entry is neither of a digest nor of a key")
    if fields["since"] != "":
        parse_moment(fields["since"])
    return Revocation(reason, keyid=fields["keyid"], since=fields["since"])
