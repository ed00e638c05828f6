"""`registry resign`: put the current key's signature on what another trusted key signed, after a key was rotated.

Every committed version and tag of the scope is verified under the policy first; what is not trusted is reported and
left alone. Versions keep their digest and nothing is downloaded. A tag is signed again as its next generation. Tags
that need several signatures are left to their signers. The tenant's revocation list, whose signer must be one of the
policy's revokers or nothing of the tenant is believed, is signed again too, first of all.
"""

from __future__ import annotations

import argparse
import datetime as dt
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .session import Result, Session

if TYPE_CHECKING:
    from ..lifecycle.resigning import ResignedList
    from ..refs import AdapterRef
    from ..storage.store import Store


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "scope", metavar="TENANT[/ADAPTER]", nargs="?", help="default: everything of the settings' tenant"
    )
    parser.add_argument("--key", help="private key file, or awskms:…, hsm:…; default the settings'")
    parser.add_argument(
        "--as-of",
        metavar="TIME",
        help="judge keys whose dates are over by this time (2026-01-31T09:00:00Z)",
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what would be signed, change nothing")


def run(session: Session) -> Result:
    """Sign everything in the scope again."""
    from ..lifecycle.resigning import LEFT, RESIGNED, UNCHANGED, Resigner

    signer, store, dry_run = session.signer(), session.store(), session.arguments.dry_run
    marks = session.marks(session.registry())
    resigner = Resigner(store, session.policy(), signer, marks=marks, as_of=_as_of(session), dry_run=dry_run)
    done: dict[str, list[Any]] = {RESIGNED: [], UNCHANGED: [], LEFT: []}
    tenant, adapters = _scope(session, store)
    listed = resigner.revocations(tenant)
    if listed is not None and listed.outcome == RESIGNED and not dry_run:
        session.record("revoke", tenant, signer, serial=listed.serial)
    for ref in adapters:
        for item in resigner.adapter(ref):
            left = {"ref": str(item.ref), "code": item.code, "reason": item.reason}
            done[item.outcome].append(left if item.outcome == LEFT else str(item.ref))
            if item.outcome == RESIGNED and not dry_run:
                session.record("resign", str(item.ref), signer)
    word = "would be resigned" if dry_run else "resigned"
    lines = [f"{word} {name}" for name in done[RESIGNED]]
    lines += [f"left alone {item['ref']}: {item['reason']}" for item in done[LEFT]]
    lines.append(f"{len(done[RESIGNED])} {word}, {len(done[UNCHANGED])} had this key's signature already")
    told = None if listed is None else _list_value(listed)
    return {"keyid": signer.keyid, "dry_run": dry_run, **done, "revocations": told}, [
        *_list_lines(listed, word),
        *lines,
    ]


def _list_value(listed: ResignedList) -> dict[str, Any]:
    return {
        "tenant": listed.tenant,
        "outcome": listed.outcome,
        "serial": listed.serial,
        "code": listed.code or None,
        "reason": listed.reason or None,
    }


def _list_lines(listed: ResignedList | None, word: str) -> list[str]:
    if listed is None or listed.outcome == "unchanged":
        return []
    name = f"the revocation list of tenant {listed.tenant}, serial {listed.serial}"
    return [f"left alone {name}: {listed.reason}" if listed.outcome == "left" else f"{word} {name}"]


def _scope(session: Session, store: Store) -> tuple[str, Iterator[AdapterRef]]:
    """Return the tenant and the adapters that the scope means."""
    from ..lifecycle.listing import list_adapters
    from ..refs import AdapterRef, check_name

    scope = session.arguments.scope or session.settings.require("tenant", option="TENANT")
    tenant, slash, adapter = scope.partition("/")
    check_name("tenant", tenant)
    if slash:
        return tenant, iter([AdapterRef(tenant, adapter)])
    return tenant, (AdapterRef(tenant, name) for name in list_adapters(store, tenant))


def _as_of(session: Session) -> dt.datetime | None:
    from ..errors import SettingsError
    from ..format.canonical import StrictJsonError
    from ..format.moments import parse_moment
    from ..registry import utc_now

    if session.arguments.as_of is None:
        return None
    try:
        moment = parse_moment(session.arguments.as_of)
    except StrictJsonError as error:
        raise SettingsError("--as-of is not a time; write it like 2026-01-31T09:00:00Z.") from error
    if moment > utc_now():
        raise SettingsError("--as-of lies in the future; name a time when the old keys counted.")
    return moment
