"""What `trust` checks that needs no signature: each function refuses with an error, or says what it found.

All of them look at values already read and at a rule of the policy; none remembers anything.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from ..errors import (
    BaseMismatchError,
    DigestMismatchError,
    ExpiredError,
    PolicyRefusedError,
    RankTooLargeError,
    RegistryError,
    RevokedError,
    SignatureInvalidError,
    StaleRevocationError,
)
from ..format.manifest import Manifest
from ..format.moments import parse_moment
from ..format.record import CommittedRecord
from ..format.tags import TagStatement
from ..refs import AdapterRef, Version, version_order
from ..validation.lora_config import CONFIG_NAME
from ..validation.weights import MANIFEST_NAME, WEIGHTS_NAME
from .marks import CLOCK_SLACK_S
from .policy import AttestationRule, Rule, TagRule, TrustedKey
from .revocations import RevocationList


def check_fresh(listed: RevocationList | None, rule: Rule, tenant: str, now: dt.datetime) -> None:
    """Refuse when the rule demands a revocation list and there is none, or an old one."""
    if rule.revocation is None:
        return
    if listed is None:
        raise StaleRevocationError(
            f"The policy rule {rule.scope!r} demands a revocation list and tenant {tenant} has none; make one with "
            f"`registry revoke --refresh {tenant}`."
        )
    listed.check_fresh(now, max_age_s=rule.revocation.max_age_s)


def check_revoked(
    listed: RevocationList | None,
    digest: str | None,
    keyid: str,
    signed_at: dt.datetime | None,
    *,
    what: str = "",
) -> str:
    """Refuse when the version or the key is on the list; `signed_at` None counts as now, `what` names the version."""
    if listed is None:
        return "no revocation list"
    listed.check(digest, keyid, signed_at, what=what)
    return "neither the version nor its key"


def check_binding(manifest: Manifest, ref: AdapterRef, version: Version) -> str:
    """Refuse a manifest of another tenant, adapter, version or digest than was asked for."""
    # 1 == True in Python, and a version is a number or a text: the types must agree as well.
    found, wanted = (manifest.tenant, manifest.adapter), (ref.tenant, ref.adapter)
    if found != wanted or type(manifest.version) is not type(version) or manifest.version != version:
        raise SignatureInvalidError(
            f"What lies under {ref.name}@{version} was signed as "
            f"{manifest.tenant}/{manifest.adapter}@{manifest.version}; "
            "a signature counts for its own tenant, adapter and version only."
        )
    if ref.version is not None and ref.version != version:
        raise SignatureInvalidError(f"{ref} was asked for, version {version} was found.")
    if ref.digest is not None and ref.digest != manifest.digest:
        raise DigestMismatchError(f"{ref} was asked for, {manifest.digest} was found.")
    return f"{ref.name}@{version}"


def check_files(manifest: Manifest, signed: dict[str, str] | None, record: CommittedRecord) -> str:
    """Refuse unless the signed files are those the manifest lists, and the record stores those."""
    listed = {file.name: file.sha256 for file in manifest.files}
    own = {MANIFEST_NAME: record.digest.removeprefix("sha256:")}
    if MANIFEST_NAME in listed or (signed is not None and listed | own != signed):
        raise SignatureInvalidError(
            "The signed files are not exactly those the manifest lists; sign it again."
        )
    if not {CONFIG_NAME, WEIGHTS_NAME} <= listed.keys():
        raise SignatureInvalidError(
            f"The manifest lacks {CONFIG_NAME} or {WEIGHTS_NAME}; publish the adapter again."
        )
    if [file.name for file in record.files] != [file.name for file in manifest.files]:
        raise DigestMismatchError(
            "The record stores other files than were signed; publish the adapter again."
        )
    for stored, wanted in zip(record.files, manifest.files, strict=True):
        if (stored.size, stored.sha256) != (wanted.size, wanted.sha256):
            raise DigestMismatchError(
                f"{stored.name} differs from the signed digest; get or publish it again."
            )
    return f"{len(listed)} files, {manifest.size_bytes} bytes"


def check_tag_binding(statement: TagStatement, ref: AdapterRef, found: tuple[Version | None, str]) -> str:
    """Refuse a tag statement about another tag, or another (version, digest) than was found."""
    if (statement.tenant, statement.adapter, statement.tag) != (ref.tenant, ref.adapter, ref.tag):
        raise SignatureInvalidError(
            f"The tag statement under {ref} was signed for {statement.tenant}/{statement.adapter}@{statement.tag}."
        )
    version, digest = found
    if statement.manifest_sha256 != digest.removeprefix("sha256:"):
        raise SignatureInvalidError(
            f"The tag {ref} was signed for another digest than it carries; set it again."
        )
    if type(statement.version) is not type(version) or statement.version != version:
        raise SignatureInvalidError(
            f"The tag {ref} was signed for version {statement.version}, {version} was found; set it again."
        )
    return f"{ref} means {'nothing any more' if version is None else version}"


def check_tag_dates(
    statement: TagStatement, ref: AdapterRef, rule: TagRule, issued: dt.datetime, now: dt.datetime
) -> str:
    """Refuse a tag statement from the future, an expired one, and one older than the rule allows."""
    if issued > now + dt.timedelta(seconds=CLOCK_SLACK_S):
        raise ExpiredError(f"The tag {ref} is issued in the future ({statement.issued}); set the clock.")
    if statement.expires and now >= parse_moment(statement.expires):
        raise ExpiredError(f"The tag {ref} expired at {statement.expires}; set it again.")
    if rule.max_age_s is not None and (now - issued).total_seconds() > rule.max_age_s:
        raise ExpiredError(
            f"The tag {ref} was issued {statement.issued}, more than the {rule.max_age_s} s ago that the policy "
            "allows; set it again."
        )
    return f"issued {statement.issued}" + (f", expires {statement.expires}" if statement.expires else "")


def check_encryption(record: CommittedRecord, rule: Rule, name: str) -> str:
    """Refuse a record that is encrypted, or not, against the rule."""
    encrypted = record.encryption is not None
    if rule.encryption == ("forbidden" if encrypted else "required"):
        state = "encrypted" if encrypted else "not encrypted"
        raise PolicyRefusedError(
            f"{name} is {state}, and the policy rule {rule.scope!r} says encryption is {rule.encryption}; "
            "publish it accordingly."
        )
    return f"{'encrypted' if encrypted else 'not encrypted'}; {rule.encryption} by the rule"


def check_attestation(
    wanted: AttestationRule,
    manifest: Manifest,
    record: CommittedRecord,
    now: dt.datetime,
    listed: RevocationList | None,
) -> str:
    """Look for one attestation of the type, by a key that counts now, and of the builder, that the rule names."""
    from ..signing.attestations import verify_attestations

    name = f"{manifest.tenant}/{manifest.adapter}@{manifest.version}"
    refusal: RegistryError | None = None
    for found in verify_attestations(record.attest, name, record.digest, [item.key for item in wanted.keys]):
        if found.predicate_type != wanted.type:
            continue
        try:
            signers = [item for item in wanted.keys if item.key.keyid in found.keyids]
            signer = _first_that_counts(signers, now, listed)
            if wanted.builder not in (None, found.builder_id):
                raise PolicyRefusedError(
                    f"{name} was not built by {wanted.builder}, by the word of its attestation."
                )
        except (ExpiredError, RevokedError, PolicyRefusedError) as error:
            refusal = refusal or error
        else:
            return f"{wanted.type} by {signer}"
    raise refusal or PolicyRefusedError(
        f"{name} has no attestation of type {wanted.type} by a key the policy lists; attach one with "
        "`registry attest`."
    )


def _first_that_counts(
    signers: Sequence[TrustedKey], now: dt.datetime, listed: RevocationList | None
) -> TrustedKey:
    refusals: list[RegistryError] = []
    for signer in signers:
        try:
            signer.check(now)
            check_revoked(listed, None, signer.key.keyid, None)
        except (ExpiredError, RevokedError) as error:
            refusals.append(error)
        else:
            return signer
    raise refusals[0]


def check_base(manifest: Manifest, base_digest: str | None) -> str:
    """Refuse an adapter made for another base model; None accepts any."""
    base = manifest.base_model
    if base_digest is not None and base.digest != base_digest:
        raise BaseMismatchError(
            f"{manifest.tenant}/{manifest.adapter}@{manifest.version} was made for base {base.name} "
            f"{base.digest[:19]}…, this base is {base_digest[:19]}…; "
            "serve the base it was trained on or train it again."
        )
    return f"{base.name} {base.digest[:19]}…" + ("" if base_digest else "; no base was named to compare with")


def check_limits(manifest: Manifest, rule: Rule) -> str:
    """Refuse what goes beyond the rule's limits."""
    name, limits = f"{manifest.tenant}/{manifest.adapter}@{manifest.version}", rule.limits
    base = manifest.base_model
    if limits.max_rank is not None and manifest.lora.rank > limits.max_rank:
        raise RankTooLargeError(f"{name} has rank {manifest.lora.rank}, the policy allows {limits.max_rank}.")
    if limits.max_bytes is not None and manifest.size_bytes > limits.max_bytes:
        raise PolicyRefusedError(
            f"{name} has {manifest.size_bytes} bytes, the policy allows {limits.max_bytes}."
        )
    if limits.bases is not None and base.digest not in limits.bases:
        raise PolicyRefusedError(
            f"{name} is for base {base.digest[:19]}…, which the policy rule {rule.scope!r} does not list."
        )
    least = limits.min_version
    if least is not None and version_order(manifest.version) < version_order(least):
        raise PolicyRefusedError(
            f"{name} is older than version {least}, the oldest the policy rule {rule.scope!r} allows."
        )
    return f"rank {manifest.lora.rank}, {manifest.size_bytes} bytes, version {manifest.version}"
