"""Moving tags: signed generations by compare-and-swap, with the whole history kept.

```
read the tag -> keep its statement in the log -> swap in the next generation -> look at the version again
```

- The statement about to be replaced is kept *before* the swap, so the log never has a gap; a crash in between leaves
  an entry that the next mover finds to be the same.
- A version may be deleted while a tag is moved to it. Deleting first makes the record unreadable and then looks for
  tags; moving first writes the tag and then looks at the record. One of both sees the other (Dekker's argument), and
  the mover gives way: it puts the tag back by another generation and reports a conflict.
- A tag that points there already, signed by the same keys, is left alone. Only its copy of the record is renewed when
  the version's own has changed.
"""

from __future__ import annotations

import datetime as dt
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import (
    AdapterNotFoundError,
    ConflictError,
    DamagedError,
    KeyConflictError,
    SettingsError,
    SignatureInvalidError,
    StoreUnavailableError,
)
from ..format import layout
from ..format.record import RECORD_BYTES_MAX, CommittedRecord, read_record
from ..format.tags import GENERATION_MAX, PAYLOAD_TYPE, TagObject, TagStatement, make_tag, read_tag_log
from ..refs import AdapterRef
from ..signing import Signer, envelope_keyids, verify_envelope
from ..storage.store import Store, write_conditionally
from .tag_state import (
    ABSENT,
    LOG_ENTRIES_MAX,
    TagState,
    Target,
    Unread,
    find_target,
    parse_expect,
    read_tag_state,
    refresh_copies,
    refresh_copy,
    require_expected,
    tag_names,
)
from .versions import get_item

__all__ = [
    "ABSENT",
    "JITTER_S",
    "LOG_ENTRIES_MAX",
    "MOVES_MAX",
    "Mover",
    "TagMove",
    "TagState",
    "Target",
    "Unread",
    "find_target",
    "move_tag",
    "parse_expect",
    "read_tag_state",
    "refresh_copies",
    "refresh_copy",
    "require_expected",
    "tag_names",
    "untag",
]

MOVES_MAX: Final = 5
"""How often a tag move is rebuilt when rivals move it."""

JITTER_S: Final = 0.05
"""Longest wait before the first repetition, in seconds; doubled each time."""


@dataclass(frozen=True, slots=True)
class TagMove:
    """What was done: `moved` is False when the tag said so already. `statement` is what the tag says now."""

    statement: TagStatement
    moved: bool
    previous: TagStatement | None


def move_tag(
    store: Store,
    ref: AdapterRef,
    tag: str,
    target: Target,
    signers: Sequence[Signer],
    *,
    now: dt.datetime,
    expect: int | str | None = None,
    expires: str = "",
    known: TagState | Unread | None = Unread.UNREAD,
    sleep: Callable[[float], None] = time.sleep,
) -> TagMove:
    """Make `ref@tag` mean `target`.

    Requests: GET tag (unless `known`), PUT log when the tag was there before, PUT tag, GET record (304).

    Args:
        store: where.
        ref: tenant and adapter.
        tag: the tag.
        target: from `find_target`, or just published.
        signers: who sign the statement; one at least, each another key.
        now: the time, with a zone; `issued` of the statement.
        expect: what the tag must be now, see `parse_expect`; None for anything.
        expires: UTC time to the second from which the statement is not believed, "" for never.
        known: the tag as read earlier (None: it never was), to save the first request.
        sleep: waits between repetitions.

    Raises:
        ConflictError: not what `expect` says, rivals kept moving it, or the version was deleted meanwhile (the tag
            was put back then).
        DamagedError: the tag cannot be read, or was rolled back to an older generation.
        StoreUnavailableError, StoreRefusedError: the storage.
    """
    mover = Mover(store, AdapterRef(ref.tenant, ref.adapter), tag, signers, now)
    move = mover.move(target, expect=expect, expires=expires, known=known, sleep=sleep)
    if move.moved:
        mover.recheck(target, move)
    return move


def untag(
    store: Store,
    ref: AdapterRef,
    tag: str,
    signers: Sequence[Signer],
    *,
    now: dt.datetime,
    expect: int | str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> TagMove | None:
    """Make `ref@tag` mean nothing, by one more generation; None when it never was.

    Raises:
        As `move_tag`.
    """
    mover = Mover(store, AdapterRef(ref.tenant, ref.adapter), tag, signers, now)
    known = read_tag_state(store, ref, tag)
    if known is None:
        require_expected(ref, tag, None, expect)
        return None
    return mover.move(None, expect=expect, expires="", known=known, sleep=sleep)


class Mover:
    """Moves one tag. Used by one thread."""

    def __init__(
        self, store: Store, ref: AdapterRef, tag: str, signers: Sequence[Signer], now: dt.datetime
    ) -> None:
        self._store = store
        self._ref = ref
        self._tag = tag
        self._signers = signers
        self._issued = now.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._key = layout.tag_key(ref, tag)
        self._name = f"{ref.name}@{tag}"

    def move(
        self,
        target: Target | None,
        *,
        expect: int | str | None,
        expires: str,
        known: TagState | Unread | None,
        sleep: Callable[[float], None],
    ) -> TagMove:
        """Swap in the next generation, rebuilding it when rivals are faster."""
        tried: TagObject | None = None
        for attempt in range(MOVES_MAX):
            if attempt or isinstance(known, Unread):
                known = read_tag_state(self._store, self._ref, self._tag)
            before = None if known is None else known.statement
            if tried is not None and self._was_written(tried, before):
                return TagMove(tried.statement, moved=True, previous=before)
            require_expected(self._ref, self._tag, before, expect)
            if known is not None and self._is_done(known, target, expires):
                self._refresh(known, target)
                return TagMove(known.statement, moved=False, previous=known.statement)
            tried = self.next(target, known, expires)
            if self.swap(tried, known):
                return TagMove(tried.statement, moved=True, previous=before)
            sleep(random.uniform(0, JITTER_S * 2**attempt))  # noqa: S311 - no secret depends on it
        raise ConflictError(f"Tag {self._name} keeps being moved by others; look at it and set it again.")

    def next(self, target: Target | None, before: TagState | None, expires: str = "") -> TagObject:
        """Return the signed statement that follows `before`."""
        if not self._signers:
            raise SettingsError("A tag is moved by a signed statement; give a key.")
        generation = 1 if before is None else before.statement.generation + 1
        if generation >= GENERATION_MAX:
            raise DamagedError(f"Tag {self._name} has an impossible generation; look into the store.")
        statement = TagStatement(
            tenant=self._ref.tenant,
            adapter=self._ref.adapter,
            tag=self._tag,
            generation=generation,
            version=None if target is None else target.version,
            manifest_sha256="" if target is None else target.sha256,
            prev="" if before is None else before.statement.sha256,
            issued=self._issued,
            expires=expires,
        )
        return make_tag(statement, None if target is None else target.record, *self._signers)

    def swap(self, new: TagObject, before: TagState | None) -> bool:
        """Keep the old statement, then put the new one in its place; False when a rival was faster."""
        if before is not None and not self._keep(before):
            return False
        etag = None if before is None else before.etag
        try:
            write_conditionally(self._store, self._key, new.to_bytes(), etag=etag)
        except KeyConflictError:
            return False
        return True

    def recheck(self, target: Target, move: TagMove) -> None:
        """Look at the version again after the tag was written; put the tag back when it is being deleted.

        Raises:
            ConflictError: it is.
        """
        record = self._committed_now(target)
        if record is None:
            self._put_back(move)
            raise ConflictError(
                f"{self._ref.name}@{target.version} was deleted while {self._name} was moved to it; "
                "the tag is as it was before."
            )
        if record != target.record:
            state = read_tag_state(self._store, self._ref, self._tag)
            if state is not None and state.statement == move.statement:
                refresh_copy(self._store, self._ref, self._tag, state, record)

    def _committed_now(self, target: Target) -> CommittedRecord | None:
        """Return the version's record when it is still committed with the same manifest."""
        key = layout.version_key(self._ref, target.version)
        item = self._store.changed(key, etag=target.etag, limit_bytes=RECORD_BYTES_MAX)
        if item is None:
            return target.record
        record = read_record(item.body, version=target.version, where=f"{self._ref.name}@{target.version}")
        if isinstance(record, CommittedRecord) and record.manifest_bytes == target.record.manifest_bytes:
            return record
        return None

    def _put_back(self, move: TagMove) -> None:
        """Undo a move by another generation: to what the tag was before, or to nothing if that is gone too."""
        state = read_tag_state(self._store, self._ref, self._tag)
        if state is None or state.statement != move.statement or not self._signers:
            return  # a rival moved on, or nobody here can sign
        earlier = self._earlier(move.previous)
        expires = "" if earlier is None or move.previous is None else move.previous.expires
        back = self.next(earlier, state, expires)
        if not self.swap(back, state) or earlier is None:
            return
        if self._committed_now(earlier) is None:
            state = read_tag_state(self._store, self._ref, self._tag)
            if state is not None and state.statement == back.statement:
                self.swap(self.next(None, state), state)

    def _earlier(self, previous: TagStatement | None) -> Target | None:
        if previous is None or previous.version is None:
            return None
        try:
            ref = AdapterRef(self._ref.tenant, self._ref.adapter, version=previous.version)
            return find_target(self._store, ref)
        except AdapterNotFoundError:
            return None

    def _keep(self, before: TagState) -> bool:
        """Put a statement into the log; False when the tag changed meanwhile.

        Raises:
            DamagedError: another statement of this number is there, or a later one: the tag was rolled back.
        """
        generation = before.statement.generation
        key = layout.tag_log_key(self._ref, self._tag, generation)
        body = before.tag.to_log_bytes()
        if self._create_log(key, body):
            return True
        found = get_item(self._store, key)
        later = get_item(self._store, layout.tag_log_key(self._ref, self._tag, generation + 1))
        if found is not None and found.body == body and later is None:
            return True
        # Only now: an unchanged tag behind its own log is one that was put back.
        if self._store.changed(self._key, etag=before.etag, limit_bytes=RECORD_BYTES_MAX) is not None:
            return False
        raise DamagedError(
            f"Tag {self._name} stands at generation {generation}, but its log knows another or a later one: it was "
            "put back by somebody; see `registry log`."
        )

    def _create_log(self, key: str, body: bytes) -> bool:
        """Write a new entry of the log; False when there is one."""
        try:
            try:
                self._store.create(key, body)
            except StoreUnavailableError as error:
                if not error.ambiguous:
                    raise
                write_conditionally(self._store, key, body, etag=None)
        except KeyConflictError:
            return False
        return True

    def _was_written(self, tried: TagObject, current: TagStatement | None) -> bool:
        """Say whether a statement whose writing seemed to fail was in truth written and replaced since."""
        if current is None or current.generation <= tried.statement.generation:
            return current == tried.statement
        key = layout.tag_log_key(self._ref, self._tag, tried.statement.generation)
        item = get_item(self._store, key)
        if item is None:
            return False
        return read_tag_log(item.body, where=self._name).envelope == tried.envelope

    def _is_done(self, known: TagState, target: Target | None, expires: str) -> bool:
        """Say whether the tag says this already, signed by everybody who would sign now."""
        statement = known.statement
        wanted = (None, "") if target is None else (target.version, target.sha256)
        if (statement.version, statement.manifest_sha256) != wanted or statement.expires != expires:
            return False
        if target is None:
            return True
        keys = [signer.public_key for signer in self._signers]
        try:
            if not {key.keyid for key in keys} <= set(envelope_keyids(known.tag.envelope)):
                return False
            verify_envelope(known.tag.envelope, PAYLOAD_TYPE, keys)
        except SignatureInvalidError:
            return False
        return (statement.tenant, statement.adapter, statement.tag) == (
            self._ref.tenant,
            self._ref.adapter,
            self._tag,
        )

    def _refresh(self, known: TagState, target: Target | None) -> None:
        if target is not None and known.tag.record != target.record:
            refresh_copy(self._store, self._ref, self._tag, known, target.record)
