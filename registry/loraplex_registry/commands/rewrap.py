"""`registry rewrap`: wrap the data keys of published versions with another key. Digests and signatures stay."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ..errors import DamagedError
from .session import Listing, Session


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
    from ..encryption.key_providers import KeyRing, provider_from
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

    return Listing(
        head={"to": to.uri},
        name="versions",
        items=items(),
        line=lambda item: f"{item['outcome']:<10} {item['ref']}  {item['reason']}".rstrip(),
        tail=lambda: {"counts": counts},
    )
