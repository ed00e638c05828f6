"""`registry manifest`: prepare a directory for being signed by another tool.

Writes base_model.json and adapter.manifest.json into DIR. Sign the directory then with any OpenSSF Model Signing tool,
and push it with `registry push DIR REF --signature BUNDLE`. The version must be named: it is signed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import REFERENCE_HELP
from .session import Result, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("directory", metavar="DIR", help="adapter_config.json and adapter_model.safetensors")
    parser.add_argument("ref", metavar="REF", help=f"{REFERENCE_HELP}; with a version: acme/orders@3")
    parser.add_argument(
        "--base", help="base model directory or base card; default: base_model.json in DIR, then settings"
    )


def run(session: Session) -> Result:
    """Write the manifest."""
    from ..errors import InvalidReferenceError
    from ..format.moments import written
    from ..lifecycle.content import Content
    from ..lifecycle.presigned import write_manifest
    from ..registry import utc_now
    from ..validation.weights import validate_adapter
    from .push import base_for

    directory, ref = Path(session.arguments.directory), session.ref(session.arguments.ref)
    if ref.version is None:
        raise InvalidReferenceError(f"{ref} does not name a version; write {ref.name}@3.")
    with session.progress() as bar:
        base = base_for(session, directory, bar)
        facts = validate_adapter(directory, base, progress=bar)
    content = Content(directory, facts, base, base.to_json())
    done = write_manifest(content, ref, ref.version, written(utc_now()))
    result = {
        "ref": f"{ref.name}@{ref.version}",
        "digest": done.manifest.digest,
        "directory": str(directory),
        "signature": str(done.signature),
    }
    return result, [
        f"manifest of {ref.name}@{ref.version} is in {directory}",
        f"  digest  {done.manifest.digest}",
        f"Next: model_signing sign key {directory} --private_key KEY --signature {done.signature}",
        f"      registry push {directory} {ref.name} --signature {done.signature}",
    ]
