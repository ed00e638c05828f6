"""`registry resign`: put the current key's signature on what another trusted key signed, after a key was rotated.

Every committed version and tag of the scope is verified under the policy first; what is not trusted is reported and
left alone. Versions keep their digest and nothing is downloaded. A tag is signed again as its next generation. Tags
that need several signatures are left to their signers.
"""

from __future__ import annotations

import argparse
import datetime as dt
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .session import Result, Session

if TYPE_CHECKING:
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
    for ref in _adapters(session, store):
        for item in resigner.adapter(ref):
            left = {"ref": str(item.ref), "code": item.code, "reason": item.reason}
            done[item.outcome].append(left if item.outcome == LEFT else str(item.ref))
            if item.outcome == RESIGNED and not dry_run:
                session.record("resign", str(item.ref), signer)
    word = "would be resigned" if dry_run else "resigned"
    lines = [f"{word} {name}" for name in done[RESIGNED]]
    lines += [f"left alone {item['ref']}: {item['reason']}" for item in done[LEFT]]
    lines.append(f"{len(done[RESIGNED])} {word}, {len(done[UNCHANGED])} had this key's signature already")
    return {"keyid": signer.keyid, "dry_run": dry_run, **done}, lines


def _adapters(session: Session, store: Store) -> Iterator[AdapterRef]:
    from ..lifecycle.listing import list_adapters
    from ..refs import AdapterRef

    scope = session.arguments.scope or session.settings.require("tenant", option="TENANT")
    tenant, slash, adapter = scope.partition("/")
    if slash:
        yield AdapterRef(tenant, adapter)
        return
    for name in list_adapters(store, tenant):
        yield AdapterRef(tenant, name)


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
