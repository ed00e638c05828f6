"""`registry show`: what is known about a version, and whether it would be trusted.

What is not trusted is shown all the same, with the reason; `registry policy explain` tells every check.
"""

from __future__ import annotations

import argparse

from ..errors import RegistryError
from ..format.canonical import parse_canonical
from ..progress import readable
from ..registry import Registry, Resolved
from .options import REFERENCE_HELP
from .session import Result, Session


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ref", metavar="REF", help=REFERENCE_HELP)


def run(session: Session) -> Result:
    """Print a version's manifest and whether it would be trusted."""
    registry = session.registry()
    resolved = registry.resolve(session.ref(session.arguments.ref))
    manifest = resolved.record.manifest_unverified()
    trusted, reason = _trusted(session, registry, resolved)
    base, lora, envelope = manifest.base_model, manifest.lora, resolved.record.encryption
    result = {
        "ref": f"{resolved.ref.name}@{resolved.version}",
        "digest": resolved.digest,
        "verified": trusted,
        "reason": reason,
        "encryption": None if envelope is None else {"alg": envelope.alg, "kek": envelope.kek},
        "tag_generation": resolved.tag.statement.generation if resolved.tag else None,
        "manifest": parse_canonical(resolved.record.manifest_bytes),
    }
    lines = [
        f"{manifest.tenant}/{manifest.adapter}@{manifest.version}",
        f"  digest    {resolved.digest}",
        f"  verified  {'yes' if trusted else f'NO: {reason}'}",
        f"  created   {manifest.created}",
        f"  base      {base.name} {base.digest}",
        f"  lora      rank {lora.rank}, alpha {lora.alpha:g}, {lora.dtype}, {lora.n_params} parameters",
        f"  modules   {', '.join(lora.target_modules)}",
        *([] if envelope is None else [f"  encrypted with key {envelope.kek}"]),
        *(f"  note      {name}: {text}" for name, text in manifest.annotations),
        *(f"  file      {file.name}  {readable(file.size)}  sha256:{file.sha256}" for file in manifest.files),
    ]
    return result, lines


def _trusted(session: Session, registry: Registry, resolved: Resolved) -> tuple[bool, str | None]:
    try:
        session.verifier(registry).decide(resolved)
    except RegistryError as error:
        return False, f"{error.code}: {error.message}"
    return True, None
