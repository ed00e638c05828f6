"""Tags as they are: reading them, what they may be moved to, what they are expected to be, renewing their copies."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from ..errors import ConflictError, InvalidReferenceError, KeyConflictError
from ..format import layout
from ..format.record import CommittedRecord
from ..format.tags import TagObject, TagStatement, read_tag
from ..refs import AdapterRef, Version, check_digest, check_version
from ..storage.store import Store, write_conditionally
from .listing import not_found
from .versions import get_item, get_record

COPY_TRIES_MAX: Final = 5
"""How often a tag's copy is renewed again when rivals move the tag."""

LOG_ENTRIES_MAX: Final = 100_000
"""Most entries of one tag's log that are read."""

ABSENT: Final = "absent"
"""What `expect` says when the tag must point to nothing."""


class Unread(enum.Enum):
    """Stands for a tag that was not read yet."""

    UNREAD = "unread"


@dataclass(frozen=True, slots=True)
class Target:
    """What a tag is moved to: a committed version with its record and the record's etag."""

    version: Version
    record: CommittedRecord
    etag: str

    @property
    def sha256(self) -> str:
        """Hex digest of the manifest."""
        return self.record.digest.removeprefix("sha256:")


@dataclass(frozen=True, slots=True)
class TagState:
    """A tag as it was read: the object and its etag."""

    tag: TagObject
    etag: str

    @property
    def statement(self) -> TagStatement:
        """Its unverified statement."""
        return self.tag.statement


def find_target(store: Store, ref: AdapterRef) -> Target:
    """Return the committed version a reference with a version names. One request.

    Raises:
        AdapterNotFoundError: it is not committed.
    """
    if ref.version is None:
        raise InvalidReferenceError(f"{ref} does not name a version; write {ref.name}@3.")
    found = get_record(store, ref, ref.version)
    if found is None or not isinstance(found[0], CommittedRecord):
        raise not_found(store.url, ref, None if found is None else found[0])
    return Target(ref.version, found[0], found[1])


def read_tag_state(store: Store, ref: AdapterRef, tag: str) -> TagState | None:
    """Return a tag as it is, None when it never was. One request.

    Raises:
        DamagedError: it cannot be read.
    """
    item = get_item(store, layout.tag_key(ref, tag))
    return None if item is None else TagState(read_tag(item.body, where=f"{ref.name}@{tag}"), item.etag)


def refresh_copy(store: Store, ref: AdapterRef, tag: str, state: TagState, record: CommittedRecord) -> bool:
    """Renew a tag's copy of its record, leaving the statement alone; False when a rival changed the tag.

    The record must be of the same manifest as the tag's. A copy that is newer already stays, so of several changes of
    a record at once the last one ends up in the tag.
    """
    if state.tag.record is None or state.tag.record.manifest_bytes != record.manifest_bytes:
        raise InvalidReferenceError(f"{ref.name}@{tag} does not point to this version; move it.")
    if state.tag.record.rev > record.rev or state.tag.record == record:
        return True
    body = replace(state.tag, record=record).to_bytes()
    try:
        write_conditionally(store, layout.tag_key(ref, tag), body, etag=state.etag)
    except KeyConflictError:
        return False
    return True


def refresh_copies(store: Store, ref: AdapterRef, target: Target) -> list[str]:
    """Renew the copies of a version's record in every tag that points to it; return the tags' names in order."""
    renewed: list[str] = []
    for name in tag_names(store, ref):
        for _ in range(COPY_TRIES_MAX):
            state = read_tag_state(store, ref, name)
            if state is None or state.tag.record is None or state.statement.version != target.version:
                break
            if state.tag.record.manifest_bytes != target.record.manifest_bytes:
                break
            if state.tag.record == target.record or state.tag.record.rev > target.record.rev:
                break
            if refresh_copy(store, ref, name, state, target.record):
                renewed.append(name)
                break
    return renewed


def tag_names(store: Store, ref: AdapterRef) -> Iterator[str]:
    """Yield the names of an adapter's tags in order, removed ones too."""
    for name in store.children(layout.tags_prefix(ref)):
        if name.endswith(".json"):
            yield name.removesuffix(".json")


def parse_expect(text: str) -> int | str:
    """Return what `--expect` means: a generation (0: the tag never was), ABSENT, a digest, or a semantic version.

    Raises:
        InvalidReferenceError: it is none of these.
    """
    if text.isascii() and text.isdigit() and len(text) <= 10:
        return int(text)
    try:
        if text != ABSENT:
            check_digest(text) if text.startswith("sha256:") else check_version(text)
    except InvalidReferenceError as error:
        raise InvalidReferenceError(
            f"{text[:80]!r} is nothing a tag can be at; write its generation, which `registry log` shows, 0 if there "
            "never was one, absent, a digest, or a semantic version."
        ) from error
    return text


def require_expected(
    ref: AdapterRef, tag: str, current: TagStatement | None, expect: int | str | None
) -> None:
    """Raise ConflictError unless the tag is what `expect` says: see `parse_expect`."""
    if expect is None:
        return
    gone = current is None or current.version is None
    generation = 0 if current is None else current.generation
    found = ABSENT if current is None or gone else f"sha256:{current.manifest_sha256}"
    # A whole number is a generation, never a version's: a tag that came back to version 1 is not at generation 1.
    semantic = current is not None and not gone and isinstance(expect, str) and expect == current.version
    if semantic or expect in (generation, found):
        return
    raise ConflictError(
        f"{ref.name}@{tag} is at generation {generation} ({found}), not at {expect}; look at it and decide again."
    )
