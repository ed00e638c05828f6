"""`registry attest`: attach a signed statement to a version, for example how it was built or evaluated.

FILE holds the predicate: one JSON object. It is signed as an in-toto statement about this version and kept in the
version's record. The version is verified first; its digest does not change. The same statement is attached once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import REFERENCE_HELP
from .session import Result, Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..lifecycle.amend import Amended
    from ..lifecycle.content import Statement
    from ..signing import Signer
    from ..trust.verdict import VerifiedManifest

SLSA = "https://slsa.dev/provenance/v1"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    parser.add_argument("file", metavar="FILE", help="the predicate, one JSON object of at most 64 KiB")
    parser.add_argument(
        "--type", metavar="URI", default=SLSA, help=f"predicate type, an https URI; default {SLSA}"
    )
    parser.add_argument("--key", help="private key file, or awskms:…, hsm:…; default the settings'")


def run(session: Session) -> Result:
    """Attach a statement."""
    arguments = session.arguments
    predicate, signer = predicate_in(Path(arguments.file)), session.signer()
    verified = verified_but_for_attestations(session, arguments.ref)
    done = attach_recorded(session, verified, arguments.type, predicate, signer)
    result = {
        "ref": str(verified.ref),
        "digest": verified.digest,
        "type": arguments.type,
        "keyid": signer.keyid,
        "attached": done.changed,
        "attestations": len(done.record.attest),
        "tags": list(done.tags),
    }
    word = "attached to" if done.changed else "already attached to"
    return result, [
        f"{word} {verified.ref}",
        f"  type    {arguments.type}",
        f"  signed  {signer.keyid[:16]}…",
        *(f"  tag     {tag} shows it" for tag in done.tags),
    ]


def predicate_in(path: Path) -> dict[str, Any]:
    """Return the predicate in a file.

    Raises:
        SettingsError: it cannot be opened, or is not one JSON object of acceptable length.
    """
    from ..errors import SettingsError
    from ..format.record import ATTESTATION_BYTES_MAX
    from ..signing.attestations import read_predicate

    try:
        with path.open("rb") as file:
            body = file.read(ATTESTATION_BYTES_MAX + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be opened ({error.strerror}).") from error
    return read_predicate(body)


def verified_but_for_attestations(session: Session, text: str) -> VerifiedManifest:
    """Resolve a reference and verify it by all the policy demands except attestations, which are yet to come.

    Raises:
        PolicyRefusedError: the rule is in audit mode, which vouches for nothing.
        Others: as `Session.verified`.
    """
    from dataclasses import replace

    from ..errors import PolicyRefusedError
    from ..trust.verdict import TrustPolicy
    from ..trust.verifier import Verifier

    policy = session.policy()
    relaxed = TrustPolicy(tuple(replace(rule, attestations=()) for rule in policy.rules), policy.digest)
    registry = session.registry()
    verifier = Verifier(registry, relaxed, marks=session.marks(registry), refresh_s=0)
    verified = verifier.verify(session.ref(text))
    if verified.warnings:
        raise PolicyRefusedError(
            f"{verified.ref} is not vouched for, so it is not attested: {verified.warnings[0]}"
        )
    return verified


def attach_recorded(
    session: Session,
    verified: VerifiedManifest,
    predicate_type: str,
    predicate: dict[str, Any],
    signer: Signer,
) -> Amended:
    """Attach a statement and record it in the audit log."""
    from ..lifecycle.amend import attach

    done = attach(session.store(), verified, predicate_type, predicate, signer)
    if done.changed:
        session.record("attest", str(verified.ref), signer, digest=verified.digest, type=predicate_type[:100])
    return done


def push_options(parser: argparse.ArgumentParser) -> None:
    """Add the options by which `registry push` attaches statements."""
    parser.add_argument(
        "--attest",
        metavar="FILE",
        action="append",
        default=[],
        help="attach a signed statement with this predicate; may be repeated; see registry attest",
    )
    parser.add_argument(
        "--attest-type", metavar="URI", default=SLSA, help=f"predicate type of --attest; default {SLSA}"
    )


def pushed_statements(session: Session, signers: Sequence[Signer]) -> list[Statement]:
    """Return the statements of `registry push --attest`, to be signed by the push's first key or the settings'.

    Raises:
        SettingsError: as `predicate_in`, or the type is not acceptable.
    """
    from ..lifecycle.content import Statement
    from ..signing.attestations import check_predicate

    kind = session.arguments.attest_type
    predicates = [predicate_in(Path(name)) for name in session.arguments.attest]
    for predicate in predicates:
        check_predicate(kind, predicate)
    if not predicates:
        return []
    signer = signers[0] if signers else session.signer()
    return [Statement(kind, predicate, signer) for predicate in predicates]
