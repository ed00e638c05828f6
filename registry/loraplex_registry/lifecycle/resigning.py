"""Signing again with another key what was signed before: the second half of rotating a key.

Nothing is signed that the policy does not trust: every version and tag is verified first, and a rule in audit mode,
which vouches for nothing, stops it all. Tags come before versions: a tag carries a copy of its version's record, and
the copy's signature must still count at the time the tag's is judged by.

The tenant's revocation list belongs to it: readers refuse everything of a tenant whose list is signed by a key that
counts no longer. It is verified, signed again with the same entries, and only where that makes no reader refuse it who
believed it before. How the rest is judged does not depend on whether that was done yet.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..errors import (
    AdapterNotFoundError,
    ConflictError,
    DigestMismatchError,
    ExpiredError,
    PolicyRefusedError,
    RankTooLargeError,
    TrustError,
)
from ..format.record import CommittedRecord
from ..refs import AdapterRef, version_order
from ..registry import Registry, utc_now
from ..signing import Signer, envelope_keyids
from ..storage.store import Store
from ..trust.marks import FrozenMarks, MemoryMarks
from ..trust.policy import TrustedKey, TrustPolicy, keys_of
from ..trust.revocations import poll
from ..trust.revoking import append, require_extendable
from ..trust.verdict import VerifiedManifest
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


@dataclass(frozen=True, slots=True)
class ResignedList:
    """What became of a tenant's revocation list, as `Resigned`; `serial` is the one it has now."""

    tenant: str
    outcome: str
    serial: int
    code: str = ""
    reason: str = ""


class Resigner:
    """Signs the versions and tags of one adapter after another, and revocation lists.

    Args:
        store: where they are.
        policy: decides what is trusted.
        signer: the key that is to sign.
        marks: what was seen before; an older tag or list that was put back is not signed.
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
        self._as_of = as_of
        self._dry_run = dry_run
        self._marks = MemoryMarks() if marks is None else marks
        registry, widened = Registry(store), _with_past_revokers(policy, as_of)
        self._now = Verifier(registry, widened, marks=self._marks)
        self._then = None
        if as_of is not None:
            self._then = Verifier(registry, widened, marks=self._marks, as_of=as_of)

    def revocations(self, tenant: str) -> ResignedList | None:
        """Sign a tenant's revocation list again; None when there is none, or the policy believes none.

        Raises:
            StoreUnavailableError, StoreRefusedError: the storage.
        """
        listed = {item.key.keyid: item for rule in self._policy.rules_of(tenant) for item in rule.revokers}
        current = poll(self._store, tenant) if listed else None
        if current is None:
            return None
        serial, keyids = current.statement.serial, envelope_keyids(current.envelope)
        now, revokers = utc_now(), list(listed.values())
        # Where adapters and revocations are signed by different people, the list is not this key's business.
        of_others = self._signer.keyid not in listed and _any_counts(keyids, revokers, now)
        if of_others or self._signer.keyid in keyids:
            return ResignedList(tenant, UNCHANGED, serial)
        accept = _counted(revokers, self._as_of)
        try:
            self._require_no_loss(tenant, keyids, now)
            if self._dry_run:
                require_extendable(
                    current,
                    tenant,
                    self._signer,
                    revokers=revokers,
                    accept=accept,
                    now=now,
                    marks=FrozenMarks(self._marks),
                )
                return ResignedList(tenant, RESIGNED, serial)
            made, _ = append(
                self._store,
                tenant,
                [],
                self._signer,
                revokers=revokers,
                accept=accept,
                now=now,
                marks=self._marks,
                refresh=True,
                keep_lifetime=True,
            )
        except (TrustError, ConflictError) as error:
            return ResignedList(tenant, LEFT, serial, error.code, error.message)
        return ResignedList(tenant, RESIGNED, made.statement.serial)

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

    def _require_no_loss(self, tenant: str, keyids: tuple[str, ...], now: dt.datetime) -> None:
        """Refuse to sign a list so that a rule which believes it now would not any more."""
        for rule in self._policy.rules_of(tenant):
            if _any_counts(keyids, rule.revokers, now) and self._signer.keyid not in keys_of(rule.revokers):
                raise PolicyRefusedError(
                    f"The policy rule {rule.scope!r} believes the revocation list of tenant {tenant} as it is signed, "
                    "and does not list this key among its revokers; add it there first."
                )

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


def _counts(key: TrustedKey, moment: dt.datetime) -> bool:
    try:
        key.check(moment)
    except ExpiredError:
        return False
    return True


def _any_counts(keyids: Sequence[str], keys: Sequence[TrustedKey], moment: dt.datetime) -> bool:
    return any(item.key.keyid in keyids and _counts(item, moment) for item in keys)


def _counted(keys: Sequence[TrustedKey], as_of: dt.datetime | None) -> list[TrustedKey]:
    """Return the keys that counted at a time, without their dates: what they signed then is believed."""
    if as_of is None:
        return []
    return [replace(item, valid_from=None, valid_to=None) for item in keys if _counts(item, as_of)]


def _with_past_revokers(policy: TrustPolicy, as_of: dt.datetime | None) -> TrustPolicy:
    """Return a policy that also believes the lists of revokers who counted at a time."""
    if as_of is None:
        return policy
    rules = []
    for rule in policy.rules:
        past = _counted(rule.revokers, as_of)
        rest = [item for item in rule.revokers if item.key.keyid not in keys_of(past)]
        rules.append(replace(rule, revokers=(*past, *rest)))
    return TrustPolicy(tuple(rules), policy.digest)
