"""`registry verify`: check signature, policy and every byte, in the registry or in a pulled directory."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ..delivery.pulled import verify_directory
from ..errors import (
    AdapterNotFoundError,
    InvalidReferenceError,
    SettingsError,
    StoreError,
    UnsupportedAdapterError,
)
from ..lifecycle.presigned import read_signed
from ..registry import Registry, utc_now
from ..trust.revocations import RevocationObject
from ..trust.verdict import VerifiedManifest
from ..validation.weights import BUNDLE_NAME, MANIFEST_NAME
from .options import REFERENCE_HELP
from .session import Result, Session, verified_result


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("target", metavar="REF|DIR", help=f"a pulled directory, or {REFERENCE_HELP}")


def run(session: Session) -> Result:
    """Check a pulled directory, or a version in the registry with all its bytes."""
    target = Path(session.arguments.target)
    notes: list[str] = []
    if not _missing(target):
        verified = _verify_directory(session, target, notes)
    else:
        registry, verified = _verified(session, target)
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


def _missing(directory: Path) -> list[str]:
    """Return which of the files are missing that a pulled directory holds."""
    return [name for name in (MANIFEST_NAME, BUNDLE_NAME) if not (directory / name).exists()]


def _unsigned(directory: Path) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{directory} holds no {' and no '.join(_missing(directory))}, so there is nothing signed to check; `registry "
        "pull REF DIR` writes a directory that can be verified, `registry push` signs and publishes this one."
    )


def _verified(session: Session, target: Path) -> tuple[Registry, VerifiedManifest]:
    """Verify a reference. A word that names none may have been meant as a directory: that is told."""
    text: str = session.arguments.target
    if _missing(target) == [MANIFEST_NAME]:
        raise _unsigned(target)
    try:
        return session.verified(text)
    except (AdapterNotFoundError, InvalidReferenceError) as error:
        if target.is_dir():
            raise _unsigned(target) from error
        if text.startswith((".", "/", "~")):
            raise InvalidReferenceError(
                f"{text[:100]!r} is no directory, and no reference either; name a pulled directory, or TENANT/NAME@TAG."
            ) from error
        raise


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
