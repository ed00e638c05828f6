"""What is probably not meant in a trust policy: found by reading it, without any adapter; and in a list beside it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..errors import TrustError
from ..signing import envelope_keyids
from .checks import check_fresh
from .policy import Rule, TagRule, TrustedKey, TrustPolicy
from .revocations import RevocationObject, verify_revocations

SOON_DAYS: Final = 30
"""Days before its end from which a key is reported."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`error`: the rule cannot work. `warning`: it can be attacked or will stop working. `note`: good to know."""

    level: str
    scope: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.level:<7}  {self.scope}: {self.sentence}"


def lint(policy: TrustPolicy, *, now: dt.datetime) -> list[Finding]:
    """Return what should be looked at, errors first.

    Args:
        policy: a loaded policy.
        now: the time to judge key dates by.
    """
    found = [finding for rule in policy.rules for finding in _rule(rule, policy, now)]
    if not policy.rules:
        found.append(Finding("warning", "(policy)", "there is no rule, so nothing is trusted."))
    found += _across_tenants(policy)
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _rule(rule: Rule, policy: TrustPolicy, now: dt.datetime) -> Iterator[Finding]:
    def finding(level: str, sentence: str) -> Finding:
        return Finding(level, rule.scope, sentence)

    if rule.mode == "audit":
        yield finding("warning", "mode is audit: whoever can write to the storage decides what is served.")
    if not rule.authorities and not _usable(rule.keys, now):
        yield finding("error", "no key that may sign adapters counts today, so nothing is accepted.")
    if not rule.revokers:
        yield finding("warning", "there are no revokers, so a stolen key or a bad version cannot be revoked.")
    elif rule.revocation is None:
        yield finding(
            "warning", "no revocation list is demanded, so whoever can write to the storage can withhold it."
        )
    if rule.scope == "**":
        yield finding("warning", "the scope covers every tenant; give each tenant a rule of its own.")
    for sentence in _key_dates(rule, now):
        yield finding("warning", sentence)
    for sentence in _roles(rule):
        yield finding("warning", sentence)
    for name, sentence in _tags(rule, now):
        yield finding("error", f"tag {name}: {sentence}")
    broader = policy.matching(rule.scope.rstrip("*") if rule.prefix is not None else rule.scope)
    for other in [item for item in broader if item is not rule and item.prefix is not None][:1]:
        for sentence in _weaker(rule, other):
            yield finding("warning", sentence)


def _usable(keys: tuple[TrustedKey, ...], now: dt.datetime) -> list[TrustedKey]:
    return [
        item
        for item in keys
        if (item.valid_from is None or now >= item.valid_from)
        and (item.valid_to is None or now < item.valid_to)
    ]


def _all_keys(rule: Rule) -> list[tuple[str, TrustedKey]]:
    """Return every key with its role; taggers that are there by default are not named twice."""
    found = [("keys", item) for item in rule.keys]
    if rule.taggers != rule.keys:
        found += [("taggers", item) for item in rule.taggers]
    for name, tag in rule.tags:
        found += [(f"taggers of {name}", item) for item in tag.taggers or ()]
    found += [("revokers", item) for item in rule.revokers]
    for attestation in rule.attestations:
        found += [("attestation keys", item) for item in attestation.keys]
    return found


def _key_dates(rule: Rule, now: dt.datetime) -> Iterator[str]:
    for role, item in _all_keys(rule):
        if item.valid_to is not None and now >= item.valid_to:
            yield f"key {item} of {role} has expired; remove it once nothing is signed with it any more."
        elif item.valid_to is not None and now >= item.valid_to - dt.timedelta(days=SOON_DAYS):
            yield f"key {item} of {role} expires within {SOON_DAYS} days; add its successor."
        if item.valid_from is not None and now < item.valid_from:
            yield f"key {item} of {role} does not count yet."


def _roles(rule: Rule) -> Iterator[str]:
    roles: dict[str, list[str]] = {}
    for role, item in _all_keys(rule):
        roles.setdefault(item.key.keyid, []).append(role.partition(" of ")[0])
    for keyid, names in roles.items():
        different = sorted(set(names))
        if len(different) > 1:
            yield f"key {keyid[:16]}… has the roles {' and '.join(different)}; whoever steals it has both."


def _tags(rule: Rule, now: dt.datetime) -> Iterator[tuple[str, str]]:
    if not rule.taggers and not all(tag.taggers for _, tag in rule.tags or (("", TagRule()),)):
        yield "*", "there are no taggers, so no tag is accepted."
    for name, _ in rule.tags:
        wanted = rule.tag_rule(name)
        usable = len(_usable(wanted.taggers or (), now))
        if usable < wanted.threshold:
            yield name, f"{wanted.threshold} signatures are needed and {usable} of its keys count today."


def _weaker(rule: Rule, broader: Rule) -> Iterator[str]:
    """A narrow rule decides alone: what the broader one demands is lost unless it is repeated."""
    lost = []
    if rule.encryption != broader.encryption and broader.encryption != "optional":
        lost.append(f'encryption = "{broader.encryption}"')
    if broader.revokers and not rule.revokers:
        lost.append("revokers")
    if broader.revocation is not None and rule.revocation is None:
        lost.append("revocation")
    if broader.attestations and not rule.attestations:
        lost.append("attestations")
    for name in ("max_rank", "max_bytes", "bases", "min_version"):
        if getattr(broader.limits, name) is not None and getattr(rule.limits, name) is None:
            lost.append(f"limits.{name}")
    tags = dict(rule.tags)
    lost += [
        f"tags.{name}" for name, tag in broader.tags if tag.threshold > tags.get(name, TagRule()).threshold
    ]
    if lost:
        yield f"it decides instead of {broader.scope!r} and drops what that demands: {', '.join(lost)}."


def _across_tenants(policy: TrustPolicy) -> Iterator[Finding]:
    tenants: dict[str, set[str]] = {}
    for rule in policy.rules:
        for _, item in _all_keys(rule):
            tenants.setdefault(item.key.keyid, set()).add(rule.scope.partition("/")[0])
    for keyid, names in tenants.items():
        if len(names) > 1:
            shown = ", ".join(sorted(names)[:4])
            yield Finding("note", "(policy)", f"key {keyid[:16]}… counts for {len(names)} tenants: {shown}.")


def lint_list(
    policy: TrustPolicy, tenant: str, found: RevocationObject | None, *, now: dt.datetime
) -> list[Finding]:
    """Return what is wrong, or will be, with how a tenant's revocation list is signed: rules refuse such a list.

    Args:
        policy: a loaded policy.
        tenant: whose list.
        found: as read from the store, unverified; None when there is none.
        now: the time to judge by.
    """
    findings = []
    for rule in policy.rules_of(tenant):
        if rule.revokers and (found is not None or rule.revocation is not None):
            level, sentence = _list_fault(rule, tenant, found, now)
            if sentence:
                findings.append(Finding(level, rule.scope, sentence))
    return findings


def _list_fault(rule: Rule, tenant: str, found: RevocationObject | None, now: dt.datetime) -> tuple[str, str]:
    """Return the level and what a rule has against a list; an empty sentence when it has nothing."""
    try:
        listed = None if found is None else verify_revocations(found, tenant, rule.revokers, now=now)
        check_fresh(listed, rule, tenant, now)
    except TrustError as error:
        return "error", f"nothing of tenant {tenant} is accepted. {error.message}"
    keyids = () if found is None else envelope_keyids(found.envelope)
    ends = [item.valid_to for item in rule.revokers if item.key.keyid in keyids]
    last = max((end for end in ends if end is not None), default=None)
    if last is None or None in ends:
        return "", ""
    return "warning", (
        f"the revocation list of tenant {tenant} is signed by a key that counts until {last:%Y-%m-%d %H:%M} UTC; "
        f"sign it with another revoker's before: `registry resign {tenant}` or `registry revoke --refresh {tenant}`."
    )
