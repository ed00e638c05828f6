"""`registry import`: publish an export, a pulled directory, or a PEFT directory full of other files.

What `registry export` or `registry pull` wrote keeps its signature: it is verified, and the very same digest is
published, with no key. A PEFT directory is checked and signed as by `registry push`, but files that are no part of
the adapter are left behind, each with the reason why.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from ..delivery.pulled import verify_directory
from ..errors import InvalidReferenceError, RegistryError
from ..exchange.oci_read import is_layout, read_layout
from ..exchange.peft_import import Collected, collect
from ..format.manifest import Manifest
from ..lifecycle.presigned import read_signed
from ..refs import AdapterRef
from ..registry import utc_now
from ..signing import bundle_keyid
from ..validation.base import BaseModel
from ..validation.weights import BUNDLE_NAME
from .options import FIRST_SIGNS_VERSION, REFERENCE_HELP, keys_option
from .push import base_for, published_lines, published_result, resuming
from .session import Result, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "directory", metavar="DIR", help="an OCI image layout, a pulled directory, or a PEFT directory"
    )
    parser.add_argument(
        "ref",
        metavar="REF",
        nargs="?",
        help=f"{REFERENCE_HELP}; default: what a layout was signed as; your tenant and a PEFT directory's name",
    )
    parser.add_argument("--tag", help="move this tag to the version (needs a key)")
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="of a PEFT directory: base model directory or base card; default as with registry push",
    )
    keys_option(parser, FIRST_SIGNS_VERSION)
    parser.add_argument(
        "--select", metavar="NAME", help="of a layout with several manifests: the one with this name"
    )


def run(session: Session) -> Result:
    """Publish what another tool or another registry left in a directory."""
    directory = Path(session.arguments.directory)
    with tempfile.TemporaryDirectory(prefix="loraplex-") as place:
        if is_layout(directory):
            attest = read_layout(directory, Path(place), select=session.arguments.select)
            return _import_signed(session, Path(place), attest)
        if (directory / BUNDLE_NAME).is_file():
            return _import_signed(session, directory, ())
        return _import_peft(session, directory, Path(place))


def _import_signed(session: Session, place: Path, attest: tuple[dict[str, Any], ...]) -> Result:
    """Verify what was signed elsewhere and publish it as it is."""
    signed = read_signed(place, place / BUNDLE_NAME)
    signers = session.signers() if session.arguments.tag else []
    ref = _signed_ref(session, signed.manifest)
    registry = session.registry()
    with session.progress() as bar:
        pulled = verify_directory(
            place,
            session.policy(),
            now=utc_now(),
            revocations=session.verifier(registry).revocations(ref.tenant),
            marks=session.marks(registry),
            attest=attest,
            progress=bar,
        )
        done = session.publish(
            place,
            ref,
            signers,
            pulled.base,
            action="import",
            tag=session.arguments.tag,
            annotations=dict(pulled.verified.manifest.annotations),
            attest=attest,
            signed=signed,
            resumables=session.resumables(resuming(session, bar)),
            progress=bar,
        )
    keyid = bundle_keyid(signed.bundle)
    result = {**published_result(done), "keyid": keyid, "left": [], "changed": [], "trained_on": None}
    return result, published_lines(done, ref, verb="imported", keyid=keyid)


def _signed_ref(session: Session, manifest: Manifest) -> AdapterRef:
    """Return the name and version that were signed; a signature is for one name alone."""
    signed = AdapterRef(manifest.tenant, manifest.adapter, version=manifest.version)
    if session.arguments.ref is None:
        return signed
    asked = session.ref(session.arguments.ref)
    if asked not in (signed, AdapterRef(signed.tenant, signed.adapter)):
        raise InvalidReferenceError(
            f"The layout was signed as {signed} and cannot become {asked}; unpack it and push it with your own key."
        )
    return signed


def _import_peft(session: Session, directory: Path, place: Path) -> Result:
    ref = _peft_ref(session, directory)
    signers = session.signers()
    with session.progress() as bar:
        base = base_for(session, directory, bar)
        found = collect(directory, place, base)
        tag = session.arguments.tag
        done = session.publish(
            place,
            ref,
            signers,
            base,
            action="import",
            tag=tag,
            resumables=session.resumables(resuming(session, bar)),
            progress=bar,
        )
    result = {
        **published_result(done),
        "left": [{"name": name, "reason": why} for name, why in found.left],
        "changed": list(found.changed),
        "trained_on": found.trained_on,
    }
    lines = published_lines(done, ref, verb="imported")
    return result, [*lines, *_report(found, base)]


def _peft_ref(session: Session, directory: Path) -> AdapterRef:
    name = session.arguments.ref or directory.resolve().name
    try:
        return session.ref(name)
    except RegistryError as error:
        if session.arguments.ref is not None:
            raise
        raise InvalidReferenceError(
            f"The directory's name cannot be the adapter's; give one: `registry import {directory} TENANT/NAME`."
        ) from error


def _report(found: Collected, base: BaseModel) -> list[str]:
    lines = [f"  base    {base.name} {base.digest[:19]}…"]
    if found.trained_on:
        lines[0] += f"; its settings say {found.trained_on!a}"
    lines += [f"  changed {text}" for text in found.changed]
    return [*lines, *(f"  left    {name!a}: {why}" for name, why in found.left)]
