"""`registry push`: check, sign and publish a directory.

The same bytes are published once: a second push of them says so and changes nothing. After a crash or a lost
connection, run the same command again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import SettingsError, UnsupportedAdapterError
from ..lifecycle.content import Signed
from ..lifecycle.presigned import read_signed, require_trusted
from ..lifecycle.tagging import parse_expect
from ..progress import ProgressBar, readable
from ..refs import AdapterRef
from ..registry import Published, utc_now
from ..signing import bundle_identity
from ..validation.base import CARD_NAME, BaseModel
from .attest import push_options, pushed_statements
from .options import FIRST_SIGNS_VERSION, keys_option
from .session import Result, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "directory", metavar="DIR", help="adapter_config.json and adapter_model.safetensors, as PEFT saves"
    )
    parser.add_argument(
        "ref",
        metavar="REF",
        nargs="?",
        help="tenant/adapter, or tenant/adapter@1.2.0 to name the version; the tenant may be left out when the "
        "settings name one; default: your tenant, the directory's name, the next number",
    )
    parser.add_argument("--tag", help="move this tag to the version")
    parser.add_argument(
        "--expect",
        metavar="NOW",
        help="move the tag only if it is at this generation, digest or semantic version now; 0: only if there never "
        "was one",
    )
    parser.add_argument(
        "--annotate",
        metavar="NAME=TEXT",
        action="append",
        default=[],
        help="sign this with it; may be repeated",
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="base model directory or base card; default: base_model.json in DIR, then settings",
    )
    keys_option(parser, FIRST_SIGNS_VERSION)
    parser.add_argument(
        "--signature",
        metavar="FILE",
        help="publish this Model Signing bundle over DIR instead of signing; see registry manifest",
    )
    push_options(parser)


def run(session: Session) -> Result:
    """Publish a directory."""
    directory = Path(session.arguments.directory)
    ref = session.ref(session.arguments.ref or directory.resolve().name)
    signed = _signed(session, directory)
    annotations = dict(map(_annotation, session.arguments.annotate))
    if signed is not None:
        annotations |= dict(signed.manifest.annotations)
    # What was signed elsewhere needs a key of ours for the tag alone.
    signers = [] if signed is not None and not (session.arguments.tag or ref.tag) else session.signers()
    statements = pushed_statements(session, signers)
    expect = session.arguments.expect
    if expect is not None and not (session.arguments.tag or ref.tag):
        raise SettingsError("--expect says what a tag must be before it moves; give --tag TAG too.")
    with session.progress() as bar:
        base = base_for(session, directory, bar)
        done = session.publish(
            directory,
            ref,
            signers,
            base,
            tag=session.arguments.tag,
            expect=None if expect is None else parse_expect(expect),
            annotations=annotations,
            signed=signed,
            statements=statements,
            resumables=session.resumables(resuming(session, bar)),
            progress=bar,
        )
    keyid = done.keyid if signed is None else bundle_identity(signed.bundle).keyid
    result = {**published_result(done), "keyid": keyid}
    return result, published_lines(done, ref, verb="pushed", keyid=keyid)


def resuming(session: Session, bar: ProgressBar) -> Callable[[int, int], None]:
    """Return what tells people, beside the output, that an interrupted push is gone on with."""

    def told(there: int, parts: int) -> None:
        if not getattr(session.arguments, "quiet", False):
            bar.close()  # it draws itself again
            print(f"registry: resuming: {there} of {parts} parts are there", file=session.stderr)

    return told


def _signed(session: Session, directory: Path) -> Signed | None:
    if session.arguments.signature is None:
        return None
    signed = read_signed(directory, session.arguments.signature)
    if session.settings.policy:  # what the policy refuses nobody could use
        require_trusted(signed, session.policy(), utc_now())
    return signed


def _annotation(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"--annotate {text[:80]!r} lacks a text; write --annotate NAME=TEXT.")
    return name, value


def published_result(done: Published) -> dict[str, Any]:
    """Return what commands that publish print with `--json`."""
    return {
        "ref": str(done.ref),
        "version": done.version,
        "digest": done.digest,
        "created": done.created,
        "size_bytes": done.size_bytes,
        "requests": done.requests,
        "keyid": done.keyid,
        "tag": done.tag,
        "tag_moved": done.tag_moved,
        "tag_generation": done.tag_generation,
        "encrypted": done.encrypted,
        "attested": list(done.attested),
    }


def published_lines(done: Published, ref: AdapterRef, *, verb: str, keyid: str | None = None) -> list[str]:
    """Return what commands that publish print for people."""
    lines = [
        f"{verb if done.created else 'already ' + verb} {ref.name}@{done.version}",
        f"  digest  {done.digest}",
        f"  signed  {(keyid or done.keyid)[:16]}…",
        f"  size    {readable(done.size_bytes)} in {done.requests} requests",
    ]
    if done.encrypted:
        lines.append("  stored  encrypted")
    lines += [f"  attest  {kind}" for kind in done.attested]
    if done.tag is not None:
        what = "moved here" if done.tag_moved else "points here already"
        lines.append(f"  tag     {done.tag} {what}, generation {done.tag_generation}")
    return lines


def base_for(session: Session, directory: Path, bar: ProgressBar) -> BaseModel:
    """Return the base model: the option, the card in the directory, or the settings, in this order."""
    named = session.arguments.base
    if named is None and (directory / CARD_NAME).is_file():
        return BaseModel.load(directory / CARD_NAME)
    place = named or session.settings.base
    if not directory.is_dir():
        raise UnsupportedAdapterError(f"{directory} is no directory; name the one with the adapter's files.")
    if place is None:
        raise SettingsError(
            f"The base model of {directory} is not known: it holds no {CARD_NAME}; give --base DIR, or set base in "
            "the settings."
        )
    return BaseModel.load(place, progress=bar)
