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

import contextlib
import datetime as dt
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from ..errors import (
    DigestMismatchError,
    ExpiredError,
    PolicyRefusedError,
    RankTooLargeError,
    RegistryError,
    SignatureInvalidError,
    StaleRevocationError,
)
from ..format.manifest import Manifest
from ..format.moments import parse_moment
from ..format.record import CommittedRecord
from ..format.tags import PAYLOAD_TYPE as TAG_TYPE
from ..format.tags import TagObject, TagStatement
from ..refs import AdapterRef, Version
from ..signing import bundle_keyid, payload_unverified, verify_bundle
from ..signing.quorum import signers_of
from ..validation.weights import MANIFEST_NAME
from . import checks
from .marks import REVOCATIONS, Mark, MemoryMarks
from .policy import PolicyLimits, Rule, TrustedAuthority, TrustedKey, TrustPolicy, keys_of
from .revocations import RevocationList, RevocationObject, verify_revocations

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

WAIVED: Final = (SignatureInvalidError, ExpiredError, PolicyRefusedError, RankTooLargeError)
"""Refusals that audit mode turns into warnings, where the check is one of who may do what."""

_PROOF = object()


class Trace(Protocol):
    """Is told of every check as it is made: its name, `ok`, `FAILED`, `waived` or `skipped`, and why."""

    def __call__(self, check: str, outcome: str, detail: str) -> None:
        """Take note."""


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

    Raises:
        PolicyRefusedError, ExpiredError, SignatureInvalidError, DigestMismatchError, RevokedError, RollbackError,
        BaseMismatchError, RankTooLargeError: the first check that failed.
    """
    steps = _Steps(trace)
    with steps.check("scope") as note:
        rule = policy.rule_for(ref.tenant, ref.adapter)
        note.detail = f"rule {rule.scope!r}, mode {rule.mode}"
    steps.begin(rule)
    _check_clock(steps, ref.tenant, now, marks)
    signer = _check_signature(steps, record, rule, ref, now)
    listed = _check_list(steps, rule, ref.tenant, revocations, now, marks)
    with steps.check("manifest") as note:
        manifest = _signed_manifest(record, signer)
        note.detail = record.digest
    with steps.check("revoked") as note:
        note.detail = checks.check_revoked(
            listed, record.digest, signer.keyid, parse_moment(manifest.created)
        )
    with steps.check("binding") as note:
        note.detail = checks.check_binding(manifest, ref, version)
    with steps.check("files") as note:
        note.detail = checks.check_files(manifest, signer.files, record)
    generation = None
    if ref.tag is None:
        steps.skip("the reference names no tag", "tag", "tag binding", "tag dates", "generation")
    else:
        generation = _check_tag(steps, ref, tag, rule, now, listed, marks, (version, record.digest))
    if not at_rest:
        steps.skip("not as it is stored", "encryption")
    else:
        with steps.check("encryption", waivable=True) as note:
            note.detail = checks.check_encryption(record, rule, str(ref))
    _check_attestations(steps, manifest, record, rule, now, listed)
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


def verify_tag_move(
    ref: AdapterRef,
    tag: TagObject,
    *,
    policy: TrustPolicy,
    now: dt.datetime,
    revocations: RevocationObject | None = None,
    marks: MemoryMarks | None = None,
    trace: Trace | None = None,
) -> TagStatement:
    """Verify a tag's statement alone, and remember its generation: for tags that were removed, and before moving one.

    A removal has no version to `verify`, but must be seen, or the statement before it could be put back.

    Raises:
        PolicyRefusedError, ExpiredError, SignatureInvalidError, RevokedError, RollbackError: as `verify`.
    """
    steps = _Steps(trace)
    with steps.check("scope"):
        rule = policy.rule_for(ref.tenant, ref.adapter)
    steps.begin(rule)
    _check_clock(steps, ref.tenant, now, marks)
    listed = _check_list(steps, rule, ref.tenant, revocations, now, marks)
    digest = "" if tag.record is None else tag.record.digest
    _check_tag(steps, ref, tag, rule, now, listed, marks, (tag.statement.version, digest))
    return tag.statement


class _Note:
    """What a check has to say about its success."""

    def __init__(self) -> None:
        self.detail = ""
        self.outcome = "ok"


class _Steps:
    """Reports each check, and turns refusals into warnings where the mode and the check allow it."""

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace
        self._audit = False
        self.warnings: list[str] = []

    def begin(self, rule: Rule) -> None:
        """Take the mode from the rule that decides."""
        self._audit = rule.mode == "audit"
        if self._audit:
            self.warnings.append(
                f"The policy rule {rule.scope!r} is in audit mode: its demands are not enforced."
            )

    @contextlib.contextmanager
    def check(self, name: str, *, waivable: bool = False, quiet: bool = False) -> Iterator[_Note]:
        """Make one check; the block raises to refuse. A quiet one tells of a refusal only."""
        note = _Note()
        try:
            yield note
        except RegistryError as error:
            waive = waivable and self._audit and isinstance(error, WAIVED)
            self._tell(name, "waived" if waive else "FAILED", f"{error.code}: {error.message}")
            if not waive:
                raise
            self.warnings.append(f"{error.code}: {error.message}")
        else:
            if not quiet:
                self._tell(name, note.outcome, note.detail)

    def skip(self, why: str, *names: str) -> None:
        """Report checks that do not apply."""
        for name in names:
            self._tell(name, "skipped", why)

    def _tell(self, name: str, outcome: str, detail: str) -> None:
        if self._trace is not None:
            self._trace(name, outcome, detail)


@dataclass(frozen=True, slots=True)
class _Signer:
    """Who signed what: {file name: hex SHA-256}; None, and no key id, when audit mode let a bad signature pass."""

    keyid: str
    files: dict[str, str] | None
    trusted: TrustedKey | TrustedAuthority | None


def _check_clock(steps: _Steps, tenant: str, now: dt.datetime, marks: MemoryMarks | None) -> None:
    if marks is None:
        steps.skip("nothing is remembered", "clock")
        return
    with steps.check("clock") as note:
        seen = marks.seen(tenant)
        seen.check_clock(now)
        note.detail = f"{now:%Y-%m-%dT%H:%M:%SZ}"


def _check_signature(
    steps: _Steps, record: CommittedRecord, rule: Rule, ref: AdapterRef, now: dt.datetime
) -> _Signer:
    signer = _Signer("", None, None)
    with steps.check("signature", waivable=True) as note:
        signer = _signer(record, rule, ref, now)
        note.detail = f"signed by {signer.trusted}"
    if signer.trusted is None:
        steps.skip("no signature counts", "key")
        return signer
    with steps.check("key", waivable=True) as note:
        signer.trusted.check(now)
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


def _check_list(
    steps: _Steps,
    rule: Rule,
    tenant: str,
    found: RevocationObject | None,
    now: dt.datetime,
    marks: MemoryMarks | None,
) -> RevocationList | None:
    """Return the tenant's revocation list, verified; None when the rule lets nobody revoke or there is no list."""
    if not rule.revokers:
        steps.skip("the rule names no revokers", "revocation list")
        return None
    if found is None and marks is not None:
        # A list that was seen is never taken back, so its absence is a rollback like any other.
        with steps.check("revocation list", quiet=True):
            marks.seen(tenant).advanced(REVOCATIONS, Mark(0, "", ()), now, keys_of(rule.revokers))
    if found is None and rule.revocation is None:
        steps.skip("the tenant has no list and the rule demands none", "revocation list")
        return None
    listed = None
    with steps.check("revocation list", waivable=True) as note:
        if found is not None:
            listed = verify_revocations(found, tenant, rule.revokers, now=now, marks=marks)
            note.detail = f"serial {listed.serial}, issued {listed.issued}, {len(listed.entries)} entries"
        try:
            checks.check_fresh(listed, rule, tenant, now)
        except StaleRevocationError as error:
            if rule.revocation is None or rule.revocation.on_stale != "warn":
                raise
            steps.warnings.append(f"{error.code}: {error.message}")
            note.detail = f'stale, accepted by on_stale = "warn": {error.message}'
    return listed


def _signed_manifest(record: CommittedRecord, signer: _Signer) -> Manifest:
    if signer.files is not None and signer.files.get(MANIFEST_NAME) != record.digest.removeprefix("sha256:"):
        raise DigestMismatchError(f"{MANIFEST_NAME} differs from the signed one; publish the adapter again.")
    return Manifest.from_bytes(record.manifest_bytes)


def _check_tag(
    steps: _Steps,
    ref: AdapterRef,
    tag: TagObject | None,
    rule: Rule,
    now: dt.datetime,
    listed: RevocationList | None,
    marks: MemoryMarks | None,
    found: tuple[Version | None, str],
) -> int:
    """Check a tag's statement against what it led to, (version, digest), and return its generation."""
    if tag is None or ref.tag is None:
        raise SignatureInvalidError(f"{ref} was resolved without a tag statement; resolve it again.")
    # What is judged is what was signed: a statement that was handed over beside the envelope is not believed.
    payload, wanted = payload_unverified(tag.envelope), rule.tag_rule(ref.tag)
    statement = TagStatement.from_bytes(payload)
    issued = parse_moment(statement.issued)
    signers: tuple[TrustedKey, ...] = ()
    with steps.check("tag", waivable=True) as note:
        signers = signers_of(
            tag.envelope,
            TAG_TYPE,
            wanted.taggers or (),
            what=f"the tag {ref}",
            role="taggers",
            now=now,
            threshold=wanted.threshold,
            not_revoked=lambda keyid: None if listed is None else listed.check(None, keyid, issued),
        )
        note.detail = f"signed by {', '.join(map(str, signers))}; {wanted.threshold} needed"
    with steps.check("tag binding") as note:
        note.detail = checks.check_tag_binding(statement, ref, found)
    with steps.check("tag dates", waivable=True) as note:
        note.detail = checks.check_tag_dates(statement, ref, wanted, issued, now)
    if marks is None or not signers:
        steps.skip("nothing is remembered" if signers else "no signature counts", "generation")
    else:
        with steps.check("generation") as note:
            digest = hashlib.sha256(payload).hexdigest()
            mark = Mark(statement.generation, digest, tuple(item.key.keyid for item in signers))
            trusted = keys_of(wanted.taggers or ())
            marks.advance(ref.tenant, f"{ref.adapter}@{ref.tag}", mark, issued=issued, trusted=trusted)
            note.detail = f"{statement.generation}, not older than seen before"
    return statement.generation


def _check_attestations(
    steps: _Steps,
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
