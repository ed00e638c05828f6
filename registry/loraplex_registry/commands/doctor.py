"""`registry doctor`: race writers against the storage and find out whether it keeps what publishing relies on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .session import Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--writers", type=int, default=32, metavar="N", help="threads of one race, 2..256 (default 32)"
    )
    parser.add_argument(
        "--rounds", type=int, default=8, metavar="N", help="races of each kind, 1..1000 (default 8)"
    )


def run(session: Session) -> tuple[dict[str, Any], list[str]]:
    """Probe the storage, note the result in the root's marker, and refuse when a required promise is not kept.

    Raises:
        StoreRefusedError: writes to this storage are not safe; the sentence names the missing condition.
    """
    import datetime as dt

    from ..errors import InvalidReferenceError
    from ..storage.root_marker import examine, require_writable

    writers, rounds = session.arguments.writers, session.arguments.rounds
    if not 2 <= writers <= 256 or not 1 <= rounds <= 1000:
        raise InvalidReferenceError("--writers must be 2..256 and --rounds 1..1000.")
    store = session.store()
    examination = examine(store, now=dt.datetime.now(dt.UTC), writers=writers, rounds=rounds)
    report, before = examination.report, examination.before
    lines = [f"{_mark(check.ok, check.required)}  {check.name:<17} {check.detail}" for check in report.checks]
    if not report.passed:
        for line in lines:
            session.stderr.write(line + "\n")
        require_writable(store)
    result = {
        "registry": store.url,
        "passed": report.passed,
        "checks": report.to_json(),
        "probed_before": None if before is None else before.at or None,
        "changed": examination.written,
    }
    return result, [*lines, f"{store.url} may be written to."]


def _mark(ok: bool, required: bool) -> str:
    return "ok  " if ok else ("FAIL" if required else "warn")
