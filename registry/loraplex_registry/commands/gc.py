"""`registry gc`: find, and with `--apply` remove, the blobs that no version can ever refer to.

Safe while pushes, pulls and other collections run. Without `--apply` nothing is changed.
"""

from __future__ import annotations

import argparse

from ..errors import InvalidReferenceError
from ..lifecycle.gc import GRACE_S, Collection, collect
from ..progress import readable
from .session import Result, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--apply", action="store_true", help="remove them; default: only report")
    parser.add_argument("--tenant", metavar="TENANT", help="only this tenant's")
    parser.add_argument("--adapter", metavar="REF", help="only this adapter's, as tenant/adapter")
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_S / 3600,
        metavar="HOURS",
        help="leave alone what is younger; default %(default)g",
    )


def run(session: Session) -> Result:
    """Collect garbage."""
    given = session.arguments
    if given.tenant and given.adapter:
        raise InvalidReferenceError("Give --tenant or --adapter, not both.")
    ref = session.ref(given.adapter) if given.adapter else None
    done = collect(
        session.store(), apply=given.apply, grace_s=given.grace * 3600, tenant=given.tenant, ref=ref
    )
    return _result(done), _lines(done)


def _result(done: Collection) -> dict[str, object]:
    total = done.dead_total()
    return {
        "applied": done.applied,
        "grace_s": done.grace_s,
        "blobs": total.blobs,
        "size_bytes": total.size_bytes,
        "delete_requests": done.delete_requests,
        "reasons": {
            reason: {"groups": tally.groups, "blobs": tally.blobs, "size_bytes": tally.size_bytes}
            for reason, tally in sorted(done.tallies.items())
        },
        "groups": [
            {
                "ref": str(verdict.group.ref),
                "pid": verdict.group.pid,
                "reason": verdict.reason,
                "blobs": len(verdict.group.keys),
                "size_bytes": verdict.group.size_bytes,
            }
            for verdict in done.dead
        ],
    }


def _lines(done: Collection) -> list[str]:
    total = done.dead_total()
    lines = [
        f"  {verdict.group.ref}  push {verdict.group.pid[:8]}…  {verdict.reason}  "
        f"{len(verdict.group.keys)} blobs, {readable(verdict.group.size_bytes)}"
        for verdict in done.dead
    ]
    lines += [
        f"{reason:<18} {tally.groups} pushes, {tally.blobs} blobs, {readable(tally.size_bytes)}"
        for reason, tally in sorted(done.tallies.items())
    ]
    verb = "removed" if done.applied else "would be removed; run it with --apply"
    return [*lines, f"{total.blobs} blobs, {readable(total.size_bytes)} {verb}"]
