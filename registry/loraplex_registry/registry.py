"""The registry: publish, resolve, verify, fetch. This is the whole public face of the package for programs.

```
published = registry.publish(directory, ref, signer, base, tag="prod")
resolved  = registry.resolve(AdapterRef.parse("acme/orders@prod"))      # metadata, not believed
verified  = registry.verify(resolved, policy, base_digest=base.digest)  # proof, or an error with a reason
staged    = registry.fetch(verified, cache, base=base, limits=limits)   # immutable directory for the engine
```

Methods block; call them from threads. One `Registry` may be used by many at once. Every error is a `RegistryError`
with a `.code`; `.retryable` says whether to try again.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .delivery.fetch import StagedAdapter, pull, stage, stage_into, stored_bytes
from .encryption.data_keys import RingSealer
from .encryption.key_providers import KeyRing
from .errors import AdapterNotFoundError, InvalidReferenceError, KeyAbsentError
from .format import layout
from .format.canonical import StrictJsonError
from .format.manifest import check_annotations
from .format.record import (
    RECORD_BYTES_MAX,
    CommittedRecord,
    DeletedRecord,
    Record,
    check_attestations,
    read_record,
)
from .format.tags import TagObject, read_tag
from .lifecycle.amend import attach_missing
from .lifecycle.content import Sealer, Signed, Statement
from .lifecycle.listing import (
    ListedVersion,
    in_parallel,
    list_adapters,
    list_tenants,
    list_versions,
    not_found,
    version_names,
)
from .lifecycle.publish import Content, Publication
from .lifecycle.resuming import Resumables
from .lifecycle.tag_state import tag_names
from .refs import AdapterRef, Version
from .signing import Signer
from .storage.root_marker import initialise, require_writable
from .storage.store import CountingStore, Item, Store
from .trust.marks import MemoryMarks
from .trust.revocations import RevocationObject, poll
from .trust.verdict import Trace, TrustPolicy, VerifiedManifest, verify
from .validation.base import BaseModel, Progress
from .validation.lora_config import AdapterConfig
from .validation.weights import Limits, validate_adapter

__all__ = [
    "Published",
    "Registry",
    "Resolved",
    "StagedAdapter",
    "VerifiedManifest",
]


@dataclass(frozen=True, slots=True)
class Published:
    """What `publish` did.

    Attributes:
        ref: tenant, adapter and digest: the reference that will never mean anything else.
        digest: `sha256:…` of the manifest.
        version: its number or semantic version.
        created: False when the same bytes were published before and nothing was written.
        size_bytes: bytes of all files of the version.
        requests: requests to the store, all together; the root's marker, read once per `Registry`, is not among them.
        keyid: id of the key that signed; empty when it was signed elsewhere.
        tag_generation: the tag's generation now, None without tag.
        tag: the tag asked for, if any.
        tag_moved: False when there was none, or it pointed here already.
        encrypted: whether the version is stored encrypted.
        attested: predicate types of the statements that this call attached.
    """

    ref: AdapterRef
    digest: str
    version: Version
    created: bool
    size_bytes: int
    requests: int
    keyid: str
    tag: str | None
    tag_moved: bool
    tag_generation: int | None
    encrypted: bool = False
    attested: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the store says a reference means. NOT verified: pass it to `Registry.verify` before believing any of it.

    `etag` is that of the object that said so, for asking again: see `Registry.resolve`.
    """

    ref: AdapterRef
    version: Version
    digest: str
    record: CommittedRecord
    tag: TagObject | None = None
    etag: str = ""


def utc_now() -> dt.datetime:
    """Return the time of day with its zone; the default clock."""
    return dt.datetime.now(dt.UTC)


class Registry:
    """Adapters in a store. Holds no state but store, clock and key addresses, so threads may share it.

    Args:
        store: where everything lies.
        clock: the time of day.
        keys: key-encryption keys. With any, new versions are encrypted by the first; without, encrypted versions
            cannot be read.
    """

    def __init__(
        self, store: Store, *, clock: Callable[[], dt.datetime] = utc_now, keys: KeyRing | None = None
    ) -> None:
        self._store = store
        self._clock = clock
        self._keys = keys or KeyRing()
        self._writable = False

    @property
    def store(self) -> Store:
        """The store, for the operations that are not methods here (`tagging`, `delete`, `gc`, `fsck`, …)."""
        return self._store

    @property
    def url(self) -> str:
        """The store's address."""
        return self._store.url

    def initialise(self) -> bool:
        """Make the root ready for writers; see `root_marker.initialise`. False when it was ready before."""
        return initialise(self._store, now=self._clock())

    def require_writable(self) -> None:
        """Refuse to write where conditional writes were not proven; asks the root's marker once per object.

        Raises:
            StoreRefusedError: see `root_marker.require_writable`.
        """
        if not self._writable:
            self._store.prepare()
            require_writable(self._store)
            self._writable = True

    def publish(
        self,
        directory: str | Path,
        ref: AdapterRef,
        signer: Signer | Sequence[Signer],
        base: BaseModel,
        *,
        limits: Limits | None = None,
        tag: str | None = None,
        version: Version | None = None,
        expect: int | str | None = None,
        expires: str = "",
        annotations: Mapping[str, str] | None = None,
        attest: Sequence[dict[str, Any]] = (),
        statements: Sequence[Statement] = (),
        signed: Signed | None = None,
        sealer: Sealer | None = None,
        resumables: Resumables | None = None,
        allow_tag: Callable[[AdapterRef, CommittedRecord], None] | None = None,
        progress: Progress | None = None,
    ) -> Published:
        """Check, sign and commit an adapter directory; then move a tag to it when asked.

        The same bytes under the same name are committed once: a second call returns the first version with
        `created=False`. After a crash or a lost reply, call again with the same arguments.

        Args:
            directory: the adapter, as PEFT saves it.
            ref: tenant and adapter; its version or tag, if any, count like the arguments. A digest is refused.
            signer: signs the version, and the tag; of several the first signs the version and all the tag.
            base: the base model it was trained on.
            limits: default `Limits()`.
            tag: moved to the version after the commit.
            version: wanted; default the next free number.
            expect: what the tag must be now, see `tagging.move_tag`; looked at before anything is written.
            expires: UTC time from which the tag's statement is not believed any more, "" for never.
            annotations: names and texts to sign with it; see `manifest.check_annotations`.
            attest: signed statements to attach.
            statements: more, signed in this call; on the version before the tag moves, also when it was there.
            signed: manifest and bundle made elsewhere; `signer` then signs the tag alone and may be empty.
            sealer: encrypts what is stored; default the registry's keys, if it has any.
            resumables: with it, an interrupted upload of a long file is gone on with by the next call.
            allow_tag: called with the version before the tag is moved to it; raises to leave the tag alone.
            progress: phases "check" and "upload".

        Raises:
            UnsupportedAdapterError, RankTooLargeError, BaseMismatchError: the directory; nothing was written.
            ConflictError: the version exists with other content or is being pushed, or the tag is not as expected
                or keeps moving.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        tag, version = tag or ref.tag, version or ref.version
        if ref.digest is not None:
            raise InvalidReferenceError(f"{ref}: a digest follows from the content; push to {ref.name}.")
        name = AdapterRef(ref.tenant, ref.adapter)
        AdapterRef(ref.tenant, ref.adapter, tag=tag)
        AdapterRef(ref.tenant, ref.adapter, version=version)
        signers = (signer,) if isinstance(signer, Signer) else tuple(signer)
        content = Content(
            Path(directory),
            validate_adapter(directory, base, limits, progress=progress),
            base,
            base.to_json(),
            annotations=checked_annotations(annotations or {}),
            attest=checked_attestations(attest),
            statements=tuple(statements),
            signed=signed,
        )
        self.require_writable()
        store = CountingStore(self._store)
        if sealer is None and self._keys:
            sealer = RingSealer(self._keys)
        publication = Publication(
            store, name, content, signers, self._clock(), sealer=sealer, resumables=resumables
        )
        if tag is not None:
            publication.look_at_tag(tag, expect)
        outcome = publication.run(version=version, progress=progress)
        attested = tuple(statement.predicate_type for statement in statements)
        if statements and not outcome.created:
            outcome, attested = attach_missing(store, name, outcome, statements)
        move = None
        if tag is not None:
            if allow_tag is not None:
                allow_tag(AdapterRef(ref.tenant, ref.adapter, version=outcome.version), outcome.record)
            move = publication.move_tag(tag, outcome, expect=expect, expires=expires)
        return Published(
            ref=AdapterRef(ref.tenant, ref.adapter, digest=outcome.record.digest),
            digest=outcome.record.digest,
            version=outcome.version,
            created=outcome.created,
            size_bytes=content.size_bytes,
            requests=store.requests,
            keyid=signers[0].keyid if signed is None else "",
            tag=tag,
            tag_moved=move is not None and move.moved,
            tag_generation=None if move is None else move.statement.generation,
            encrypted=outcome.record.encryption is not None,
            attested=attested,
        )

    def resolve(self, ref: AdapterRef, previous: Resolved | None = None) -> Resolved:
        """Look up what a reference means now. One request for a tag or a version.

        Without selector the newest committed version is meant; by digest, versions are searched from the newest.

        Args:
            ref: the reference.
            previous: what it meant before; returned itself when it still does. Then a tag, a version or a digest
                costs one conditional request without a body, and a name without selector a listing besides.

        Raises:
            AdapterNotFoundError: nothing committed answers to it.
            DamagedError: the object found is unreadable.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        if ref.tag is not None:
            return self._resolve_tag(ref, previous)
        selected = ref.version is not None or ref.digest is not None
        if previous is not None and selected and self._still(previous):
            return previous
        versions = [ref.version] if ref.version is not None else version_names(self._store, ref)
        # By digest every record may have to be read; else the first committed one ends the search.
        each = in_parallel if ref.digest is not None else map
        gone: Record | None = None

        def look(version: Version) -> tuple[Version, Record | None, str]:
            if (
                previous is not None
                and not selected
                and version == previous.version
                and self._still(previous)
            ):
                return version, previous.record, previous.etag
            return version, *self._record(ref, version)

        for version, record, etag in each(look, versions):
            if isinstance(record, CommittedRecord) and ref.digest in (None, record.digest):
                if previous is not None and record is previous.record:
                    return previous
                return Resolved(ref, version, record.digest, record, etag=etag)
            if ref.version is not None or _was(record, ref.digest):
                gone = record
        raise not_found(self._store.url, ref, gone)

    def verify(
        self,
        resolved: Resolved,
        policy: TrustPolicy,
        *,
        base_digest: str | None = None,
        now: dt.datetime | None = None,
        revocations: RevocationObject | None = None,
        marks: MemoryMarks | None = None,
        trace: Trace | None = None,
    ) -> VerifiedManifest:
        """Decide whether what was resolved may be used; asks the network for nothing. The checks: see `trust`.

        `verifier.Verifier` does this with the revocation list and the marks kept up to date.

        Args:
            resolved: from `resolve`.
            policy: the trust policy.
            base_digest: digest of the base that will serve it; None accepts any.
            now: time to judge dates by; default the registry's clock.
            revocations: the tenant's list, from `revocations`.
            marks: what was seen before; a newer tag or list is remembered.
            trace: is told of every check.

        Raises:
            PolicyRefusedError, SignatureInvalidError, ExpiredError, DigestMismatchError, RevokedError, RollbackError,
            RankTooLargeError, BaseMismatchError: why not.
        """
        return verify(
            resolved.ref,
            version=resolved.version,
            record=resolved.record,
            tag=resolved.tag,
            policy=policy,
            now=now or self._clock(),
            base_digest=base_digest,
            revocations=revocations,
            marks=marks,
            trace=trace,
        )

    def revocations(self, tenant: str, previous: RevocationObject | None = None) -> RevocationObject | None:
        """Return a tenant's revocation list, unverified, None without one; `previous` itself when nothing changed.

        Raises:
            DamagedError: the object is unreadable.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        return poll(self._store, tenant, previous)

    def fetch(
        self,
        verified: VerifiedManifest,
        directory: str | Path,
        *,
        base: BaseModel,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> StagedAdapter:
        """Bring a verified version into `<directory>/sha256-<hex>/`, which is immutable and appears all at once.

        Holds exactly adapter_config.json (written from the checked values) and adapter_model.safetensors. A copy
        already there is hashed again and reused, or removed and fetched anew. Safe for concurrent callers.

        Args:
            verified: from `verify`.
            directory: the cache's root, made 0700 when absent.
            base: the base that will serve it.
            limits: default `Limits()`.
            progress: phases "fetch" (bytes received) and "check".

        Raises:
            BaseMismatchError, RankTooLargeError, UnsupportedAdapterError: it does not fit here.
            DigestMismatchError, DamagedError: the store's bytes are not the signed ones.
            StoreUnavailableError, StoreRefusedError: the storage; nothing half-done is left.
        """
        return stage(
            self._store,
            verified,
            Path(directory),
            base=base,
            limits=limits or Limits(),
            keys=self._keys,
            progress=progress,
        )

    def fetch_into(
        self,
        verified: VerifiedManifest,
        target: int,
        *,
        base: BaseModel,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> AdapterConfig:
        """Fill an empty file, such as memory that is to be sealed, with a version's checked weights.

        Args:
            verified: from `verify`.
            target: descriptor, open for writing.
            base: the base that will serve it.
            limits: default `Limits()`.
            progress: phase "fetch".

        Returns:
            The checked settings; `to_json` gives the configuration that belongs to the weights.

        Raises:
            OSError: the target.
            Others: as `fetch`.
        """
        return stage_into(
            self._store,
            verified,
            target,
            base=base,
            limits=limits or Limits(),
            keys=self._keys,
            progress=progress,
        )

    def read_file(self, verified: VerifiedManifest, name: str) -> bytes:
        """Return the checked bytes of one small file of a version; without a request when the record holds it.

        Raises:
            DigestMismatchError, DamagedError: the store's bytes are not the signed ones.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        return stored_bytes(self._store, verified, name, keys=self._keys)

    def pull(
        self,
        verified: VerifiedManifest,
        directory: str | Path,
        *,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write all files of a version, its manifest and its signature bundle into a new directory, for people.

        The result can be pushed again, loaded with PEFT, and checked with any Model Signing verifier.

        Raises:
            ConflictError: the directory exists and is not empty.
            Others: as `fetch`.
        """
        pull(
            self._store,
            verified,
            Path(directory),
            limits=limits or Limits(),
            keys=self._keys,
            progress=progress,
        )

    def tenants(self) -> Iterator[str]:
        """Yield the tenants' names in order."""
        return list_tenants(self._store)

    def adapters(self, tenant: str) -> Iterator[str]:
        """Yield the names of a tenant's adapters in order."""
        return list_adapters(self._store, tenant)

    def tags(self, ref: AdapterRef) -> Iterator[str]:
        """Yield the names of an adapter's tags in order, removed ones too."""
        return tag_names(self._store, ref)

    def versions(self, ref: AdapterRef) -> Iterator[ListedVersion]:
        """Yield an adapter's versions, newest first; one request each after the listing. Nothing is verified."""
        return list_versions(self._store, ref, version_names(self._store, ref))

    def _resolve_tag(self, ref: AdapterRef, previous: Resolved | None) -> Resolved:
        assert ref.tag is not None
        key = layout.tag_key(ref, ref.tag)
        try:
            item = self._changed(key, previous)
        except KeyAbsentError as error:
            raise not_found(self._store.url, ref) from error
        if item is None:
            assert previous is not None
            return previous
        tag = read_tag(item.body, where=str(ref))
        if tag.record is None or tag.statement.version is None:
            raise AdapterNotFoundError(f"{ref} was removed; `registry log {ref}` shows when.", removed=tag)
        return Resolved(ref, tag.statement.version, tag.record.digest, tag.record, tag, item.etag)

    def _still(self, previous: Resolved) -> bool:
        """Say whether the record of a version is the one that was read before."""
        try:
            return self._changed(layout.version_key(previous.ref, previous.version), previous) is None
        except KeyAbsentError:
            return False

    def _changed(self, key: str, previous: Resolved | None) -> Item | None:
        """Return an object; None when it is the one that `previous` was read from."""
        if previous is None:
            return self._store.get(key, limit_bytes=RECORD_BYTES_MAX)
        return self._store.changed(key, etag=previous.etag, limit_bytes=RECORD_BYTES_MAX)

    def _record(self, ref: AdapterRef, version: Version) -> tuple[Record | None, str]:
        """Return a version's record with its etag; no record when there is none."""
        try:
            item = self._store.get(layout.version_key(ref, version), limit_bytes=RECORD_BYTES_MAX)
        except KeyAbsentError:
            return None, ""
        return read_record(item.body, version=version, where=f"{ref.name}@{version}"), item.etag


def _was(record: Record | None, digest: str | None) -> bool:
    """Say whether a version that is deleted had this digest."""
    return isinstance(record, DeletedRecord) and digest == f"sha256:{record.manifest_sha256}"


def checked_annotations(value: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return annotations in the manifest's form.

    Raises:
        InvalidReferenceError: a name or a text is out of shape, or there are too many.
    """
    try:
        return check_annotations(dict(value))
    except StrictJsonError as error:
        raise InvalidReferenceError(f"The annotations are refused: {error}.") from error


def checked_attestations(value: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return statements to attach, checked for number and size.

    Raises:
        InvalidReferenceError: too many or too long.
    """
    try:
        return check_attestations(list(value))
    except StrictJsonError as error:
        raise InvalidReferenceError(f"The attestations are refused: {error}.") from error
