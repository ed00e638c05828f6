"""`registry export`: verify a version and write it as an OCI image layout with ModelPack media types.

Tools such as oras, skopeo or crane copy the directory to any OCI registry. The signature travels with it:
`registry import` publishes the very same digest elsewhere, without a key.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..exchange.oci import export_layout
from ..progress import readable
from .options import REFERENCE_HELP
from .session import Result, Session, verified_result


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    parser.add_argument("directory", metavar="DIR", help="must not exist, or be empty")
    parser.add_argument(
        "--oci", action="store_true", help="as an OCI image layout; the default, and the only form there is"
    )


def run(session: Session) -> Result:
    """Write a verified version as an OCI image layout."""
    registry, verified = session.verified(session.arguments.ref)
    directory = Path(session.arguments.directory)
    with session.progress() as bar:
        done = export_layout(registry, verified, directory, progress=bar)
    result = {
        **verified_result(verified),
        "directory": str(directory),
        "oci_digest": done.oci_digest,
        "layers": done.layers,
    }
    return result, [
        f"exported {verified.ref} to {directory}",
        f"  digest  {verified.digest}",
        f"  oci     {done.oci_digest}, {done.layers} layers, {readable(done.size_bytes)}",
    ]
