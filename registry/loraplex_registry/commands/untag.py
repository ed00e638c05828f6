"""`registry untag`: make a tag point to nothing, by a signed statement. Its history stays."""

from __future__ import annotations

import argparse

from ..errors import AdapterNotFoundError, InvalidReferenceError
from ..lifecycle.tagging import parse_expect, untag
from ..registry import utc_now
from .options import keys_option
from .session import Result, Session
from .tag import moved_result


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ref", metavar="REF", help="the tag, as tenant/adapter@prod")
    parser.add_argument(
        "--expect", metavar="NOW", help="only if the tag is at this generation, digest or semantic version"
    )
    keys_option(parser)


def run(session: Session) -> Result:
    """Remove a tag."""
    ref = session.ref(session.arguments.ref)
    if ref.tag is None:
        raise InvalidReferenceError(f"{ref} names no tag; write {ref.name}@prod.")
    expect = None if session.arguments.expect is None else parse_expect(session.arguments.expect)
    session.tag_to_move(ref, ref.tag)
    signers = session.signers()
    move = untag(session.store(), ref, ref.tag, signers, now=utc_now(), expect=expect)
    if move is None:
        raise AdapterNotFoundError(f"{ref} never was; `registry ls {ref.name}` shows what is.")
    session.record_move("untag", str(ref), move, signers)
    return moved_result(ref, ref.tag, move)
