"""A directory that holds a signed adapter, as `pull` writes it: verified as if a store held it."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnsupportedAdapterError
from ..format.manifest import Manifest
from ..format.record import CommittedRecord, StoredFile
from ..lifecycle.content import Signed
from ..lifecycle.presigned import read_signed
from ..refs import AdapterRef
from ..trust import verdict as trust
from ..trust.marks import MemoryMarks
from ..trust.policy import TrustPolicy
from ..trust.revocations import RevocationObject
from ..trust.verdict import VerifiedManifest
from ..validation.base import CARD_NAME, BaseModel, Progress
from ..validation.weights import BUNDLE_NAME, Limits, open_regular, validate_adapter


@dataclass(frozen=True, slots=True)
class PulledAdapter:
    """What a directory was proven to hold: the verified manifest, its base card, and manifest and bundle as signed."""

    verified: VerifiedManifest
    base: BaseModel
    signed: Signed


def verify_directory(
    directory: Path,
    policy: TrustPolicy,
    *,
    now: dt.datetime,
    revocations: RevocationObject | None = None,
    marks: MemoryMarks | None = None,
    attest: Sequence[dict[str, Any]] = (),
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> PulledAdapter:
    """Verify signature, policy and every byte of a directory written by `pull` or read from an export.

    Args:
        directory: the files, the manifest and the bundle, and nothing else.
        policy: the trust policy.
        now: the time to judge dates by.
        revocations: the tenant's list, when it can be had.
        marks: what was seen before.
        attest: the version's attestations, for a policy that demands some.
        limits: default `Limits()`.
        progress: phase "check".

    Raises:
        SignatureInvalidError, DigestMismatchError, PolicyRefusedError, ExpiredError, RevokedError: not to be trusted.
        UnsupportedAdapterError, RankTooLargeError, BaseMismatchError: not an adapter that fits its own base card.
    """
    signed = read_signed(directory, directory / BUNDLE_NAME)
    manifest = Manifest.from_bytes(signed.manifest_bytes)
    files = tuple(_found(directory / file.name) for file in manifest.files)
    record = CommittedRecord("0" * 32, signed.manifest_bytes, signed.bundle, files, tuple(attest))
    verified = trust.verify(
        AdapterRef(manifest.tenant, manifest.adapter, version=manifest.version),
        version=manifest.version,
        record=record,
        tag=None,
        policy=policy,
        now=now,
        revocations=revocations,
        marks=marks,
        at_rest=False,
    )
    base = BaseModel.load(directory / CARD_NAME)
    facts = validate_adapter(directory, base, limits, progress=progress)
    if {fact.name for fact in facts.files} | {CARD_NAME} != {file.name for file in manifest.files}:
        raise UnsupportedAdapterError(
            f"{directory} holds other files than were signed; pull the adapter again."
        )
    return PulledAdapter(verified, base, signed)


def _found(path: Path) -> StoredFile:
    """Return size and digest of a file as it lies on disk."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return StoredFile(path.name, size, digest.hexdigest(), blob="")
