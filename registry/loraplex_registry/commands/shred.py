"""`registry shred`: destroy a tenant's encryption keys, so that nobody can read its encrypted versions any more.

Keys of before a rewrap are not among them. They still open old copies of the data: backups, and the earlier versions
that a versioned bucket keeps. Destroy those keys too, or those copies.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import DamagedError
from .session import Result, Session

PENDING_DAYS_DEFAULT = 30

OLD_KEYS = (
    "Not reached: keys of before a rewrap, and copies of key files. They still open old copies of the data (backups, "
    "earlier versions in a versioned bucket); destroy those keys too, or those copies."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("tenant", metavar="TENANT", help="whose keys; its name only, never a pattern")
    parser.add_argument("--apply", action="store_true", help="destroy them; without it nothing is changed")
    parser.add_argument(
        "--pending-days",
        type=_days,
        default=PENDING_DAYS_DEFAULT,
        metavar="N",
        help=f"days AWS KMS keeps a key it refuses to use, 7 to 30; default {PENDING_DAYS_DEFAULT}",
    )
    parser.add_argument("--key", help="private signing key; its use is recorded in the audit log")


def _days(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 7 <= int(text) <= 30:
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is not within 7 to 30")
    return int(text)


def run(session: Session) -> Result:
    """Show what would be destroyed; with --apply record it, destroy it, and prove it."""
    from ..encryption.key_providers import KeyRing
    from ..encryption.rewrap import plan_shred, shred

    tenant, store = session.arguments.tenant, session.store()
    ring = KeyRing.parse(session.settings.encryption_key)
    plan = plan_shred(store, tenant, ring)
    result: dict[str, Any] = {
        "tenant": tenant,
        "applied": False,
        "keys": list(plan.keys),
        "encrypted": list(plan.encrypted),
        "beyond": list(plan.beyond),
        "clear": list(plan.clear),
        "damaged": list(plan.damaged),
        "note": OLD_KEYS,
    }
    lines = [
        *plan.keys,
        f"{len(plan.encrypted)} versions become unreadable for ever, also for you",
        *(f"still readable with another key: {ref}" for ref in plan.beyond),
        *(f"not encrypted, delete it: {ref}" for ref in plan.clear),
        *(f"damaged record: {ref}" for ref in plan.damaged),
        OLD_KEYS,
    ]
    if not session.arguments.apply:
        return result, [*lines, "Nothing was changed; --apply destroys the keys."]
    _record(session, tenant, len(plan.encrypted))  # first: what is destroyed must not go unrecorded
    done = shred(store, tenant, ring, pending_days=session.arguments.pending_days)
    if done.opened:
        raise DamagedError(
            f"{len(done.opened)} versions of {tenant} still open, {done.opened[0]} for one; look for copies of the key."
        )
    proof = f"proven: none of {done.tried} encrypted versions opens any more"
    result |= {"applied": True, "keys": list(done.keys), "tried": done.tried, "opened": list(done.opened)}
    return result, [*done.keys, *lines[len(plan.keys) :], proof]


def _record(session: Session, tenant: str, versions: int) -> None:
    from ..lifecycle.audit import AuditLog
    from ..registry import utc_now

    log = AuditLog(session.store(), tenant)
    log.append("shred", tenant, session.signer(), utc_now(), detail={"versions": str(versions)})
