"""Mending a version from a good copy of its files, and finishing what died half-way.

The good copy is believed only as far as it matches the signed manifest, byte for byte. The files go to blobs of a new
push id; the manifest, and so the version's digest and signature, stay as they are.

The record is swapped *before* the new blobs are uploaded. A collector decides by what the record says, so from the
first byte on the new blobs belong to a committed version, and no clock can make them garbage. The version was
unreadable before and stays so until the upload is done; running the same command again completes it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import (
    AdapterNotFoundError,
    ConflictError,
    DamagedError,
    DigestMismatchError,
    KeyConflictError,
    SettingsError,
)
from ..format import layout
from ..format.hashing import PIECE_BYTES, FileHasher
from ..format.manifest import FileEntry
from ..format.record import CommittedRecord, StoredFile, read_record
from ..refs import AdapterRef, Version, parse_version
from ..storage.store import Store, write_conditionally
from ..validation.base import Progress
from ..validation.weights import open_regular
from .content import Seal, Sealer
from .delete import delete_version
from .findings import Finding
from .fsck_adapter import Judge, Opener, plain_pieces
from .tag_state import Target, find_target, read_tag_state, refresh_copies
from .versions import get_item

GoodCopy = Callable[[FileEntry], AbstractContextManager[Path]]
"""Opens a context in which a file of the good copy lies at a path."""


@dataclass(frozen=True, slots=True)
class Mended:
    """What was done: the version, the bytes uploaded, and the tags whose copy of the record was renewed."""

    ref: AdapterRef
    size_bytes: int
    tags: tuple[str, ...]


def from_directory(directory: Path) -> GoodCopy:
    """Return the files of a directory, such as `registry pull` writes, as a good copy."""

    @contextlib.contextmanager
    def opened(file: FileEntry) -> Iterator[Path]:
        yield directory / file.name

    return opened


def from_registry(store: Store, ref: AdapterRef, *, opener: Opener | None = None) -> GoodCopy:
    """Return the files of the same version in another registry as a good copy.

    Raises:
        AdapterNotFoundError: it is not committed there.
    """
    target = find_target(store, ref)

    @contextlib.contextmanager
    def opened(file: FileEntry) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="loraplex-") as directory:
            path = Path(directory) / file.name
            stored = target.record.file(file.name)
            with path.open("xb") as sink:
                for piece in plain_pieces(store, ref, target.version, target.record, stored, file, opener):
                    sink.write(piece)
            yield path

    return opened


def mend_version(
    store: Store,
    ref: AdapterRef,
    good: GoodCopy,
    *,
    sealer: Sealer | None = None,
    progress: Progress | None = None,
) -> Mended:
    """Store all blobs of a version again, from a good copy.

    Args:
        store: where.
        ref: with a version, which must be committed.
        good: where the files come from.
        sealer: encrypts; needed when the version is encrypted.
        progress: called with phase "upload".

    Raises:
        AdapterNotFoundError: no such version.
        DigestMismatchError: the copy is not what was signed; nothing was changed.
        ConflictError: somebody else changed the version meanwhile.
        SettingsError: the version is encrypted and no key was given.
        StoreUnavailableError, StoreRefusedError: the storage; run it again.
    """
    target = find_target(store, ref)
    old, manifest = target.record, target.record.manifest_unverified()
    if old.encryption is not None and sealer is None:
        raise SettingsError(f"{ref} is encrypted; give the key to encrypt the good copy with.")
    for file in manifest.files:
        _require_good(file, good)
    pid = uuid.uuid4().hex
    seal = None if old.encryption is None or sealer is None else sealer.begin(ref, target.version, pid)
    record = old.revised(
        pid=pid,
        files=_moved(old, target.version, pid, good, seal),
        encryption=None if seal is None else seal.encryption,
    )
    etag = _swap(store, ref, target, record)
    size = _upload(store, ref, record, good, seal, progress)
    tags = refresh_copies(store, ref, Target(target.version, record, etag))
    return Mended(AdapterRef(ref.tenant, ref.adapter, version=target.version), size, tuple(tags))


def restore_record(store: Store, ref: AdapterRef, other: Store, judge: Judge) -> bool:
    """Put the record of a version from another registry in the place of one that cannot be read.

    Args:
        store: where.
        ref: with a version.
        other: a registry with the same version, such as a backup.
        judge: decides whether that record is trusted; a record nobody vouches for is never put anywhere.

    Returns:
        False when the record here can be read; nothing is changed then.

    Raises:
        AdapterNotFoundError: there is no record here, or no committed one there.
        TrustError: the one there is not trusted.
        ConflictError: the record here changed meanwhile.
    """
    good = find_target(other, ref)
    key = layout.version_key(ref, good.version)
    item = get_item(store, key)
    if item is None:
        raise AdapterNotFoundError(f"{ref} is not in {store.url}; push it.")
    try:
        read_record(item.body, version=good.version, where=str(ref))
    except DamagedError:
        judge(ref, good.record)
        _swap(store, ref, replace(good, etag=item.etag), good.record)
        return True
    return False


def finish(store: Store, findings: Sequence[Finding], *, by: str, now: dt.datetime) -> list[str]:
    """Finish what died half-way: deletions that were begun, and copies of records in tags that are stale.

    Args:
        store: where.
        findings: of `fsck.check`.
        by: who does it, for people.
        now: the time, with a zone.

    Returns:
        What was done, one sentence each.
    """
    done: list[str] = []
    for finding in findings:
        if finding.code == "delete-unfinished":
            done.append(_finish_deletion(store, ref_of(finding.key), by, now))
        elif finding.code == "tag-copy-stale":
            done += _renew_copy(store, finding.key)
    return done


def _finish_deletion(store: Store, ref: AdapterRef, by: str, now: dt.datetime) -> str:
    try:
        delete_version(store, ref, by=by, now=now)
    except ConflictError:
        return f"{ref} is what a tag points to; it was put back"
    return f"{ref} is deleted"


def _renew_copy(store: Store, key: str) -> list[str]:
    ref = ref_of(key)
    assert ref.tag is not None
    state = read_tag_state(store, ref, ref.tag)
    if state is None or state.statement.version is None:
        return []
    version = AdapterRef(ref.tenant, ref.adapter, version=state.statement.version)
    return [
        f"{ref.name}@{tag} was renewed" for tag in refresh_copies(store, ref, find_target(store, version))
    ]


def ref_of(key: str) -> AdapterRef:
    """Return the version or tag that a record's or tag's key is about."""
    _, tenant, _, adapter, kind, name = key.split("/")
    stem = name.removesuffix(".json")
    if kind == "v":
        return AdapterRef(tenant, adapter, version=parse_version(stem))
    return AdapterRef(tenant, adapter, tag=stem)


def _require_good(file: FileEntry, good: GoodCopy) -> None:
    hasher = FileHasher()
    with good(file) as path, open_regular(path) as source:
        while piece := source.read(PIECE_BYTES):
            hasher.update(piece)
    if hasher.entry(file.name) != file:
        raise DigestMismatchError(
            f"{file.name} of the good copy is not what was signed; nothing was changed."
        )


def _moved(
    old: CommittedRecord, version: Version, pid: str, good: GoodCopy, seal: Seal | None
) -> tuple[StoredFile, ...]:
    """Return where the files are to be: blobs under a new push id, inline files encrypted anew."""
    manifest = old.manifest_unverified()
    files: list[StoredFile] = []
    blobs = 0
    for file in old.files:
        if file.blob is not None:
            files.append(replace(file, blob=layout.blob_name(version, pid, blobs)))
            blobs += 1
        elif seal is not None:
            entry = manifest.file(file.name)
            with good(entry) as path:
                files.append(replace(file, inline=seal.inline(entry, path.read_bytes())))
        else:
            files.append(file)
    return tuple(files)


def _swap(store: Store, ref: AdapterRef, target: Target, record: CommittedRecord) -> str:
    try:
        return write_conditionally(
            store, layout.version_key(ref, target.version), record.to_bytes(), etag=target.etag
        )
    except KeyConflictError as error:
        raise ConflictError(f"{ref} was changed at the same time; repair it again.") from error


def _upload(
    store: Store,
    ref: AdapterRef,
    record: CommittedRecord,
    good: GoodCopy,
    seal: Seal | None,
    progress: Progress | None,
) -> int:
    manifest, done = record.manifest_unverified(), 0
    for file in record.files:
        if file.blob is None:
            continue
        entry = manifest.file(file.name)
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(good(entry))
            if seal is not None:
                path, entry = stack.enter_context(seal.blob(entry, path))
            store.put_blob(layout.adapter_prefix(ref) + file.blob, path, entry)
        done += file.size
        if progress is not None:
            progress("upload", done, manifest.size_bytes)
    return done
