"""Attestations: signed statements *about* a version, kept beside its signature: how it was built, how it was evaluated.

An attestation is an in-toto v1 statement (https://in-toto.io/Statement/v1) in a DSSE envelope. Its one subject is the
version by name and by the digest of its manifest, so it counts for no other. The predicate type is SLSA provenance v1
(https://slsa.dev/provenance/v1) or any other https URI; what a predicate must say is for the trust policy to decide.

A Model Signing statement has the same payload type. The two cannot pass for each other: its predicate type is refused
here, and it is the only one accepted there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import SettingsError, SignatureInvalidError
from ..format.canonical import StrictJsonError, canonical, exact_object, parse
from ..format.record import ATTESTATION_BYTES_MAX
from ..refs import AdapterRef, Version, check_digest
from .bundles import IN_TOTO_TYPE, PREDICATE_TYPE, STATEMENT_TYPE
from .envelopes import (
    PAYLOAD_BYTES_MAX,
    envelope_keyids,
    sign_envelope,
    verify_envelope,
)
from .keys import PublicKey, Signer

SLSA_PROVENANCE: Final = "https://slsa.dev/provenance/v1"
"""Predicate type of SLSA provenance v1 (https://slsa.dev/spec/v1.0/provenance)."""

_PREDICATE_TYPE = re.compile(r"https://[!-~]{1,248}")
_AGAIN = "make it again with `registry attest`."


@dataclass(frozen=True, slots=True)
class Attestation:
    """A statement about a version.

    Attributes:
        subject: `tenant/adapter@version`.
        predicate_type: an https URI.
        predicate: what is stated.
        keyids: keys whose signatures were verified, in ascending order; empty when none was.
    """

    subject: str
    predicate_type: str
    predicate: dict[str, Any]
    keyids: tuple[str, ...] = ()

    @property
    def builder_id(self) -> str | None:
        """Who built it, as SLSA provenance v1 says (`runDetails.builder.id`); None in other statements."""
        if self.predicate_type != SLSA_PROVENANCE:
            return None
        found: object = self.predicate
        for key in ("runDetails", "builder", "id"):
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, str) else None


def subject_name(ref: AdapterRef, version: Version) -> str:
    """Return how a version is named in a statement."""
    return f"{ref.name}@{version}"


def make_attestation(
    ref: AdapterRef,
    version: Version,
    digest: str,
    predicate_type: str,
    predicate: Mapping[str, Any],
    signer: Signer,
) -> dict[str, Any]:
    """Return a signed statement about one version, as it is kept in the version's record.

    Args:
        ref: tenant and adapter.
        version: the version.
        digest: `sha256:…` of its manifest.
        predicate_type: an https URI.
        predicate: a JSON object; SLSA provenance needs `buildDefinition` and `runDetails`.
        signer: the key.

    Raises:
        SettingsError: the type or the predicate is not acceptable, or the statement is too long.
    """
    check_digest(digest)
    try:
        _check_predicate(predicate_type, predicate)
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": [
                {"name": subject_name(ref, version), "digest": {"sha256": digest.removeprefix("sha256:")}}
            ],
            "predicateType": predicate_type,
            "predicate": dict(predicate),
        }
        payload = canonical(statement)
    except StrictJsonError as error:
        raise SettingsError(f"The attestation cannot be made ({error}); correct the predicate.") from error
    envelope = sign_envelope(payload, IN_TOTO_TYPE, signer)
    if len(canonical(envelope)) > ATTESTATION_BYTES_MAX:
        raise SettingsError(
            f"The attestation is longer than {ATTESTATION_BYTES_MAX} bytes; attach a digest of the long part instead."
        )
    return envelope


def check_predicate(predicate_type: str, predicate: Mapping[str, Any]) -> None:
    """Refuse what cannot be attested, before anything is done.

    Raises:
        SettingsError: the type or the predicate is not acceptable.
    """
    try:
        _check_predicate(predicate_type, predicate)
    except StrictJsonError as error:
        raise SettingsError(f"The attestation cannot be made ({error}); correct the predicate.") from error


def read_predicate(body: bytes) -> dict[str, Any]:
    """Return the predicate in a JSON file.

    Raises:
        SettingsError: too long, not strict JSON, or not an object.
    """
    try:
        predicate = parse(body, limit_bytes=ATTESTATION_BYTES_MAX)
    except StrictJsonError as error:
        raise SettingsError(f"The predicate cannot be read ({error}); it must be one JSON object.") from error
    if not isinstance(predicate, dict):
        raise SettingsError("The predicate is not a JSON object; write one.")
    return predicate


def verify_attestations(
    attest: Sequence[object], subject: str, digest: str, keys: Sequence[PublicKey]
) -> list[Attestation]:
    """Return the statements about a version that at least one of `keys` signed, in the order they are kept.

    Statements that none of the keys signed are left out: anybody who can write to the storage could have added them.
    Every signature by one of the keys must verify.

    Args:
        attest: the record's envelopes.
        subject: the version, `subject_name(ref, version)`.
        digest: `sha256:…` of its manifest.
        keys: keys that count for statements about it.

    Raises:
        SignatureInvalidError: an envelope cannot be read, or a statement of one of the keys has a bad signature, is out
            of shape or about something else.
    """
    known = {key.keyid: key for key in keys}
    found = []
    for envelope in attest:
        keyids = tuple(keyid for keyid in envelope_keyids(envelope) if keyid in known)
        if not keyids:
            continue
        payload = verify_envelope(envelope, IN_TOTO_TYPE, [known[keyid] for keyid in keyids])
        statement, sha256 = _read(payload)
        if (statement.subject, "sha256:" + sha256) != (subject, digest):
            raise SignatureInvalidError(
                f"An attestation of {subject} was signed for {statement.subject[:150]} sha256:{sha256[:12]}…; {_AGAIN}"
            )
        found.append(Attestation(subject, statement.predicate_type, statement.predicate, keyids))
    return found


def _read(payload: bytes) -> tuple[Attestation, str]:
    """Return the statement in a payload, and the hex digest of its subject."""
    try:
        fields = exact_object(
            parse(payload, limit_bytes=PAYLOAD_BYTES_MAX),
            frozenset({"_type", "subject", "predicateType", "predicate"}),
        )
        if fields["_type"] != STATEMENT_TYPE:
            raise StrictJsonError("another statement type")
        _check_predicate(fields["predicateType"], fields["predicate"])
        if not isinstance(fields["subject"], list) or len(fields["subject"]) != 1:
            raise StrictJsonError("exactly one subject is needed")
        subject = exact_object(fields["subject"][0], frozenset({"name", "digest"}))
        sha256 = exact_object(subject["digest"], frozenset({"sha256"}))["sha256"]
        if not isinstance(subject["name"], str) or not isinstance(sha256, str):
            raise StrictJsonError("the subject is out of shape")
    except StrictJsonError as error:
        raise SignatureInvalidError(f"An attestation is refused ({error}); {_AGAIN}") from error
    return Attestation(subject["name"], fields["predicateType"], fields["predicate"]), sha256


def _check_predicate(predicate_type: object, predicate: object) -> None:
    if not isinstance(predicate_type, str) or not _PREDICATE_TYPE.fullmatch(predicate_type):
        raise StrictJsonError("the predicate type is not an https URI of at most 256 characters")
    if predicate_type == PREDICATE_TYPE:
        raise StrictJsonError("a model signature is not an attestation")
    if not isinstance(predicate, Mapping):
        raise StrictJsonError("the predicate is not an object")
    if predicate_type == SLSA_PROVENANCE:
        for part, needed in (("buildDefinition", "buildType"), ("runDetails", "builder")):
            if not isinstance(predicate.get(part), dict) or needed not in predicate[part]:
                raise StrictJsonError(f"SLSA provenance needs {part}.{needed}")
