"""`registry pull`: verify a version and write it to a new directory.

The directory can be loaded with PEFT, pushed again, and checked with any OpenSSF Model Signing verifier.
"""

from __future__ import annotations

import argparse

from .options import REFERENCE_HELP
from .session import Result, Session, verified_result


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    parser.add_argument("directory", metavar="DIR", help="must not exist, or be empty")


def run(session: Session) -> Result:
    """Write a verified version to a directory."""
    registry, verified = session.verified(session.arguments.ref)
    with session.progress() as bar:
        registry.pull(verified, session.arguments.directory, progress=bar)
    result = {**verified_result(verified), "directory": session.arguments.directory}
    return result, [f"pulled {verified.ref} to {session.arguments.directory}", f"  digest  {verified.digest}"]
