"""Whether enough trusted keys signed a statement: the one place where tags and revocation lists are counted."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence

from ..errors import ExpiredError, RevokedError, SignatureInvalidError
from ..signing import envelope_keyids, verify_envelope
from ..trust.policy import TrustedKey


def signers_of(
    envelope: object,
    payload_type: str,
    trusted: Sequence[TrustedKey],
    *,
    what: str,
    role: str,
    now: dt.datetime,
    threshold: int = 1,
    not_revoked: Callable[[str], None] | None = None,
    remedy: str = "",
) -> tuple[TrustedKey, ...]:
    """Return the trusted keys that signed an envelope and count now; at least `threshold` of them.

    Every signature of a listed key must be good: a bad one refuses the whole, whatever the others are. Signatures of
    keys that are not listed are not looked at. Keys outside their dates and revoked keys do not count.

    Args:
        envelope: a DSSE envelope, unverified.
        payload_type: what it must be signed as.
        trusted: keys that may sign such a statement.
        what: the statement, for messages: "the tag acme/orders@prod".
        role: the policy's word for the keys: "taggers".
        now: the time to judge key dates by.
        threshold: how many different keys must count.
        not_revoked: called with a key id; raises RevokedError.
        remedy: sentences about what to do, behind the refusal of a signer who is not listed or whose time is over.

    Raises:
        SignatureInvalidError: no listed key, a bad signature, or too few that count.
        ExpiredError, RevokedError: too few are left, and this is why the first one does not count.
    """
    claimed, name = envelope_keyids(envelope), f"{what[:1].upper()}{what[1:]}"
    remedy = remedy and f" {remedy}"
    listed = [item for item in trusted if item.key.keyid in claimed]
    if not listed:
        raise SignatureInvalidError(
            f"{name} is signed with key {claimed[0][:16]}…, which the policy does not list among the {role}; "
            f"sign it with a listed key or add the key to the policy.{remedy}"
        )
    verify_envelope(envelope, payload_type, [item.key for item in listed])
    counting: list[TrustedKey] = []
    first_reason: ExpiredError | RevokedError | None = None
    for item in listed:
        try:
            item.check(now)
            if not_revoked is not None:
                not_revoked(item.key.keyid)
            counting.append(item)
        except ExpiredError as error:
            first_reason = first_reason or ExpiredError(f"{name.rstrip(',')}: {error.message}{remedy}")
        except RevokedError as error:
            first_reason = first_reason or RevokedError(f"{name.rstrip(',')}: {error.message}")
    if len(counting) >= threshold:
        return tuple(counting)
    if first_reason is not None:
        raise first_reason
    raise SignatureInvalidError(
        f"{name} has {len(counting)} of the {threshold} signatures the policy demands; "
        f"have another of the {role} sign it too."
    )
