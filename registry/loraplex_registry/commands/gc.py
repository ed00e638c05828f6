"""`registry gc`: find, and with `--apply` remove, the blobs that no version can ever refer to, and unfinished uploads.

Safe while pushes, pulls and other collections run. Without `--apply` nothing is changed.
"""

from __future__ import annotations

import argparse

from ..errors import InvalidReferenceError
from ..lifecycle.garbage import Collection
from ..lifecycle.gc import GRACE_S, collect
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
        help="hours, 0.5 is half of one; what dead pushes and deleted versions left more recently than that is left "
        "alone, so that slow pushes and downloads under way end well; default %(default)g",
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
        "uploads": _uploads_result(done),
    }


def _uploads_result(done: Collection) -> dict[str, object]:
    total = done.dead_uploads_total()
    return {
        "seen": not done.uploads_unseen,
        "uploads": total.groups,
        "size_bytes": total.size_bytes,
        "reasons": {
            reason: {"uploads": tally.groups, "size_bytes": tally.size_bytes}
            for reason, tally in sorted(done.uploads.items())
        },
        "dead": [
            {
                "ref": str(verdict.ref),
                "pid": verdict.pid,
                "reason": verdict.reason,
                "size_bytes": verdict.upload.size,
                "started": int(verdict.upload.started_s),
            }
            for verdict in done.dead_uploads
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
    return [*lines, *_upload_lines(done, verb), f"{total.blobs} blobs, {readable(total.size_bytes)} {verb}"]


def _upload_lines(done: Collection, verb: str) -> list[str]:
    """Return what is to be said about unfinished uploads; nothing when there are none."""
    if done.uploads_unseen:
        return [f"unfinished uploads could not be looked at: {done.uploads_unseen}"]
    lines = [
        f"  {verdict.ref}  push {verdict.pid[:8]}…  {verdict.reason}  unfinished upload, "
        f"{readable(verdict.upload.size)}"
        for verdict in done.dead_uploads
    ]
    lines += [
        f"{reason:<18} {tally.groups} unfinished uploads, {readable(tally.size_bytes)}"
        for reason, tally in sorted(done.uploads.items())
    ]
    total = done.dead_uploads_total()
    if total.groups:
        lines.append(f"{total.groups} unfinished uploads, {readable(total.size_bytes)} {verb}")
    return lines
