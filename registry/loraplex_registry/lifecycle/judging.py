"""Judging what a check of a registry comes upon as a reader under a trust policy would: versions, tags, lists.

What was seen before counts, and nothing is remembered: a check changes no marks.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

from ..format.record import CommittedRecord
from ..format.tags import TagObject
from ..refs import AdapterRef
from ..registry import Registry, Resolved, utc_now
from ..trust.checks import check_fresh
from ..trust.marks import FrozenMarks, MemoryMarks
from ..trust.policy import TrustPolicy
from ..trust.revocations import RevocationObject, verify_revocations
from ..trust.statements import verify_tag_move
from ..trust.verifier import Verifier


class PolicyJudge:
    """Raises the refusal that a reader would meet. May be shared between threads.

    Args:
        registry: where revocation lists are fetched from, each once a minute at most.
        policy: the trust policy.
        marks: what was seen before.
        now: the time of day, with its zone.
    """

    def __init__(
        self,
        registry: Registry,
        policy: TrustPolicy,
        *,
        marks: MemoryMarks,
        now: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        self._policy = policy
        self._marks = FrozenMarks(marks)
        self._now = now
        self._verifier = Verifier(registry, policy, marks=self._marks, now=now)

    def version(self, ref: AdapterRef, record: CommittedRecord) -> None:
        """Judge a version, `ref`, by its own record.

        Raises:
            TrustError, RankTooLargeError: as `Verifier.decide`.
        """
        assert ref.version is not None
        self._verifier.decide(Resolved(ref, ref.version, record.digest, record))

    def tag(self, ref: AdapterRef, tag: TagObject) -> None:
        """Judge a tag, `ref`, and what it would make a reader use: its copy of the record. Removed ones too.

        Raises:
            TrustError, RankTooLargeError: as `Verifier.decide`.
        """
        if tag.record is None or tag.statement.version is None:
            self.statement(ref, tag)
            return
        self._verifier.decide(Resolved(ref, tag.statement.version, tag.record.digest, tag.record, tag))

    def statement(self, ref: AdapterRef, tag: TagObject) -> None:
        """Judge a tag's statement alone, whatever has become of its version.

        Raises:
            TrustError: as `verify_tag_move`.
        """
        verify_tag_move(
            ref,
            tag,
            policy=self._policy,
            now=self._now(),
            revocations=self._verifier.revocations(ref.tenant),
            marks=self._marks,
        )

    def revocations(self, tenant: str, found: RevocationObject) -> None:
        """Judge a tenant's revocation list by every rule that names revokers.

        Raises:
            TrustError: as `verify_revocations`, and a list that is too old for a rule.
        """
        for rule in self._policy.rules_of(tenant):
            if rule.revokers:
                listed = verify_revocations(found, tenant, rule.revokers, now=self._now(), marks=self._marks)
                check_fresh(listed, rule, tenant, self._now())
