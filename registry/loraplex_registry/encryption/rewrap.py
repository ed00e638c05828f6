"""Another key-encryption key for versions that are published, and the end of all of a tenant's keys.

Rewrapping replaces the wrapped data key in a record, by compare-and-swap, and then in the copies that tags carry. No
blob is touched, nothing is signed again, and the version's digest stays. What was written is unwrapped again with the
new key before it is committed, so that no version is ever left without a key that opens it.

Shredding destroys a tenant's key-encryption keys, and proves on every version that none opens any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, cast

from ..errors import (
    AdapterNotFoundError,
    ConflictError,
    DamagedError,
    KeyConflictError,
    PolicyRefusedError,
    RegistryError,
    SignatureInvalidError,
    StoreUnavailableError,
    TrustError,
)
from ..format import layout
from ..format.record import CommittedRecord, DeletingRecord, Encryption
from ..lifecycle.tagging import Target, refresh_copies
from ..lifecycle.versions import get_record, recorded_versions
from ..refs import AdapterRef, version_order
from ..storage.store import Store, write_conditionally
from .data_keys import ALGORITHM, open_data_key, unwrapped_keyset
from .key_providers import DestroyableKey, KeyContext, KeyProvider, KeyRing

TRIES_MAX: Final = 5
"""How often one version is tried when rivals replace its record."""


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What happened to one version.

    Attributes:
        ref: with its version.
        outcome: `rewrapped`; `already` under the new key; `clear`: not encrypted; `deleting`: to be done again should
            the deletion be undone; `failed`: see `reason`.
        kek: the key that wraps it now, None when it is not encrypted.
        tags: tags whose copies were renewed.
        reason: why it failed, empty otherwise.
    """

    ref: AdapterRef
    outcome: str
    kek: str | None = None
    tags: tuple[str, ...] = ()
    reason: str = ""


def rewrap_version(store: Store, ref: AdapterRef, ring: KeyRing, to: KeyProvider) -> Rewrapped | None:
    """Wrap the data key of one version with another key; None when the version is neither published nor deleting.

    Requests: GET and swap of the record, a listing of tags and a read of each, a swap of each that points here.

    Args:
        store: where.
        ref: with a version.
        ring: keys that open what is there.
        to: the key that is to wrap it.

    Raises:
        ConflictError: rivals kept replacing the record.
        DamagedError: the record cannot be read, or the new key does not open what it wrapped.
        DigestMismatchError, PolicyRefusedError, SettingsError: no key of the ring opens it.
        StoreUnavailableError, StoreRefusedError: the storage or the key service.
    """
    assert ref.version is not None
    for _ in range(TRIES_MAX):
        found = get_record(store, ref, ref.version)
        record, etag = found or (None, "")
        if isinstance(record, DeletingRecord):
            return Rewrapped(ref, "deleting")
        if not isinstance(record, CommittedRecord):
            return None
        if record.encryption is None:
            return Rewrapped(ref, "clear")
        if record.encryption.kek == to.uri:
            return Rewrapped(ref, "already", to.uri, _renew_tags(store, ref, record, etag))
        context = KeyContext.of(ref, ref.version, record.pid)
        new = record.revised(encryption=_rewrapped(ring, to, record.encryption, context))
        try:
            etag = write_conditionally(store, layout.version_key(ref, ref.version), new.to_bytes(), etag=etag)
        except KeyConflictError:
            continue
        return Rewrapped(ref, "rewrapped", to.uri, _renew_tags(store, ref, new, etag))
    raise ConflictError(f"The record of {ref} keeps being replaced by others; try again.")


def rewrap_all(
    store: Store, refs: Iterator[AdapterRef], ring: KeyRing, to: KeyProvider
) -> Iterator[Rewrapped]:
    """Rewrap versions one after the other; one that is damaged is reported as `failed`, and the next is gone on with.

    Raises:
        StoreUnavailableError, StoreRefusedError, SettingsError: as `rewrap_version`.
    """
    for ref in refs:
        try:
            done = rewrap_version(store, ref, ring, to)
        except (TrustError, ConflictError) as error:
            done = Rewrapped(ref, "failed", reason=error.message)
        if done is not None:
            yield done


def versions_in(store: Store, scope: str) -> Iterator[AdapterRef]:
    """Yield every version that has a record, adapter by adapter, in order.

    Args:
        store: where.
        scope: `TENANT`, `TENANT/ADAPTER` or `TENANT/ADAPTER@VERSION`.

    Raises:
        InvalidReferenceError: the scope is none of these.
        AdapterNotFoundError: an adapter or version was named and is not there.
    """
    if "/" not in scope:
        for name in store.children(layout.adapters_prefix(scope)):
            if name.endswith("/"):
                yield from _versions(store, AdapterRef(scope, name.removesuffix("/")))
        return
    ref = AdapterRef.parse(scope)
    if ref.version is not None:
        refs = [ref] if get_record(store, ref, ref.version) is not None else []
    elif ref.tag is None and ref.digest is None:
        refs = list(_versions(store, ref))
    else:
        refs = []
    if not refs:
        raise AdapterNotFoundError(
            f"{scope} is no adapter or version in {store.url}; tags are renewed with versions."
        )
    yield from refs


@dataclass(frozen=True, slots=True)
class ShredPlan:
    """What shredding a tenant would destroy and reach.

    Attributes:
        tenant: whose keys.
        keys: what would be done to each key, in words.
        encrypted: versions wrapped by one of these keys, which nobody could read any more.
        beyond: versions wrapped by other keys, which whoever holds those could still read.
        clear: versions that are not encrypted: shredding does nothing to them, delete them.
        damaged: versions whose record cannot be read.
    """

    tenant: str
    keys: tuple[str, ...]
    encrypted: tuple[str, ...]
    beyond: tuple[str, ...]
    clear: tuple[str, ...]
    damaged: tuple[str, ...]


def plan_shred(store: Store, tenant: str, ring: KeyRing) -> ShredPlan:
    """Look at every version of a tenant and at every key configured for it; change nothing.

    Raises:
        SettingsError: no key is configured, or one cannot be read.
        PolicyRefusedError: a key may serve others too, or is of a kind that only its holder can destroy.
        StoreUnavailableError, StoreRefusedError: the storage or the key service.
    """
    providers = _destroyable(tenant, ring)
    keks = {provider.uri for provider in providers}
    found: dict[str, list[str]] = {"encrypted": [], "beyond": [], "clear": [], "damaged": []}
    for ref, encryption, _ in _encryptions(store, tenant, found["damaged"]):
        kind = "clear" if encryption is None else "encrypted" if encryption.kek in keks else "beyond"
        found[kind].append(str(ref))
    words = tuple(provider.check_destroyable(tenant) for provider in providers)
    return ShredPlan(tenant, words, **{kind: tuple(refs) for kind, refs in found.items()})


@dataclass(frozen=True, slots=True)
class Shredded:
    """What was destroyed, and the proof: of `tried` encrypted versions, which `opened` all the same (none is right)."""

    keys: tuple[str, ...]
    tried: int
    opened: tuple[str, ...]


def shred(store: Store, tenant: str, ring: KeyRing, *, pending_days: int) -> Shredded:
    """Destroy every key configured for a tenant, then try to open every version of it.

    Args:
        store: where.
        tenant: whose keys.
        ring: the configured keys.
        pending_days: days AWS KMS keeps a key it refuses to use, 7 to 30.

    Raises:
        As `plan_shred`; ConflictError when a key file could not be removed.
    """
    done = tuple(
        provider.destroy(tenant, pending_days=pending_days) for provider in _destroyable(tenant, ring)
    )
    opened, tried = [], 0
    for ref, encryption, context in _encryptions(store, tenant, []):
        if encryption is None:
            continue
        tried += 1
        if _opens(ring, encryption, context):
            opened.append(str(ref))
    return Shredded(done, tried, tuple(opened))


def _versions(store: Store, ref: AdapterRef) -> Iterator[AdapterRef]:
    for version in sorted(recorded_versions(store, ref), key=version_order):
        yield AdapterRef(ref.tenant, ref.adapter, version=version)


def _rewrapped(ring: KeyRing, to: KeyProvider, old: Encryption, context: KeyContext) -> Encryption:
    open_data_key(ring, old, context)  # refuses what is not a data key
    keyset = unwrapped_keyset(ring, old, context)
    wrapped = to.wrap(keyset, context)
    if to.unwrap(wrapped, context) != keyset:
        raise DamagedError(f"{to.uri} does not give back what it wrapped; {context} keeps its key {old.kek}.")
    return Encryption(ALGORITHM, to.uri, wrapped)


def _renew_tags(store: Store, ref: AdapterRef, record: CommittedRecord, etag: str) -> tuple[str, ...]:
    assert ref.version is not None
    return tuple(refresh_copies(store, ref, Target(ref.version, record, etag)))


def _destroyable(tenant: str, ring: KeyRing) -> list[DestroyableKey]:
    providers = list(ring.all(tenant))
    for provider in providers:
        if not hasattr(provider, "destroy"):
            raise PolicyRefusedError(f"{provider.uri} can only be destroyed by its holder; delete it there.")
    if not providers:
        ring.wrapping(tenant)  # raises: no key is configured
    return [cast(DestroyableKey, provider) for provider in providers]


def _encryptions(
    store: Store, tenant: str, damaged: list[str]
) -> Iterator[tuple[AdapterRef, Encryption | None, KeyContext]]:
    """Yield what each version of a tenant says about its encryption, those being deleted too."""
    for ref in versions_in(store, tenant):
        assert ref.version is not None
        try:
            found = get_record(store, ref, ref.version)
        except (DamagedError, SignatureInvalidError):
            damaged.append(str(ref))
            continue
        record = None if found is None else found[0]
        if isinstance(record, DeletingRecord):
            record = record.record
        if isinstance(record, CommittedRecord):
            yield ref, record.encryption, KeyContext.of(ref, ref.version, record.pid)


def _opens(ring: KeyRing, encryption: Encryption, context: KeyContext) -> bool:
    """Say whether a data key still opens. A key service that cannot be reached proves nothing, so that is raised."""
    try:
        open_data_key(ring, encryption, context)
    except StoreUnavailableError:
        raise
    except RegistryError:
        return False
    return True
