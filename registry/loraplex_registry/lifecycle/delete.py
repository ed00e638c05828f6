"""Deleting a version: first unreadable, then looked for in every tag, then gone for good.

```
committed -> deleting -> (no tag points to it) -> deleted
                 └─────> (one does, no force)  -> committed
```

A tag may be moved to the version meanwhile; see `tagging` for why one of both always sees the other. A tombstone stays,
so the version's name never comes to mean something else. The blobs stay too, until the garbage collector takes them
after a time of grace, so downloads that run are not broken off.

A deletion that died anywhere is completed, or taken back, by the same command.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import (
    AdapterNotFoundError,
    ConflictError,
    InvalidReferenceError,
    KeyConflictError,
    RegistryError,
    SettingsError,
    StoreError,
)
from ..format import layout
from ..format.record import CommittedRecord, DeletedRecord, DeletingRecord
from ..refs import AdapterRef, Version
from ..signing import Signer
from ..storage.store import Store, write_conditionally
from .tagging import read_tag_state, tag_names, untag
from .versions import get_record

REASON_LENGTH_MAX: Final = 256
"""Longest reason, in characters."""

UNTAG_TRIES_MAX: Final = 5
"""How often a tag is looked at again when it is moved while it is removed."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """What was done: `deleted` is False when the version was gone already; `untagged` names the tags removed."""

    version: Version
    digest: str
    deleted: bool
    untagged: tuple[str, ...]


def delete_version(
    store: Store,
    ref: AdapterRef,
    *,
    by: str,
    now: dt.datetime,
    reason: str = "deleted",
    force: bool = False,
    signers: Sequence[Signer] = (),
) -> Deletion:
    """Delete the version `ref` names. Requests: 3, the listing of the tags, and one for each tag.

    Args:
        store: where.
        ref: with a version.
        by: who deletes, for people: a key id or a name.
        now: the time, with a zone.
        reason: kept in the tombstone; 1 to REASON_LENGTH_MAX characters.
        force: remove the tags that point to it, by statements signed by `signers`.
        signers: needed for that alone.

    Raises:
        AdapterNotFoundError: there is no such version.
        ConflictError: it was never published, a tag points to it, or somebody else changes it.
        DamagedError: its record or a tag cannot be read; nothing was changed.
        StoreUnavailableError, StoreRefusedError: the storage.
    """
    if not 0 < len(reason) <= REASON_LENGTH_MAX:
        raise InvalidReferenceError(f"A reason has 1 to {REASON_LENGTH_MAX} characters; give a shorter one.")
    held = _hold(store, ref, by, now)
    if isinstance(held, DeletedRecord):
        return Deletion(_version(ref), "sha256:" + held.manifest_sha256, False, ())
    record, etag = held
    try:
        untagged = _release_tags(store, ref, now, signers, force=force)
    except RegistryError:
        # Best effort: if it fails, the version stays as it is and the same command is run again.
        with contextlib.suppress(StoreError):
            back = record.revised().to_bytes()
            write_conditionally(store, layout.version_key(ref, _version(ref)), back, etag=etag)
        raise
    _finish(store, ref, record, etag, now, reason)
    return Deletion(_version(ref), record.digest, True, tuple(untagged))


def referencing_tags(store: Store, ref: AdapterRef) -> list[str]:
    """Return the tags that point to the version `ref` names, in order."""
    return [name for name in tag_names(store, ref) if _points_here(store, ref, name)]


def _version(ref: AdapterRef) -> Version:
    if ref.version is None:
        raise InvalidReferenceError(f"{ref} does not name a version; write {ref.name}@3.")
    return ref.version


def _hold(
    store: Store, ref: AdapterRef, by: str, now: dt.datetime
) -> DeletedRecord | tuple[CommittedRecord, str]:
    """Make the version unreadable; return what it was and the etag of the state that holds it.

    A deletion begun by somebody else is carried on: its swaps and ours exclude each other.
    """
    version = _version(ref)
    found = get_record(store, ref, version)
    if found is None:
        raise AdapterNotFoundError(f"{ref} is not in {store.url}; `registry ls {ref.name}` shows what is.")
    record, etag = found
    if isinstance(record, DeletedRecord):
        return record
    if isinstance(record, DeletingRecord):
        return record.record, etag
    if not isinstance(record, CommittedRecord):
        raise ConflictError(f"{ref} was never published, so there is nothing to delete; push it first.")
    # The random part makes these bytes unique, so that no state of the record ever comes back.
    name = f"{by[:200]} {uuid.uuid4().hex}"
    body = DeletingRecord(name, int(now.timestamp()), record).to_bytes()
    try:
        return record, write_conditionally(store, layout.version_key(ref, version), body, etag=etag)
    except KeyConflictError as error:
        raise ConflictError(f"{ref} was changed at the same time; delete it again.") from error


def _release_tags(
    store: Store, ref: AdapterRef, now: dt.datetime, signers: Sequence[Signer], *, force: bool
) -> list[str]:
    tags = referencing_tags(store, ref)
    if tags and not force:
        raise ConflictError(
            f"{ref} is what {', '.join(tags[:8])} {'points' if len(tags) == 1 else 'point'} to; move the tag first, "
            "or delete with --force."
        )
    if tags and not signers:
        raise SettingsError(f"Removing the tags of {ref} takes a signature; give a key.")
    for tag in tags:
        _untag(store, ref, tag, now, signers)
    return tags


def _untag(store: Store, ref: AdapterRef, tag: str, now: dt.datetime, signers: Sequence[Signer]) -> None:
    for _ in range(UNTAG_TRIES_MAX):
        state = read_tag_state(store, ref, tag)
        if state is None or state.statement.version != ref.version:
            return
        with contextlib.suppress(ConflictError):
            untag(store, ref, tag, signers, now=now, expect=state.statement.generation)
            return
    raise ConflictError(f"Tag {ref.name}@{tag} keeps being moved by others; delete {ref} again.")


def _points_here(store: Store, ref: AdapterRef, tag: str) -> bool:
    state = read_tag_state(store, ref, tag)
    return state is not None and state.statement.version == ref.version


def _finish(
    store: Store, ref: AdapterRef, record: CommittedRecord, etag: str, now: dt.datetime, reason: str
) -> None:
    digest = record.digest.removeprefix("sha256:")
    body = DeletedRecord(record.pid, digest, int(now.timestamp()), reason).to_bytes()
    try:
        write_conditionally(store, layout.version_key(ref, _version(ref)), body, etag=etag)
    except KeyConflictError as error:
        found = get_record(store, ref, _version(ref))
        if found is None or not isinstance(found[0], DeletedRecord):
            raise ConflictError(f"{ref} was put back by somebody meanwhile; look at its tags.") from error
