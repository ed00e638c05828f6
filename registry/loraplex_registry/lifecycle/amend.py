"""Amending a committed version: another signature over it, another statement about it, never another content.

```
read the record -> change bundle or attestations -> compare-and-swap -> renew the copies in the tags that point to it
```

Manifest, files and encryption stay byte for byte, so the digest stays, and with it every cached copy. A crash between
the swap and the tags leaves tags with an older copy of the record, which is as valid as it was before; the same command
again renews them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ..errors import (
    AdapterNotFoundError,
    ConflictError,
    DigestMismatchError,
    KeyConflictError,
    SettingsError,
    SignatureInvalidError,
)
from ..format import layout
from ..format.canonical import StrictJsonError
from ..format.manifest import Manifest
from ..format.record import CommittedRecord, DeletingRecord, check_attestations
from ..refs import AdapterRef, Version
from ..signing import Signer
from ..signing.attestations import make_attestation, subject_name, verify_attestations
from ..signing.bundles import KeyIdentity, bundle_identity, sign_files
from ..storage.store import Store, write_conditionally
from ..trust.verdict import VerifiedManifest
from ..validation.weights import MANIFEST_NAME
from .content import Statement
from .publish import COMMITTED_BYTES_MAX
from .tagging import Target, refresh_copies
from .versions import Outcome, get_record

SWAPS_MAX: Final = 5
"""How often an amendment is tried again when others amend the same version."""

Change = Callable[[CommittedRecord], CommittedRecord]
"""Returns the record as it is to be; the record given itself when there is nothing to change."""


@dataclass(frozen=True, slots=True)
class Amended:
    """What was done: the record as it is now, its etag, whether it changed, and the tags whose copy was renewed."""

    version: Version
    record: CommittedRecord
    etag: str
    changed: bool
    tags: tuple[str, ...]


def amend(store: Store, ref: AdapterRef, version: Version, change: Change) -> Amended:
    """Change the signature or the statements of a committed version.

    Requests: GET and PUT of the record, one listing of the tags, a GET of each and a PUT of those that point here, and
    a GET of the record again.

    Args:
        store: where.
        ref: tenant and adapter.
        version: the version.
        change: called with the record; called again when somebody else changed it meanwhile.

    Raises:
        AdapterNotFoundError: the version is not committed.
        ConflictError: it is being deleted, or others keep changing it.
        SettingsError: the record would become too long.
        StoreUnavailableError, StoreRefusedError: the storage.
    """
    name = AdapterRef(ref.tenant, ref.adapter)
    for _ in range(SWAPS_MAX):
        before, etag = _committed(store, name, version)
        after = change(before)
        if after is not before:
            try:
                etag = _swap(store, name, version, before, after, etag)
            except KeyConflictError:
                continue
        newest, tags = _renew_copies(store, name, Target(version, after, etag))
        return Amended(version, newest.record, newest.etag, after is not before, tags)
    raise ConflictError(f"{name}@{version} keeps being changed by others; run the command again.")


def attach(
    store: Store,
    verified: VerifiedManifest,
    predicate_type: str,
    predicate: Mapping[str, Any],
    signer: Signer,
) -> Amended:
    """Attach a signed statement to a version; the same statement by the same key is attached once.

    Args:
        store: where.
        verified: the version; what is not trusted is not attested.
        predicate_type: an https URI.
        predicate: a JSON object.
        signer: the key.

    Raises:
        As `amend` and `attestations.make_attestation`; ConflictError when it was replaced meanwhile.
    """
    ref = verified.ref
    if not verified.keyid or ref.version is None:  # audit mode let a bad signature pass
        raise SignatureInvalidError(f"{ref} has no signature that counts; publish it again first.")
    version, statement = ref.version, Statement(predicate_type, dict(predicate), signer)

    def change(record: CommittedRecord) -> CommittedRecord:
        _require_same(record, verified.record, ref)
        return _stated(record, ref, version, statement)

    return amend(store, ref, version, change)


def attach_missing(
    store: Store, ref: AdapterRef, outcome: Outcome, statements: Sequence[Statement]
) -> tuple[Outcome, tuple[str, ...]]:
    """Attach statements to a version that a push found committed; return it as it is now, and the types attached.

    The push compared the version with what its user holds, so it is not verified by a policy once more.

    Raises:
        As `attach`.
    """
    attached: list[str] = []

    def change(record: CommittedRecord) -> CommittedRecord:
        _require_same(record, outcome.record, ref)
        attached.clear()
        for statement in statements:
            before, record = record, _stated(record, ref, outcome.version, statement)
            if record is not before:
                attached.append(statement.predicate_type)
        return record

    done = amend(store, ref, outcome.version, change)
    return replace(outcome, record=done.record, etag=done.etag), tuple(attached)


def resign(store: Store, verified: VerifiedManifest, signer: Signer) -> Amended:
    """Put another key's signature in the place of the one a version has.

    Nothing is downloaded: the manifest lists every file's digest.

    Args:
        store: where.
        verified: the version; what is not trusted is not signed.
        signer: the new key.

    Raises:
        As `amend`; ConflictError when the version was replaced meanwhile.
    """
    ref, manifest = verified.ref, verified.manifest
    if not verified.keyid or ref.version is None:  # audit mode let a bad signature pass
        raise SignatureInvalidError(f"{ref} has no signature that counts; publish it again instead.")
    bundle = sign_files(files_to_sign(manifest), signer, subject=subject_name(ref, ref.version))

    def change(record: CommittedRecord) -> CommittedRecord:
        _require_same(record, verified.record, ref)
        return record if _is_signed_by(record, signer) else record.revised(bundle=bundle)

    return amend(store, ref, ref.version, change)


def files_to_sign(manifest: Manifest) -> dict[str, str]:
    """Return what a version's bundle covers: every file of the manifest and the manifest itself."""
    listed = {file.name: file.sha256 for file in manifest.files}
    return {**listed, MANIFEST_NAME: manifest.digest.removeprefix("sha256:")}


def _committed(store: Store, ref: AdapterRef, version: Version) -> tuple[CommittedRecord, str]:
    found = get_record(store, ref, version)
    if found is not None and isinstance(found[0], CommittedRecord):
        return found[0], found[1]
    if found is not None and isinstance(found[0], DeletingRecord):
        raise ConflictError(f"{ref}@{version} is being deleted; push it again under another version.")
    raise AdapterNotFoundError(
        f"{ref}@{version} is not in {store.url}; `registry ls {ref.name}` shows what is."
    )


def _swap(
    store: Store,
    ref: AdapterRef,
    version: Version,
    before: CommittedRecord,
    after: CommittedRecord,
    etag: str,
) -> str:
    if replace(after, bundle=before.bundle, attest=before.attest) != before:
        raise ValueError("an amendment changes the bundle and the attestations alone")
    body = after.to_bytes()
    if len(body) > COMMITTED_BYTES_MAX:
        raise SettingsError(
            f"The record of {ref}@{version} would be longer than {COMMITTED_BYTES_MAX} bytes; attach less."
        )
    return write_conditionally(store, layout.version_key(ref, version), body, etag=etag)


def _renew_copies(store: Store, ref: AdapterRef, target: Target) -> tuple[Target, tuple[str, ...]]:
    """Renew the tags' copies until they are of the newest record; return it and the tags renewed.

    A rival that amended the record later may have renewed the tags earlier than we do, and our older copy would stay.
    So whoever renews looks at the record afterwards, and renews again when it is a newer one.
    """
    tags: dict[str, None] = {}
    for _ in range(SWAPS_MAX):
        tags |= dict.fromkeys(refresh_copies(store, ref, target))
        found = get_record(store, ref, target.version)
        if found is None or not isinstance(found[0], CommittedRecord) or found[1] == target.etag:
            break
        target = Target(target.version, found[0], found[1])
    return target, tuple(sorted(tags))


def _stated(
    record: CommittedRecord, ref: AdapterRef, version: Version, statement: Statement
) -> CommittedRecord:
    """Return the record with a statement; the record given itself when it has it by the same key."""
    kind, predicate, signer = statement.predicate_type, statement.predicate, statement.signer
    for found in _statements_of(record, ref, version, signer):
        if (found.predicate_type, found.predicate) == (kind, predicate):
            return record
    envelope = make_attestation(ref, version, record.digest, kind, predicate, signer)
    try:
        return record.revised(attest=check_attestations([*record.attest, envelope]))
    except StrictJsonError as error:
        raise SettingsError(f"{ref} cannot take another attestation ({error}).") from error


def _require_same(record: CommittedRecord, known: CommittedRecord, ref: AdapterRef) -> None:
    if record.manifest_bytes != known.manifest_bytes:
        raise DigestMismatchError(f"{ref} was replaced after it was verified; look at it again.")


def _statements_of(record: CommittedRecord, ref: AdapterRef, version: Version, signer: Signer) -> list[Any]:
    try:
        subject = subject_name(ref, version)
        return list(verify_attestations(record.attest, subject, record.digest, [signer.public_key]))
    except SignatureInvalidError:
        return []  # what cannot be read is not this statement


def _is_signed_by(record: CommittedRecord, signer: Signer) -> bool:
    try:
        identity = bundle_identity(record.bundle)
    except SignatureInvalidError:
        return False
    return isinstance(identity, KeyIdentity) and identity.keyid == signer.keyid
