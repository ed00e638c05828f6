"""Whether an adapter may be used. Pure decisions: the policy was read before, and nothing here asks the network.

The checks, in the order `verify` makes them (`CHECKS` has their names):

1. scope: the longest scope of the policy that matches `tenant/adapter` decides alone; no scope, no trust;
2. clock: the time of day is not before what was seen already;
3. signature: the bundle is signed by a key, certificate or identity that rule lists; key: `now` lies in its dates;
4. revocation list: signed by one of the rule's revokers, and as fresh as the rule demands;
5. manifest: it is the signed one; revoked: neither the version nor the key is on the list;
6. binding: the signed tenant, adapter and version are the ones asked for;
7. files: the signed files are exactly the manifest and the files it lists, and the record stores those;
8. tag: a statement about this tag and this digest, signed by as many taggers as the rule demands; tag dates: it was not
   issued in the future, has not expired, is not too old; generation: it is not older than one seen before;
9. encryption, attestations, base, limits: what else the rule demands.

A signature of one role never counts for another: adapters, tags, revocation lists and attestations are signed as
different types and judged by different lists of keys.

With `mode = "audit"` the refusals that only say *who* may do *what* (`WAIVED`) become warnings of the result. Damage,
another adapter's bytes, a revoked version or key and a rollback are refused all the same.

`VerifiedManifest` can only be made here, so a function that takes one cannot be handed unverified bytes.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Final

from ..errors import DigestMismatchError, ExpiredError, RegistryError, SignatureInvalidError
from ..format.manifest import Manifest
from ..format.moments import parse_moment
from ..format.record import CommittedRecord
from ..format.tags import TagObject
from ..refs import AdapterRef, Version
from ..signing import bundle_keyid, verify_bundle
from ..validation.weights import MANIFEST_NAME
from . import checks
from .marks import MemoryMarks
from .policy import PolicyLimits, Rule, TrustedAuthority, TrustedKey, TrustPolicy
from .revocations import RevocationList, RevocationObject
from .statements import check_clock, check_list, check_tag, verify_tag_move
from .steps import WAIVED, Steps, Trace

__all__ = [
    "CHECKS",
    "WAIVED",
    "PolicyLimits",
    "Rule",
    "Trace",
    "TrustPolicy",
    "TrustedKey",
    "VerifiedManifest",
    "verify",
    "verify_tag_move",
]

CHECKS: Final = (
    "scope", "clock", "signature", "key", "revocation list", "manifest", "revoked", "binding", "files",
    "tag", "tag binding", "tag dates", "generation", "encryption", "attestations", "base", "limits",
)  # fmt: skip
"""Names of the checks in the order they are made."""

_PROOF = object()


@dataclass(frozen=True, slots=True)
class VerifiedManifest:
    """Proof that a version may be used: made by `verify` alone.

    Attributes:
        ref: tenant, adapter and version (never a tag).
        manifest: the signed manifest.
        record: where its files are.
        keyid: id of the key that signed it; empty when audit mode let a bad signature pass.
        scope: the policy rule that decided.
        tag, tag_generation: the tag it was reached by, if any.
        warnings: what the policy's owner should know: audit mode and what it let pass, a stale revocation list.
        revocation_serial: serial of the revocation list it was checked against; None without.
    """

    ref: AdapterRef
    manifest: Manifest
    record: CommittedRecord
    keyid: str
    scope: str
    tag: str | None = None
    tag_generation: int | None = None
    warnings: tuple[str, ...] = ()
    revocation_serial: int | None = None
    _proof: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self._proof is not _PROOF:
            raise TypeError("a VerifiedManifest is made by trust.verify only")

    @property
    def digest(self) -> str:
        """The version's identity, `sha256:…`."""
        return self.record.digest


def verify(
    ref: AdapterRef,
    *,
    version: Version,
    record: CommittedRecord,
    tag: TagObject | None,
    policy: TrustPolicy,
    now: dt.datetime,
    base_digest: str | None = None,
    revocations: RevocationObject | None = None,
    marks: MemoryMarks | None = None,
    trace: Trace | None = None,
    at_rest: bool = True,
    as_of: dt.datetime | None = None,
) -> VerifiedManifest:
    """Decide whether a record may be used for `ref`; the checks are listed at the top of this module.

    Args:
        ref: what was asked for.
        version: the version the record was found under.
        record: as read from the store, unverified.
        tag: as read from the store, unverified; needed when `ref` has a tag.
        policy: the trust policy.
        now: the time to judge dates by, with a time zone.
        base_digest: the base that will serve it; None to accept any.
        revocations: the tenant's list as read from the store, unverified; None when it has none.
        marks: what was seen before; a newer tag or list is remembered. Without marks an older one that has not
            expired is believed.
        trace: is told of every check.
        at_rest: False for a directory that was pulled, which is never encrypted: that check is left out.
        as_of: an earlier time by which keys, certificates, the tag and attestations are judged; the clock and the
            revocation list are judged by `now` always. None: all by `now`.

    Raises:
        PolicyRefusedError, ExpiredError, SignatureInvalidError, DigestMismatchError, RevokedError, RollbackError,
        BaseMismatchError, RankTooLargeError: the first check that failed.
    """
    steps, then = Steps(trace), as_of or now
    with steps.check("scope") as note:
        rule = policy.rule_for(ref.tenant, ref.adapter)
        note.detail = f"rule {rule.scope!r}, mode {rule.mode}"
    steps.begin(rule)
    check_clock(steps, ref.tenant, now, marks)
    signer = _check_signature(steps, record, rule, ref, then)
    listed = check_list(steps, rule, ref.tenant, revocations, now, marks)
    with steps.check("manifest") as note:
        manifest = _signed_manifest(record, signer)
        note.detail = record.digest
    with steps.check("revoked") as note:
        note.detail = checks.check_revoked(
            listed, record.digest, signer.keyid, parse_moment(manifest.created), what=f"{ref.name}@{version}"
        )
    with steps.check("binding") as note:
        note.detail = checks.check_binding(manifest, ref, version)
    with steps.check("files") as note:
        note.detail = checks.check_files(manifest, signer.files, record)
    generation = None
    if ref.tag is None:
        steps.skip("the reference names no tag", "tag", "tag binding", "tag dates", "generation")
    else:
        generation = check_tag(steps, ref, tag, rule, then, listed, marks, (version, record.digest))
    if not at_rest:
        steps.skip("not as it is stored", "encryption")
    else:
        with steps.check("encryption", waivable=True) as note:
            note.detail = checks.check_encryption(record, rule, str(ref))
    _check_attestations(steps, manifest, record, rule, then, listed)
    with steps.check("base") as note:
        note.detail = checks.check_base(manifest, base_digest)
    with steps.check("limits", waivable=True) as note:
        note.detail = checks.check_limits(manifest, rule)
    return VerifiedManifest(
        ref=AdapterRef(ref.tenant, ref.adapter, version=version),
        manifest=manifest,
        record=record,
        keyid=signer.keyid,
        scope=rule.scope,
        tag=ref.tag,
        tag_generation=generation,
        warnings=tuple(steps.warnings),
        revocation_serial=None if listed is None else listed.serial,
        _proof=_PROOF,
    )


@dataclass(frozen=True, slots=True)
class _Signer:
    """Who signed what: {file name: hex SHA-256}; None, and no key id, when audit mode let a bad signature pass."""

    keyid: str
    files: dict[str, str] | None
    trusted: TrustedKey | TrustedAuthority | None


def _check_signature(
    steps: Steps, record: CommittedRecord, rule: Rule, ref: AdapterRef, now: dt.datetime
) -> _Signer:
    signer = _Signer("", None, None)
    with steps.check("signature", waivable=True) as note:
        signer = _signer(record, rule, ref, now)
        note.detail = f"signed by {signer.trusted}"
    if signer.trusted is None:
        steps.skip("no signature counts", "key")
        return signer
    with steps.check("key", waivable=True) as note:
        try:
            signer.trusted.check(now)
        except ExpiredError as error:
            raise ExpiredError(f"{ref}: {error.message}") from error
        note.detail = "within its dates"
    return signer


def _signer(record: CommittedRecord, rule: Rule, ref: AdapterRef, now: dt.datetime) -> _Signer:
    if not rule.authorities:
        trusted = rule.key(bundle_keyid(record.bundle), name=str(ref))
        return _Signer(trusted.key.keyid, verify_bundle(record.bundle, trusted.key), trusted)
    from ..signing.bundles import KeyIdentity, bundle_identity, verify_bundle_with

    identity = bundle_identity(record.bundle)
    if isinstance(identity, KeyIdentity):
        trusted = rule.key(identity.keyid, name=str(ref))
        return _Signer(identity.keyid, verify_bundle(record.bundle, trusted.key), trusted)
    refusals: list[RegistryError] = []
    for authority in rule.authorities:
        try:
            files = verify_bundle_with(record.bundle, authority.authority, now)
        except (SignatureInvalidError, ExpiredError) as error:
            refusals.append(error)
        else:
            return _Signer(identity.keyid, files, authority)
    # The reason of the one authority, or of the one that came furthest: a date is judged last.
    raise next((error for error in refusals if isinstance(error, ExpiredError)), refusals[0])


def _signed_manifest(record: CommittedRecord, signer: _Signer) -> Manifest:
    if signer.files is not None and signer.files.get(MANIFEST_NAME) != record.digest.removeprefix("sha256:"):
        raise DigestMismatchError(f"{MANIFEST_NAME} differs from the signed one; publish the adapter again.")
    return Manifest.from_bytes(record.manifest_bytes)


def _check_attestations(
    steps: Steps,
    manifest: Manifest,
    record: CommittedRecord,
    rule: Rule,
    now: dt.datetime,
    listed: RevocationList | None,
) -> None:
    if not rule.attestations:
        steps.skip("the rule demands none", "attestations")
        return
    with steps.check("attestations", waivable=True) as note:
        found = [
            checks.check_attestation(wanted, manifest, record, now, listed) for wanted in rule.attestations
        ]
        note.detail = "; ".join(found)
