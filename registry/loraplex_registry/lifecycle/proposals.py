"""Statements about tags that several people sign, one after the other, before they take effect.

The first makes a statement with `propose`, others add their signatures, the last moves the tag with `move_proposed`.
A statement holds only for the generation it was made for: once the tag was moved otherwise, it is void.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

from ..errors import ConflictError
from ..format.tags import TagObject, TagStatement
from ..refs import AdapterRef
from ..signing import Signer, cosign_envelope
from ..signing.envelopes import payload_unverified
from ..storage.store import Store
from .tag_state import Target, find_target, read_tag_state
from .tagging import Mover, TagMove


def propose(
    store: Store,
    ref: AdapterRef,
    tag: str,
    target: Target | None,
    signers: Sequence[Signer],
    *,
    now: dt.datetime,
    expires: str = "",
) -> dict[str, Any]:
    """Return the signed statement that would move the tag now, without moving it. None as target means untag."""
    mover = Mover(store, AdapterRef(ref.tenant, ref.adapter), tag, signers, now)
    before = read_tag_state(store, ref, tag)
    return mover.next(target, before, expires).envelope


def move_proposed(
    store: Store,
    envelope: dict[str, Any],
    signers: Sequence[Signer] = (),
    *,
    now: dt.datetime,
) -> TagMove:
    """Move a tag by a statement from `propose`, adding the signatures of `signers`.

    Raises:
        ConflictError: the tag was moved since the statement was made, or its version is not committed any more.
        SignatureInvalidError: not a statement.
    """
    for signer in signers:
        envelope = cosign_envelope(envelope, signer)
    statement = proposed_statement(envelope)
    ref = AdapterRef(statement.tenant, statement.adapter, version=statement.version)
    current = read_tag_state(store, ref, statement.tag)
    if current is not None and current.statement == statement:
        return TagMove(statement, moved=False, previous=None)
    before = None if current is None else current.statement
    if statement.prev != ("" if before is None else before.sha256):
        raise ConflictError(
            f"{ref.name}@{statement.tag} was moved since this statement was signed; sign a new one."
        )
    target = None if statement.version is None else find_target(store, ref)
    if target is not None and target.sha256 != statement.manifest_sha256:
        raise ConflictError(f"{ref} is not what was signed; sign a new statement.")
    mover = Mover(store, AdapterRef(ref.tenant, ref.adapter), statement.tag, signers, now)
    new = TagObject(envelope, statement, None if target is None else target.record)
    if not mover.swap(new, current):
        raise ConflictError(
            f"{ref.name}@{statement.tag} was moved at the same time; look at it and sign again."
        )
    move = TagMove(statement, moved=True, previous=before)
    if target is not None:
        mover.recheck(target, move)
    return move


def proposed_statement(envelope: dict[str, Any]) -> TagStatement:
    """Return the statement in an envelope, unverified.

    Raises:
        SignatureInvalidError: there is none.
    """
    return TagStatement.from_bytes(payload_unverified(envelope))
