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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import layout
from .base import BaseModel, Progress
from .canonical import canonical
from .errors import AdapterNotFoundError, InvalidReferenceError, KeyAbsentError, KeyConflictError
from .fetch import StagedAdapter, pull, stage
from .publish import Content, CountingStore, Publication, list_versions
from .record import FORMAT, RECORD_BYTES_MAX, AbortedRecord, CommittedRecord, PendingRecord, read_record
from .refs import AdapterRef
from .signing import Signer
from .store import Store
from .tags import TagObject, read_tag
from .trust import TrustPolicy, VerifiedManifest, verify
from .weights import Limits, validate_adapter

__all__ = [
    "Published",
    "Registry",
    "Resolved",
    "StagedAdapter",
    "VerifiedManifest",
    "VersionState",
]


@dataclass(frozen=True, slots=True)
class Published:
    """What `publish` did.

    Attributes:
        ref: tenant, adapter and digest: the reference that will never mean anything else.
        digest: `sha256:…` of the manifest.
        version: the version number.
        created: False when the same bytes were published before and nothing was written.
        size_bytes: bytes of all files of the version.
        requests: requests to the store, all together.
        keyid: id of the key that signed.
        tag: the tag asked for, if any.
        tag_moved: False when there was none, or it pointed here already.
    """

    ref: AdapterRef
    digest: str
    version: int
    created: bool
    size_bytes: int
    requests: int
    keyid: str
    tag: str | None
    tag_moved: bool


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the store says a reference means. NOT verified: pass it to `Registry.verify` before believing any of it."""

    ref: AdapterRef
    version: int
    digest: str
    record: CommittedRecord
    tag: TagObject | None = None


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version as listed, unverified: state is `committed`, `pending` or `aborted`; digest only when committed."""

    version: int
    state: str
    digest: str | None
    created: str | None
    size_bytes: int | None


def utc_now() -> dt.datetime:
    """Return the time of day with its zone; the default clock."""
    return dt.datetime.now(dt.UTC)


class Registry:
    """Adapters in a store. Holds no state but the store and the clock, so it is safe to share between threads."""

    def __init__(self, store: Store, *, clock: Callable[[], dt.datetime] = utc_now) -> None:
        self._store = store
        self._clock = clock

    @property
    def url(self) -> str:
        """The store's address."""
        return self._store.url

    def initialise(self) -> bool:
        """Write the root's format marker; return False when it is there already."""
        self._store.prepare()
        try:
            self._store.create(layout.FORMAT_KEY, canonical({"fmt": FORMAT}))
        except KeyConflictError:
            return False
        return True

    def publish(
        self,
        directory: str | Path,
        ref: AdapterRef,
        signer: Signer,
        base: BaseModel,
        *,
        limits: Limits | None = None,
        tag: str | None = None,
        version: int | None = None,
        progress: Progress | None = None,
    ) -> Published:
        """Check, sign and commit an adapter directory; then move a tag to it when asked.

        The same bytes under the same name are committed once: a second call returns the first version with
        `created=False`. After a crash or a lost reply, call again with the same arguments.

        Args:
            directory: the adapter, as PEFT saves it.
            ref: tenant and adapter; its version or tag, if any, count like the arguments. A digest is refused.
            signer: signs the version, and the tag.
            base: the base model it was trained on.
            limits: default `Limits()`.
            tag: moved to the version after the commit.
            version: number wanted; default the next free one.
            progress: phases "check" and "upload".

        Raises:
            UnsupportedAdapterError, RankTooLargeError, BaseMismatchError: the directory; nothing was written.
            ConflictError: the version exists with other content or is being pushed, or the tag keeps moving.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        tag, version = tag or ref.tag, version or ref.version
        if ref.digest is not None:
            raise InvalidReferenceError(f"{ref}: a digest follows from the content; push to {ref.name}.")
        name = AdapterRef(ref.tenant, ref.adapter)
        AdapterRef(ref.tenant, ref.adapter, tag=tag)
        AdapterRef(ref.tenant, ref.adapter, version=version)
        facts = validate_adapter(directory, base, limits, progress=progress)
        store = CountingStore(self._store)
        publication = Publication(
            store, name, Content(Path(directory), facts, base, base.to_json()), signer, self._clock()
        )
        outcome = publication.run(version=version, progress=progress)
        moved = publication.move_tag(tag, outcome) if tag is not None else False
        return Published(
            ref=AdapterRef(ref.tenant, ref.adapter, digest=outcome.record.digest),
            digest=outcome.record.digest,
            version=outcome.version,
            created=outcome.created,
            size_bytes=sum(file.size for file in outcome.record.files),
            requests=store.requests,
            keyid=signer.keyid,
            tag=tag,
            tag_moved=moved,
        )

    def resolve(self, ref: AdapterRef) -> Resolved:
        """Look up what a reference means now. One request for a tag or a version.

        Without selector the newest committed version is meant; by digest, versions are searched from the newest.

        Raises:
            AdapterNotFoundError: nothing committed answers to it.
            DamagedError: the object found is unreadable.
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        if ref.tag is not None:
            return self._resolve_tag(ref)
        versions = (
            [ref.version]
            if ref.version is not None
            else sorted(list_versions(self._store, ref), reverse=True)
        )
        for version in versions:
            record = self._record(ref, version)
            if isinstance(record, CommittedRecord) and ref.digest in (None, record.digest):
                return Resolved(ref, version, record.digest, record)
        raise AdapterNotFoundError(
            f"{ref} is not in {self._store.url}; `registry ls {ref.name}` shows what is."
        )

    def verify(
        self,
        resolved: Resolved,
        policy: TrustPolicy,
        *,
        base_digest: str | None = None,
        now: dt.datetime | None = None,
    ) -> VerifiedManifest:
        """Decide whether what was resolved may be used; touches neither network nor disk. Rules: see `trust`.

        Args:
            resolved: from `resolve`.
            policy: the trust policy.
            base_digest: digest of the base that will serve it; None accepts any.
            now: time to judge key dates by; default the registry's clock.

        Raises:
            PolicyRefusedError, SignatureInvalidError, ExpiredError, DigestMismatchError, RankTooLargeError,
            BaseMismatchError: why not.
        """
        return verify(
            resolved.ref,
            version=resolved.version,
            record=resolved.record,
            tag=resolved.tag,
            policy=policy,
            now=now or self._clock(),
            base_digest=base_digest,
        )

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
            self._store, verified, Path(directory), base=base, limits=limits or Limits(), progress=progress
        )

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
        pull(self._store, verified, Path(directory), limits=limits or Limits(), progress=progress)

    def tenants(self) -> Iterator[str]:
        """Yield the tenants' names in order."""
        return self._directories(layout.TENANTS_PREFIX)

    def adapters(self, tenant: str) -> Iterator[str]:
        """Yield the names of a tenant's adapters in order."""
        return self._directories(layout.adapters_prefix(tenant))

    def tags(self, ref: AdapterRef) -> Iterator[str]:
        """Yield the names of an adapter's tags in order."""
        for name in self._store.children(layout.tags_prefix(ref)):
            if name.endswith(".json"):
                yield name.removesuffix(".json")

    def versions(self, ref: AdapterRef) -> Iterator[VersionState]:
        """Yield an adapter's versions, newest first; one request each after the listing. Nothing is verified."""
        for version in sorted(list_versions(self._store, ref), reverse=True):
            record = self._record(ref, version)
            if isinstance(record, CommittedRecord):
                manifest = record.manifest_unverified()
                yield VersionState(version, "committed", record.digest, manifest.created, manifest.size_bytes)
            elif isinstance(record, PendingRecord | AbortedRecord):
                state = "pending" if isinstance(record, PendingRecord) else "aborted"
                yield VersionState(version, state, None, None, None)

    def _directories(self, prefix: str) -> Iterator[str]:
        for name in self._store.children(prefix):
            if name.endswith("/"):
                yield name.removesuffix("/")

    def _resolve_tag(self, ref: AdapterRef) -> Resolved:
        assert ref.tag is not None
        try:
            item = self._store.get(layout.tag_key(ref, ref.tag), limit_bytes=RECORD_BYTES_MAX)
        except KeyAbsentError as error:
            raise AdapterNotFoundError(
                f"{ref} is not in {self._store.url}; `registry ls {ref.name}` shows what is."
            ) from error
        tag = read_tag(item.body, where=str(ref))
        return Resolved(ref, tag.statement.version, tag.record.digest, tag.record, tag)

    def _record(
        self, ref: AdapterRef, version: int
    ) -> CommittedRecord | PendingRecord | AbortedRecord | None:
        try:
            item = self._store.get(layout.version_key(ref, version), limit_bytes=RECORD_BYTES_MAX)
        except KeyAbsentError:
            return None
        return read_record(item.body, version=version, where=f"{ref.name}@{version}")
