"""Signing again with another key what was signed before: the second half of rotating a key.

Nothing is signed that the policy does not trust: every version and tag is verified first, and a rule in audit mode,
which vouches for nothing, stops it all. Tags come before versions: a tag carries a copy of its version's record, and
the copy's signature must still count at the time the tag's is judged by.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..errors import (
    AdapterNotFoundError,
    ConflictError,
    DigestMismatchError,
    ExpiredError,
    PolicyRefusedError,
    RankTooLargeError,
    RollbackError,
    TrustError,
)
from ..format.record import CommittedRecord
from ..format.tags import TagStatement
from ..refs import AdapterRef, version_order
from ..registry import Registry, utc_now
from ..signing import Signer, envelope_keyids
from ..storage.store import Store
from ..trust.marks import MemoryMarks
from ..trust.verdict import TrustPolicy, VerifiedManifest
from ..trust.verifier import Verifier
from .amend import resign
from .tagging import find_target, move_tag, read_tag_state, tag_names
from .versions import get_record, recorded_versions

RESIGNED: Final = "resigned"
UNCHANGED: Final = "unchanged"
LEFT: Final = "left"


@dataclass(frozen=True, slots=True)
class Resigned:
    """What became of a version or a tag: RESIGNED, UNCHANGED (the key had signed it), or LEFT, with the reason."""

    ref: AdapterRef
    outcome: str
    code: str = ""
    reason: str = ""


class Resigner:
    """Signs the versions and tags of one adapter after another.

    Args:
        store: where they are.
        policy: decides what is trusted.
        signer: the key that is to sign.
        marks: what was seen before; an older tag that was put back is not signed.
        as_of: time by which the old keys are judged when they do not count any more; None judges by now alone.
        dry_run: only tell what would be signed.
    """

    def __init__(
        self,
        store: Store,
        policy: TrustPolicy,
        signer: Signer,
        *,
        marks: MemoryMarks | None = None,
        as_of: dt.datetime | None = None,
        dry_run: bool = False,
    ) -> None:
        self._store = store
        self._policy = policy
        self._signer = signer
        self._dry_run = dry_run
        self._marks = MemoryMarks() if marks is None else marks
        self._now = Verifier(Registry(store), policy, marks=self._marks)
        # Marks compare the clock with what was seen, so that an earlier time would be refused as a clock set back.
        self._then = None if as_of is None else Verifier(Registry(store), policy, now=lambda: as_of)

    def adapter(self, ref: AdapterRef) -> Iterator[Resigned]:
        """Sign an adapter's tags and committed versions, oldest first, and yield what became of each.

        Raises:
            PolicyRefusedError: no rule covers the adapter, or the rule is in audit mode.
            SignatureInvalidError, ExpiredError: the rule does not list the key, or its dates are over.
            StoreUnavailableError, StoreRefusedError: the storage; what was done stays done.
        """
        self._require_enforced(ref)
        for tag in tag_names(self._store, ref):
            yield self._try(AdapterRef(ref.tenant, ref.adapter, tag=tag))
        for version in sorted(recorded_versions(self._store, ref), key=version_order):
            found = get_record(self._store, ref, version)
            if found is not None and isinstance(found[0], CommittedRecord):
                yield self._try(AdapterRef(ref.tenant, ref.adapter, version=version))

    def _require_enforced(self, ref: AdapterRef) -> None:
        rule = self._policy.rule_for(ref.tenant, ref.adapter)
        if rule.mode != "enforce":
            raise PolicyRefusedError(
                f"The policy rule {rule.scope!r} is in audit mode, which vouches for nothing; enforce it, sign then."
            )
        rule.key(self._signer.keyid, name=ref.name).check(utc_now())

    def _try(self, ref: AdapterRef) -> Resigned:
        try:
            changed = self._version(ref) if ref.tag is None else self._tag(ref, ref.tag)
        except AdapterNotFoundError:  # a tag that was removed, or a version deleted meanwhile
            return Resigned(ref, UNCHANGED)
        except (TrustError, ConflictError, RankTooLargeError) as error:
            return Resigned(ref, LEFT, error.code, error.message)
        return Resigned(ref, RESIGNED if changed else UNCHANGED)

    def _version(self, ref: AdapterRef) -> bool:
        verified = self._verify(ref)
        if self._dry_run:
            return verified.keyid != self._signer.keyid
        return resign(self._store, verified, self._signer).changed

    def _tag(self, ref: AdapterRef, tag: str) -> bool:
        state = read_tag_state(self._store, ref, tag)
        if state is None or envelope_keyids(state.tag.envelope) == (self._signer.keyid,):
            return False
        self._require_alone(ref, tag, envelope_keyids(state.tag.envelope))
        verified = self._verify(ref)
        if state.statement.generation != verified.tag_generation:
            raise ConflictError(f"{ref} was moved meanwhile; run the command again.")
        self._require_newest(ref, state.statement)
        target = find_target(self._store, verified.ref)
        if target.record.manifest_bytes != verified.record.manifest_bytes:
            raise DigestMismatchError(f"{verified.ref} is not what {ref} was signed for; look at both.")
        if self._dry_run:
            return True
        return move_tag(
            self._store,
            ref,
            tag,
            target,
            [self._signer],
            now=utc_now(),
            expect=state.statement.generation,
            expires=state.statement.expires,
        ).moved

    def _require_newest(self, ref: AdapterRef, statement: TagStatement) -> None:
        """Refuse a tag older than one seen before, whatever time it was judged by."""
        mark = self._marks.seen(ref.tenant).marks.get(f"{ref.adapter}@{ref.tag}")
        if mark is None or statement.generation > mark.number:
            return
        if (statement.generation, statement.sha256) != (mark.number, mark.sha256):
            raise RollbackError(f"{ref} is older than it was seen before; look at the bucket's history.")

    def _require_alone(self, ref: AdapterRef, tag: str, keyids: tuple[str, ...]) -> None:
        """Refuse a tag that this key alone cannot sign."""
        needed = self._policy.rule_for(ref.tenant, ref.adapter).tag_rule(tag)
        if len(keyids) > 1 or needed.threshold > 1:
            raise ConflictError(f"{ref} needs several signatures; its signers must move it together.")
        if self._signer.keyid not in {trusted.key.keyid for trusted in needed.taggers or ()}:
            raise ConflictError(f"{ref} is moved with other keys; resign it with one of them.")

    def _verify(self, ref: AdapterRef) -> VerifiedManifest:
        try:
            return self._now.verify(ref)
        except ExpiredError:
            if self._then is None:
                raise
            return self._then.verify(ref)
