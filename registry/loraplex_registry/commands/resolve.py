"""`registry resolve`: the verified digest a reference means now.

What is printed is a reference that will never mean anything else. Nothing is downloaded.
"""

from __future__ import annotations

import argparse

from .options import REFERENCE_HELP
from .session import Result, Session, verified_result


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ref", metavar="REF", help=REFERENCE_HELP)


def run(session: Session) -> Result:
    """Print the verified digest of a reference."""
    _, verified = session.verified(session.arguments.ref)
    return verified_result(verified), [f"{verified.ref.name}@{verified.digest}"]
