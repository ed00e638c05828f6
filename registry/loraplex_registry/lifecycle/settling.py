"""Settling a tag whose version was deleted under it, because the mover died before it looked at the version again.

Deleting and moving see each other (`tagging`): the mover gives way and puts the tag back by one more generation. When
it died before that, the tag stands for a version that is gone. Whoever moves the tag next settles it; `settle_tag` does
what the dead mover would have done. Nothing is signed on top of a statement that the policy does not believe.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Final

from ..errors import AdapterNotFoundError, ConflictError, DamagedError, KeyAbsentError
from ..format import layout
from ..format.record import RECORD_BYTES_MAX, CommittedRecord, DeletedRecord
from ..format.tags import TagObject, TagStatement, read_tag_log
from ..refs import AdapterRef
from ..signing import Signer, envelope_keyids
from ..storage.store import Store
from .tag_state import Target, find_target, read_tag_state
from .tagging import Mover, TagMove
from .versions import get_record

SETTLED: Final = "its version was deleted while it was moved there; it says again what it said before"
"""What was done, for people."""

JudgeStatement = Callable[[AdapterRef, TagObject], None]
"""Raises a TrustError when a tag's statement is not one the policy believes, whatever became of its version."""

JudgeVersion = Callable[[AdapterRef, CommittedRecord], None]
"""Raises a TrustError when a version is not one the policy accepts."""


def settle_tag(
    store: Store,
    ref: AdapterRef,
    signer: Signer,
    *,
    now: dt.datetime,
    judge_statement: JudgeStatement,
    judge_version: JudgeVersion,
) -> TagMove | None:
    """Move a tag from a deleted version to what it said before, or to nothing when that is gone too.

    Args:
        store: where.
        ref: the tag.
        signer: whose signature alone is enough for this tag; the caller knows the policy.
        now: the time, with a zone.
        judge_statement: decides about the tag's present statement.
        judge_version: decides about the version it would point to again.

    Returns:
        The move; None when there is nothing to settle any more.

    Raises:
        TrustError: the statement, or the version before, is not to be believed; nothing was signed.
        ConflictError: the tag needs several signatures, or was moved meanwhile.
        StoreUnavailableError, StoreRefusedError: the storage.
    """
    assert ref.tag is not None
    state = read_tag_state(store, ref, ref.tag)
    if state is None or state.statement.version is None:
        return None
    found = get_record(store, ref, state.statement.version)
    if found is None or not isinstance(found[0], DeletedRecord):
        return None
    if len(envelope_keyids(state.tag.envelope)) > 1:
        raise ConflictError(f"{ref} was moved with several signatures; its signers must move it together.")
    judge_statement(ref, state.tag)
    before = _before(store, ref, state.statement)
    target = None if before is None else _target(store, ref, before)
    if target is not None:
        judge_version(AdapterRef(ref.tenant, ref.adapter, version=target.version), target.record)
    mover = Mover(store, AdapterRef(ref.tenant, ref.adapter), ref.tag, [signer], now)
    expires = before.expires if before is not None and target is not None else ""
    new = mover.next(target, state, expires)
    if not mover.swap(new, state):
        raise ConflictError(f"{ref} was moved at the same time; look at it again.")
    move = TagMove(new.statement, moved=True, previous=state.statement)
    if target is not None:
        mover.recheck(target, move)
    return move


def _before(store: Store, ref: AdapterRef, statement: TagStatement) -> TagStatement | None:
    """Return the statement that this one followed, proven by its hash; None for the first."""
    assert ref.tag is not None
    if statement.generation == 1:
        return None
    key = layout.tag_log_key(ref, ref.tag, statement.generation - 1)
    try:
        found = read_tag_log(store.get(key, limit_bytes=RECORD_BYTES_MAX).body, where=str(ref)).statement
    except KeyAbsentError as error:
        raise DamagedError(f"The log of {ref} lacks its last statement; restore it from a backup.") from error
    if found.sha256 != statement.prev:
        raise DamagedError(
            f"The log of {ref} is not the one its statement follows; see `registry log {ref}`."
        )
    return found


def _target(store: Store, ref: AdapterRef, before: TagStatement) -> Target | None:
    """Return what the tag said before, if it is still there and the same."""
    if before.version is None:
        return None
    try:
        target = find_target(store, AdapterRef(ref.tenant, ref.adapter, version=before.version))
    except AdapterNotFoundError:
        return None
    return target if target.sha256 == before.manifest_sha256 else None
