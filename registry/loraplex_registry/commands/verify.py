"""`registry verify`: check signature, policy and every byte, in the registry or in a pulled directory."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ..delivery.pulled import verify_directory
from ..errors import SettingsError, StoreError
from ..lifecycle.presigned import read_signed
from ..registry import utc_now
from ..trust.revocations import RevocationObject
from ..trust.verdict import VerifiedManifest
from ..validation.weights import BUNDLE_NAME
from .options import REFERENCE_HELP
from .session import Result, Session, verified_result


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("target", metavar="REF|DIR", help=f"a pulled directory, or {REFERENCE_HELP}")


def run(session: Session) -> Result:
    """Check a pulled directory, or a version in the registry with all its bytes."""
    target = Path(session.arguments.target)
    notes: list[str] = []
    if (target / BUNDLE_NAME).is_file():
        verified = _verify_directory(session, target, notes)
    else:
        registry, verified = session.verified(session.arguments.target)
        with session.progress() as bar, tempfile.TemporaryDirectory(prefix="loraplex-") as place:
            registry.pull(verified, Path(place) / "adapter", progress=bar)
    notes += verified.warnings
    lines = [
        f"verified {verified.ref}",
        f"  digest  {verified.digest}",
        f"  signed  {verified.keyid[:16]}… under rule {verified.scope!r}",
        *(f"  note    {note}" for note in notes),
    ]
    return {**verified_result(verified), "notes": notes}, lines


def _verify_directory(session: Session, directory: Path, notes: list[str]) -> VerifiedManifest:
    revocations = _revocations(session, directory, notes)
    with session.progress() as bar:
        pulled = verify_directory(
            directory,
            session.policy(),
            now=utc_now(),
            revocations=revocations,
            marks=None if revocations is None else session.marks(session.registry()),
            progress=bar,
        )
    return pulled.verified


def _revocations(session: Session, directory: Path, notes: list[str]) -> RevocationObject | None:
    """Return the tenant's list. Without a registry at hand a rule that demands a fresh list refuses; others do not."""
    tenant = read_signed(directory, directory / BUNDLE_NAME).manifest.tenant
    try:
        return session.verifier(session.registry()).revocations(tenant)
    except (StoreError, SettingsError) as error:
        notes.append(f"the revocation list was not read: {error.message}")
        return None
