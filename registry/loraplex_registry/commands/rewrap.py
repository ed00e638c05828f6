"""`registry rewrap`: wrap the data keys of published versions with another key. Digests and signatures stay.

The setting encryption_key must name the old key, and afterwards the new one, here and on every server. The old key
still opens old copies of the data (backups, earlier versions in a versioned bucket) as long as it exists.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from ..encryption.key_providers import KeyRing, anchored_addresses
from ..errors import DamagedError
from ..settings import settings_path
from .session import Listing, Session

_WHY: Final = {
    "already": "under the new key before",
    "clear": "not encrypted; push it again under another version to have it encrypted",
    "deleting": "being deleted; rewrap again should the deletion be undone",
}
"""What people are told about outcomes that need a word."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "scope",
        metavar="TENANT[/ADAPTER[@VERSION]]",
        help="what to rewrap: all of a tenant, an adapter, a version",
    )
    parser.add_argument(
        "--to",
        metavar="KEY",
        required=True,
        help="the new key: file:PATH, awskms:ARN or vault:MOUNT/keys/NAME; the old one must be set as encryption_key",
    )
    parser.add_argument("--key", help="private key that signs the entry in the audit log, where one is kept")


def run(session: Session) -> Listing:
    """Rewrap every encrypted version in a scope, and record it."""
    from ..encryption.key_providers import provider_from
    from ..encryption.rewrap import rewrap_all, versions_in

    store, scope, address = session.store(), session.arguments.scope, session.arguments.to
    tenant = scope.partition("/")[0]
    ring = KeyRing.parse(session.settings.encryption_key)
    to = provider_from(address, tenant=tenant)
    both = KeyRing([*dict.fromkeys([*ring.addresses, address])])
    counts: dict[str, int] = {}
    signer = (
        session.signer() if session.settings.audit == "on" else None
    )  # first: nothing is to go unrecorded

    def items() -> Iterator[dict[str, Any]]:
        for done in rewrap_all(store, versions_in(store, scope), both, to):
            counts[done.outcome] = counts.get(done.outcome, 0) + 1
            yield {
                "ref": str(done.ref),
                "outcome": done.outcome,
                "kek": done.kek,
                "tags": list(done.tags),
                "reason": done.reason,
            }
        if counts.get("rewrapped") and signer is not None:
            session.record("rewrap", scope, signer, kek=to.uri[:512], versions=counts["rewrapped"])
        if counts.get("failed"):
            raise DamagedError(
                f"{counts['failed']} versions were not rewrapped; the reasons are in the list."
            )

    return _Rewrapping(
        head={"to": to.uri},
        name="versions",
        items=items(),
        line=_line,
        tail=lambda: {"counts": counts},
        empty=f"no version in {scope}; `registry ls` shows what there is.",
        next_step=lambda: _next_step(session, scope, counts),
    )


def _line(item: dict[str, Any]) -> str:
    why = item["reason"] or _WHY.get(item["outcome"], "")
    return f"{item['outcome']:<10} {item['ref']}  {why}".rstrip()


@dataclass
class _Rewrapping(Listing):
    """A listing whose last line tells people what to do next, once it is known how the versions fared."""

    next_step: Callable[[], str] = str

    def write(self, out: TextIO, *, form: str) -> int:
        """See `Listing.write`."""
        code = super().write(out, form=form)
        if form == "text" and (line := self.next_step()):
            print(line, file=out)
        return code


def _next_step(session: Session, scope: str, counts: Mapping[str, int]) -> str:
    """Return which keys to set now, empty when they are set already or no version is under the new key."""
    new = anchored_addresses(session.arguments.to, Path.cwd())
    old = list(KeyRing.parse(session.settings.encryption_key).addresses)
    if not counts.keys() & {"rewrapped", "already"} or old == [new]:
        return ""
    if any("{tenant}" in key for key in old) and "{tenant}" not in new:
        tenant = scope.partition("/")[0]
        return (
            f"Next: put the new key where encryption_key leads for tenant {tenant}, here and on the servers."
        )
    # Whatever is not under the new key yet must stay readable.
    everything = "/" not in scope and "deleting" not in counts
    keys = ", ".join([new, *([] if everything else [key for key in old if key != new])])
    if keys == ", ".join(old):
        return ""
    place = settings_path(session.environment)
    return f"Next: set encryption_key = {json.dumps(keys)} in {place}, and in every server's settings."
