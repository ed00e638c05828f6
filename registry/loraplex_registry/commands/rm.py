"""`registry rm`: delete a version.

A version that a tag points to is kept, unless `--force` removes the tag too. The name of a deleted version is never
used again. Its bytes go when `registry gc` finds them older than the grace, so running downloads end well.
"""

from __future__ import annotations

import argparse
import getpass

from ..errors import InvalidReferenceError, SettingsError
from ..lifecycle.delete import delete_version
from ..registry import utc_now
from ..signing import Signer
from .options import keys_option
from .session import Result, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ref", metavar="REF", help="the version, as tenant/adapter@3")
    parser.add_argument("--force", action="store_true", help="remove the tags that point to it (takes a key)")
    parser.add_argument("--reason", default="deleted", metavar="TEXT", help="kept in the tombstone")
    keys_option(parser)


def run(session: Session) -> Result:
    """Delete a version."""
    ref = session.ref(session.arguments.ref)
    if ref.version is None:
        raise InvalidReferenceError(f"{ref} names no version; write {ref.name}@3.")
    signers = session.signers() if session.arguments.force else []
    done = delete_version(
        session.store(),
        ref,
        by=_who(signers),
        now=utc_now(),
        reason=session.arguments.reason,
        force=session.arguments.force,
        signers=signers,
    )
    if done.deleted and (signers or session.settings.key):
        signer = signers[0] if signers else session.signer()
        for tag in done.untagged:
            session.record("untag", f"{ref.name}@{tag}", signer)
        session.record("delete", str(ref), signer, digest=done.digest, reason=session.arguments.reason)
    result = {
        "ref": str(ref),
        "digest": done.digest,
        "deleted": done.deleted,
        "untagged": list(done.untagged),
    }
    lines = [f"{'deleted' if done.deleted else 'already deleted'} {ref}", f"  digest  {done.digest}"]
    return result, lines + [f"  untagged  {tag}" for tag in done.untagged]


def _who(signers: list[Signer]) -> str:
    if signers:
        return signers[0].keyid
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise SettingsError("It is not known who you are; set USER.") from error
