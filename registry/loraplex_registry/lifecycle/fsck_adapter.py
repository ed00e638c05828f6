"""Checking one adapter: its records and blobs, while others may be changing them. Its tags: see `fsck_tags`.

A record is read before the listing of its blobs, because that is the reverse of the order in which they are written: a
registry in use never looks damaged.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import (
    DamagedError,
    InvalidReferenceError,
    KeyAbsentError,
    PolicyRefusedError,
    RankTooLargeError,
    TrustError,
)
from ..format import layout
from ..format.hashing import FileHasher
from ..format.manifest import FileEntry
from ..format.record import CommittedRecord, DeletingRecord, Encryption, PendingRecord, Record, StoredFile
from ..refs import AdapterRef, Version
from ..signing import BUNDLE_TYPE
from ..storage.store import Piece, Store, blob_reader, resumed
from .findings import NOT_TRUSTED, Finding, Report, Severity, refused
from .fsck_tags import TagJudge, check_tags, content_of
from .tag_state import tag_names
from .versions import get_record, recorded_versions

if TYPE_CHECKING:
    from ..encryption.data_keys import DataKey
    from ..encryption.key_providers import KeyRing
    from ..trust.revocations import RevocationObject

Opener = Callable[[AdapterRef, str, Encryption], "DataKey"]
"""Called with reference, push id and encryption; returns the data key."""

Judge = Callable[[AdapterRef, CommittedRecord], None]
"""Raises a TrustError when a version's signature is not one the policy accepts."""

ListJudge = Callable[[str, "RevocationObject"], None]
"""Raises a TrustError when a tenant's revocation list is not one the policy believes."""


def opener_of(ring: KeyRing) -> Opener:
    """Return what decrypts with the keys of a ring."""
    from ..encryption.data_keys import open_data_key
    from ..encryption.key_providers import KeyContext

    def opened(ref: AdapterRef, pid: str, encryption: Encryption) -> DataKey:
        assert ref.version is not None
        return open_data_key(ring, encryption, KeyContext.of(ref, ref.version, pid))

    return opened


@dataclass(frozen=True)
class Depth:
    """How far a check goes.

    Attributes:
        now: the time, with a zone.
        deep: read and hash every blob.
        judge, judge_tag, judge_list: decide about signatures, when given.
        told: the highest generation of each tag (`acme/orders@prod`) that the audit log tells of.
        opener: decrypts; without it encrypted blobs are checked for their size alone.
    """

    now: dt.datetime
    deep: bool = False
    judge: Judge | None = None
    opener: Opener | None = None
    judge_tag: TagJudge | None = None
    judge_list: ListJudge | None = None
    told: Mapping[str, int] = field(default_factory=dict)


@dataclass
class _Adapter:
    """What is known of an adapter while it is checked."""

    store: Store
    ref: AdapterRef
    depth: Depth
    report: Report
    states: dict[Version, Record] = field(default_factory=dict)

    def find(self, severity: Severity, code: str, key: str, reason: str, advice: str = "") -> None:
        """Report something about a key below the root."""
        self.report.add(Finding(severity, code, key, reason, advice))


def check_adapter(store: Store, ref: AdapterRef, depth: Depth, report: Report) -> None:
    """Check everything of one adapter and add what is found to `report`."""
    adapter = _Adapter(store, AdapterRef(ref.tenant, ref.adapter), depth, report)
    report.count("adapters")
    tags = list(tag_names(store, ref))
    for version in recorded_versions(store, ref):
        _read_version(adapter, version)
    _check_blobs(adapter)
    check_tags(store, ref, tags, report, judge=depth.judge_tag, told=depth.told)


# --- versions


def _read_version(adapter: _Adapter, version: Version) -> None:
    key = layout.version_key(adapter.ref, version)
    adapter.report.count("versions")
    try:
        found = get_record(adapter.store, adapter.ref, version)
    except DamagedError as error:
        adapter.find("damage", "record-unreadable", key, error.message, "fsck --repair --from REGISTRY")
        return
    if found is None:
        return
    record = found[0]
    adapter.states[version] = record
    if isinstance(record, PendingRecord) and record.lease_over(adapter.depth.now.timestamp()):
        adapter.find("note", "push-abandoned", key, "A push died here; the next one takes the version over.")
    if isinstance(record, DeletingRecord):
        adapter.find(
            "warning",
            "delete-unfinished",
            key,
            "The version is being deleted, or its deletion died.",
            f"registry rm {adapter.ref.name}@{version}, or fsck --repair",
        )
    committed = content_of(record)
    if committed is not None:
        _check_manifest(adapter, version, committed, key)


def _check_manifest(adapter: _Adapter, version: Version, record: CommittedRecord, key: str) -> None:
    """Check that the manifest is about this version and these files, and that the policy accepts it."""
    try:
        manifest = record.manifest_unverified()
        place = (manifest.tenant, manifest.adapter, manifest.version)
        if place != (adapter.ref.tenant, adapter.ref.adapter, version):
            raise DamagedError(f"The manifest is of {place[0]}/{place[1]}@{place[2]}.")
        if [_facts(file) for file in record.files] != [_facts(file) for file in manifest.files]:
            raise DamagedError("The record stores other files than the manifest lists.")
        if record.bundle.get("mediaType") != BUNDLE_TYPE:
            raise DamagedError("The signature bundle is of an unknown kind.")
    except TrustError as error:
        adapter.find("damage", "manifest-inconsistent", key, error.message, "publish the adapter again")
        return
    if adapter.depth.judge is None:
        return
    try:
        adapter.depth.judge(AdapterRef(adapter.ref.tenant, adapter.ref.adapter, version=version), record)
    except (TrustError, RankTooLargeError) as error:
        adapter.report.add(refused(NOT_TRUSTED, key, error))


def _facts(file: StoredFile | FileEntry) -> tuple[str, int, str]:
    return file.name, file.size, file.sha256


# --- blobs


def _check_blobs(adapter: _Adapter) -> None:
    """Compare what the records refer to with what is there; read it all when deep."""
    found = {blob.key: blob.size for blob in adapter.store.blobs(layout.blobs_prefix(adapter.ref))}
    adapter.report.count("blobs", len(found))
    adapter.report.count("blob_bytes", sum(found.values()))
    wanted: set[str] = set()
    for version, state in adapter.states.items():
        record = content_of(state)
        if record is None:
            continue
        for file in record.files:
            if file.blob is None:
                _check_inline(adapter, version, record, file)
                continue
            wanted.add(file.blob.removeprefix("b/"))
            _check_blob(adapter, version, record, file, found.get(file.blob.removeprefix("b/")))
    kept = {layout.blob_group(v, r.pid) for v, r in adapter.states.items() if isinstance(r, PendingRecord)}
    orphans = {
        key: size for key, size in found.items() if key not in wanted and key.partition("/")[0] not in kept
    }
    adapter.report.count("orphan_blobs", len(orphans))
    adapter.report.count("orphan_bytes", sum(orphans.values()))


def stored_size(record: CommittedRecord, file: StoredFile) -> int:
    """Return the bytes a file takes in the store."""
    if record.encryption is None:
        return file.size
    from ..encryption.segments import ciphertext_size

    return ciphertext_size(file.size)


def _check_blob(
    adapter: _Adapter, version: Version, record: CommittedRecord, file: StoredFile, size: int | None
) -> None:
    assert file.blob is not None
    key = layout.adapter_prefix(adapter.ref) + file.blob
    advice = "fsck --repair --from DIR|REGISTRY"
    expected = stored_size(record, file)
    if size is None:
        if not _still_wanted(adapter, version, record):
            return
        adapter.find("damage", "blob-missing", key, f"{file.name} is gone from the store.", advice)
    elif size != expected:
        adapter.find("damage", "blob-size", key, f"{file.name} has {size} bytes, not {expected}.", advice)
    elif adapter.depth.deep:
        fault = _deep_fault(adapter, version, record, file)
        if fault is not None and _still_wanted(adapter, version, record):
            adapter.find("damage", "blob-content", key, fault, advice)


def _still_wanted(adapter: _Adapter, version: Version, record: CommittedRecord) -> bool:
    """Say whether the version still has these blobs; it may have been deleted or repaired meanwhile."""
    try:
        now = get_record(adapter.store, adapter.ref, version)
    except DamagedError:
        return False
    content = None if now is None else content_of(now[0])
    return content is not None and content.pid == record.pid


def _check_inline(adapter: _Adapter, version: Version, record: CommittedRecord, file: StoredFile) -> None:
    """An inline file's digest was checked when the record was read, unless it is encrypted."""
    if record.encryption is None or not adapter.depth.deep or adapter.depth.opener is None:
        return
    fault = _deep_fault(adapter, version, record, file)
    if fault is not None:
        key = layout.version_key(adapter.ref, version)
        adapter.find("damage", "inline-content", key, fault, "fsck --repair --from DIR|REGISTRY")


def _deep_fault(adapter: _Adapter, version: Version, record: CommittedRecord, file: StoredFile) -> str | None:
    """Read a file and return what is wrong with it."""
    manifest = record.manifest_unverified()
    if record.encryption is not None and adapter.depth.opener is None:
        adapter.report.count("not_decrypted")
        return None
    hasher = FileHasher()
    try:
        entry = manifest.file(file.name)
        for piece in plain_pieces(
            adapter.store, adapter.ref, version, record, file, entry, adapter.depth.opener
        ):
            hasher.update(piece)
    except (KeyError, KeyAbsentError):
        return f"{file.name} is gone from the store."
    except PolicyRefusedError:  # its key is not ours
        adapter.report.count("not_decrypted")
        return None
    except TrustError as error:
        return error.message
    adapter.report.count("hashed_bytes", file.size)
    if hasher.entry(file.name) != entry:
        return f"{file.name} is not what was signed."
    return None


def plain_pieces(
    store: Store,
    ref: AdapterRef,
    version: Version,
    record: CommittedRecord,
    file: StoredFile,
    entry: FileEntry,
    opener: Opener | None,
) -> Iterator[Piece]:
    """Yield a stored file's plaintext, unchecked; an encrypted one needs an opener."""
    encryption = record.encryption
    if encryption is not None and opener is None:
        raise InvalidReferenceError(f"{file.name} of {ref.name} is encrypted; give its key.")
    place = AdapterRef(ref.tenant, ref.adapter, version=version)
    key = None if encryption is None or opener is None else opener(place, record.pid, encryption)
    if file.inline is not None:
        yield file.inline if key is None else key.opened(file.inline, entry)
        return
    blob = f"{layout.adapter_prefix(ref)}{file.blob}"
    read = resumed(blob_reader(store, blob, size_bytes=stored_size(record, file)))
    yield from (read if key is None else key.decrypting(read, entry))(0, file.size)
