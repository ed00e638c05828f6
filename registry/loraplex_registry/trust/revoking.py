"""Revoking: adding to a tenant's signed list, so that of any number of concurrent calls none is lost."""

from __future__ import annotations

import datetime as dt
import random
import time
from collections.abc import Sequence
from typing import Final

from ..errors import ConflictError, KeyConflictError, PolicyRefusedError
from ..format import layout
from ..format.moments import parse_moment, written
from ..signing import PAYLOAD_BYTES_MAX, Signer
from ..storage.store import Store, write_conditionally
from .marks import REVOCATIONS, Mark, MemoryMarks
from .policy import TrustedKey, keys_of
from .revocations import (
    ENTRIES_MAX,
    Revocation,
    RevocationList,
    RevocationObject,
    make_revocations,
    poll,
    verify_revocations,
)

APPEND_ATTEMPTS_MAX: Final = 8
"""How often a list is read, extended and swapped when others extend it at the same time."""


def append(
    store: Store,
    tenant: str,
    entries: Sequence[Revocation],
    signer: Signer,
    *,
    revokers: Sequence[TrustedKey],
    now: dt.datetime,
    lifetime_s: int | None = None,
    refresh: bool = False,
    marks: MemoryMarks | None = None,
    accept: Sequence[TrustedKey] = (),
    keep_lifetime: bool = False,
) -> tuple[RevocationObject, bool]:
    """Add entries to a tenant's list, or begin one, and sign it; concurrent calls all get theirs in.

    The list that is there is verified first: whoever signs on top of a forged or an older list would make it good.

    Args:
        store: where.
        tenant: whose list.
        entries: what to add; an entry that is there already, or less strict, changes nothing.
        signer: must be one of the revokers.
        revokers: keys that may sign the list, from the policy.
        now: the time of issue.
        lifetime_s: seconds after which the list expires; None for never.
        refresh: sign anew even when nothing is added.
        marks: checked before, advanced after.
        accept: keys whose signature on the list that is there counts although they are no revokers any more; their
            dates in `revokers`, if any, are set aside. What is written is signed by `signer` alone.
        keep_lifetime: instead of `lifetime_s`, let the new list be valid for as long as the one before was.

    Returns:
        The list as stored, and whether it was written.

    Raises:
        PolicyRefusedError: the signer is no revoker.
        ConflictError: the list is full, or others kept changing it.
        SignatureInvalidError, ExpiredError, RollbackError: the list that is there must not be extended.
        StoreUnavailableError, StoreRefusedError: the storage.
    """
    _require_revoker(signer, tenant, revokers)
    for _ in range(APPEND_ATTEMPTS_MAX):
        current = poll(store, tenant)
        known = _known(current, tenant, _with(revokers, accept), now, marks)
        merged = known.merged(entries)
        if current is not None and merged == known.entries and not refresh:
            return current, False
        made = make_revocations(
            _next(known, merged, now, lifetime_of(known) if keep_lifetime else lifetime_s), signer
        )
        etag = None if current is None else current.etag
        try:
            stored = write_conditionally(store, layout.revocations_key(tenant), made.to_bytes(), etag=etag)
        except KeyConflictError:
            time.sleep(random.uniform(0.0, 0.05))  # noqa: S311 - only spreads out competing writers
            continue
        made = RevocationObject(made.envelope, made.statement, stored)
        verify_revocations(made, tenant, revokers, now=now, marks=marks)
        return made, True
    raise ConflictError(f"The revocation list of tenant {tenant} keeps changing; try again.")


def require_extendable(
    current: RevocationObject,
    tenant: str,
    signer: Signer,
    *,
    revokers: Sequence[TrustedKey],
    accept: Sequence[TrustedKey] = (),
    now: dt.datetime,
    marks: MemoryMarks | None = None,
) -> RevocationList:
    """Return a list as it was read, if `append` would sign on top of it; the arguments are those of `append`.

    Raises:
        PolicyRefusedError, SignatureInvalidError, ExpiredError, RollbackError: as `append`.
    """
    _require_revoker(signer, tenant, revokers)
    return _known(current, tenant, _with(revokers, accept), now, marks)


def _require_revoker(signer: Signer, tenant: str, revokers: Sequence[TrustedKey]) -> None:
    if signer.keyid not in keys_of(revokers):
        raise PolicyRefusedError(
            f"Key {signer.keyid[:16]}… is not among the revokers of tenant {tenant} in the trust policy; nobody would "
            "believe the list."
        )


def lifetime_of(statement: RevocationList) -> int | None:
    """Return the seconds a list is valid from its issue on; None for ever."""
    if not statement.expires:
        return None
    return int((parse_moment(statement.expires) - parse_moment(statement.issued)).total_seconds())


def _with(revokers: Sequence[TrustedKey], accept: Sequence[TrustedKey]) -> list[TrustedKey]:
    taken = keys_of(accept)
    return [*accept, *(item for item in revokers if item.key.keyid not in taken)]


def _known(
    current: RevocationObject | None,
    tenant: str,
    revokers: Sequence[TrustedKey],
    now: dt.datetime,
    marks: MemoryMarks | None,
) -> RevocationList:
    """Return the list to extend; an absent one has serial 0, which is a rollback where a list was seen."""
    if current is not None:
        return verify_revocations(current, tenant, revokers, now=now, marks=marks)
    if marks is not None:
        marks.seen(tenant).advanced(REVOCATIONS, Mark(0, "", ()), now, keys_of(revokers))
    return RevocationList(tenant, 0, "", "", "", ())


def _next(
    known: RevocationList, entries: tuple[Revocation, ...], now: dt.datetime, lifetime_s: int | None
) -> RevocationList:
    expires = "" if lifetime_s is None else written(now + dt.timedelta(seconds=lifetime_s))
    prev = known.sha256 if known.serial else ""
    statement = RevocationList(known.tenant, known.serial + 1, prev, written(now), expires, entries)
    if len(entries) > ENTRIES_MAX or len(statement.to_bytes()) > PAYLOAD_BYTES_MAX:
        raise ConflictError(
            f"The revocation list of tenant {known.tenant} is full ({len(known.entries)} entries); revoke the key that "
            "signed them rather than single versions."
        )
    return RevocationList.from_bytes(statement.to_bytes())
