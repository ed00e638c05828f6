"""`registry log`: every move of a tag, or of all tags of an adapter, oldest first.

The chain is checked: a statement that was taken out, changed or put in is shown as a fault, with exit code 8.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ..errors import AdapterNotFoundError, DamagedError
from ..lifecycle.history import tag_history
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
    return Listing({"ref": str(ref)}, "moves", _moves(session.store(), ref), _line)


def _moves(store: Store, ref: AdapterRef) -> Iterator[dict[str, Any]]:
    """Yield every move; the last thing said is that one of them is not as it was signed, if so."""
    tags = [ref.tag] if ref.tag is not None else list(tag_names(store, ref))
    if not tags:
        raise AdapterNotFoundError(f"{ref} has no tags in {store.url}; `registry ls` shows what is there.")
    faults = 0
    for tag in tags:
        for event in tag_history(store, ref, tag):
            faults += event.fault is not None
            yield event.to_value()
    if faults:
        raise DamagedError(f"{faults} statements of {ref} are not as they were signed; see `registry fsck`.")


def _line(move: dict[str, Any]) -> str:
    target = "removed" if move["version"] is None else f"version {move['version']}  {move['digest']}"
    keys = ", ".join(keyid[:16] + "…" for keyid in move["keyids"])
    fault = f"  FAULT: {move['fault']}" if move["fault"] else ""
    return f"{move['tag']}  {move['generation']:>4}  {move['issued']}  {target}  by {keys}{fault}"
