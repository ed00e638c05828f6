"""`registry log`: every move of a tag, or of all tags of an adapter, oldest first.

The chain is checked: a statement that was taken out, changed or put in is shown as a fault, with exit code 8. So is
every statement later than the one the tag has: somebody put that older one back. A tag that is older than it was seen
on this machine is refused as ROLLBACK, with exit code 6.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ..errors import AdapterNotFoundError, DamagedError, PolicyRefusedError, RollbackError
from ..lifecycle.history import tag_history
from ..lifecycle.tag_state import read_tag_state
from ..lifecycle.tagging import tag_names
from ..refs import AdapterRef
from ..storage.store import Store
from .session import Listing, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ref", metavar="REF", help="tenant/adapter, or tenant/adapter@tag")


def run(session: Session) -> Listing:
    """List the moves."""
    ref = session.ref(session.arguments.ref)
    return Listing({"ref": str(ref)}, "moves", _moves(session, session.store(), ref), _line)


def _moves(session: Session, store: Store, ref: AdapterRef) -> Iterator[dict[str, Any]]:
    """Yield every move; the last thing said is that one is not as it was signed, or that a tag was put back, if so."""
    tags = [ref.tag] if ref.tag is not None else list(tag_names(store, ref))
    if not tags:
        raise AdapterNotFoundError(f"{ref} has no tags in {store.url}; `registry ls` shows what is there.")
    faults, older = 0, []
    for tag in tags:
        state = read_tag_state(store, ref, tag)
        try:
            session.require_newest(ref, tag, state)
        except PolicyRefusedError:  # nobody says whose signatures count
            pass
        except RollbackError as error:
            older.append(error)
        if state is None and older:
            break
        for event in tag_history(store, ref, tag, known=state):
            faults += event.fault is not None
            yield event.to_value()
    if faults:
        raise DamagedError(
            f"{faults} statements of {ref} are not as they were signed, or in the log behind the tag; see "
            "`registry fsck`."
        )
    if older:
        raise older[0]


def _line(move: dict[str, Any]) -> str:
    target = "removed" if move["version"] is None else f"version {move['version']}  {move['digest']}"
    keys = ", ".join(keyid[:16] + "…" for keyid in move["keyids"])
    fault = f"  FAULT: {move['fault']}" if move["fault"] else ""
    remark = f"  ({move['remark']})" if move["remark"] else ""
    return f"{move['tag']}  {move['generation']:>4}  {move['issued']}  {target}  by {keys}{fault}{remark}"
