"""Judging the statements about an adapter that other keys than its own sign: its tag, and its tenant's revocation list.

Each function makes checks of `verdict.verify`, in the order given there, and remembers in `marks` what it has seen.
"""

from __future__ import annotations

import datetime as dt
import hashlib

from ..errors import SignatureInvalidError, StaleRevocationError
from ..format.moments import parse_moment
from ..format.tags import PAYLOAD_TYPE as TAG_TYPE
from ..format.tags import TagObject, TagStatement
from ..refs import AdapterRef, Version
from ..signing import payload_unverified
from ..signing.quorum import signers_of
from . import checks
from .marks import REVOCATIONS, Mark, MemoryMarks
from .policy import Rule, TrustedKey, TrustPolicy, keys_of
from .revocations import RevocationList, RevocationObject, verify_revocations
from .steps import Steps, Trace


def verify_tag_move(
    ref: AdapterRef,
    tag: TagObject,
    *,
    policy: TrustPolicy,
    now: dt.datetime,
    revocations: RevocationObject | None = None,
    marks: MemoryMarks | None = None,
    trace: Trace | None = None,
) -> TagStatement:
    """Verify a tag's statement alone, and remember its generation: for tags that were removed, and before moving one.

    A removal has no version to `verify`, but must be seen, or the statement before it could be put back.

    Raises:
        PolicyRefusedError, ExpiredError, SignatureInvalidError, RevokedError, RollbackError: as `verify`.
    """
    steps = Steps(trace)
    with steps.check("scope"):
        rule = policy.rule_for(ref.tenant, ref.adapter)
    steps.begin(rule)
    check_clock(steps, ref.tenant, now, marks)
    listed = check_list(steps, rule, ref.tenant, revocations, now, marks)
    digest = "" if tag.record is None else tag.record.digest
    check_tag(steps, ref, tag, rule, now, listed, marks, (tag.statement.version, digest))
    return tag.statement


def require_unrevoked(
    ref: AdapterRef,
    digest: str | None,
    keyid: str,
    signed_at: dt.datetime,
    *,
    policy: TrustPolicy,
    now: dt.datetime,
    revocations: RevocationObject | None,
    marks: MemoryMarks | None = None,
) -> None:
    """Refuse a version that its tenant's list revokes, or whose key it does: before a tag is made to point to it.

    Nothing else is asked: whether the version may be used is up to the reader's policy, and to `verdict.verify`.

    Args:
        ref: the version, or the adapter of one that is yet to be made.
        digest: the version's, `sha256:…`; None of one that is yet to be made.
        keyid: the key that signed it.
        signed_at: when, by its own word.
        policy: the trust policy; an adapter it has no rule for is not refused here.
        now: the time, with its zone.
        revocations: the tenant's list as read from the store, unverified; None when it has none.
        marks: what was seen before.

    Raises:
        RevokedError: it is revoked.
        RollbackError: the list is older than one seen before, or gone.
        SignatureInvalidError, ExpiredError: the list is not to be believed, so that nobody knows.
    """
    if not policy.matching(ref.name):
        return
    steps, rule = Steps(None), policy.rule_for(ref.tenant, ref.adapter)
    steps.begin(rule)
    listed = check_list(steps, rule, ref.tenant, revocations, now, marks)
    checks.check_revoked(listed, digest, keyid, signed_at, what=str(ref) if digest else "")


def check_clock(steps: Steps, tenant: str, now: dt.datetime, marks: MemoryMarks | None) -> None:
    """Refuse a clock that stands before what was seen already."""
    if marks is None:
        steps.skip("nothing is remembered", "clock")
        return
    with steps.check("clock") as note:
        seen = marks.seen(tenant)
        seen.check_clock(now)
        note.detail = f"{now:%Y-%m-%dT%H:%M:%SZ}"


def check_list(
    steps: Steps,
    rule: Rule,
    tenant: str,
    found: RevocationObject | None,
    now: dt.datetime,
    marks: MemoryMarks | None,
) -> RevocationList | None:
    """Return the tenant's revocation list, verified; None when the rule lets nobody revoke or there is no list."""
    if not rule.revokers:
        steps.skip("the rule names no revokers", "revocation list")
        return None
    if found is None and marks is not None:
        # A list that was seen is never taken back, so its absence is a rollback like any other.
        with steps.check("revocation list", quiet=True):
            marks.seen(tenant).advanced(REVOCATIONS, Mark(0, "", ()), now, keys_of(rule.revokers))
    if found is None and rule.revocation is None:
        steps.skip("the tenant has no list and the rule demands none", "revocation list")
        return None
    listed = None
    with steps.check("revocation list", waivable=True) as note:
        if found is not None:
            listed = verify_revocations(found, tenant, rule.revokers, now=now, marks=marks)
            note.detail = f"serial {listed.serial}, issued {listed.issued}, {len(listed.entries)} entries"
        try:
            checks.check_fresh(listed, rule, tenant, now)
        except StaleRevocationError as error:
            if rule.revocation is None or rule.revocation.on_stale != "warn":
                raise
            steps.warnings.append(f"{error.code}: {error.message}")
            note.detail = f'stale, accepted by on_stale = "warn": {error.message}'
    return listed


def check_tag(
    steps: Steps,
    ref: AdapterRef,
    tag: TagObject | None,
    rule: Rule,
    now: dt.datetime,
    listed: RevocationList | None,
    marks: MemoryMarks | None,
    found: tuple[Version | None, str],
) -> int:
    """Check a tag's statement against what it led to, (version, digest), and return its generation."""
    if tag is None or ref.tag is None:
        raise SignatureInvalidError(f"{ref} was resolved without a tag statement; resolve it again.")
    # What is judged is what was signed: a statement that was handed over beside the envelope is not believed.
    payload, wanted = payload_unverified(tag.envelope), rule.tag_rule(ref.tag)
    statement = TagStatement.from_bytes(payload)
    issued = parse_moment(statement.issued)
    signers: tuple[TrustedKey, ...] = ()
    with steps.check("tag", waivable=True) as note:
        signers = signers_of(
            tag.envelope,
            TAG_TYPE,
            wanted.taggers or (),
            what=f"the tag {ref}, generation {statement.generation},",
            role="taggers",
            now=now,
            threshold=wanted.threshold,
            not_revoked=lambda keyid: None if listed is None else listed.check(None, keyid, issued),
        )
        note.detail = f"signed by {', '.join(map(str, signers))}; {wanted.threshold} needed"
    with steps.check("tag binding") as note:
        note.detail = checks.check_tag_binding(statement, ref, found)
    with steps.check("tag dates", waivable=True) as note:
        note.detail = checks.check_tag_dates(statement, ref, wanted, issued, now)
    if marks is None or not signers:
        steps.skip("nothing is remembered" if signers else "no signature counts", "generation")
    else:
        with steps.check("generation") as note:
            digest = hashlib.sha256(payload).hexdigest()
            mark = Mark(statement.generation, digest, tuple(item.key.keyid for item in signers))
            trusted = keys_of(wanted.taggers or ())
            marks.advance(ref.tenant, f"{ref.adapter}@{ref.tag}", mark, issued=issued, trusted=trusted)
            note.detail = f"{statement.generation}, not older than seen before"
    return statement.generation
