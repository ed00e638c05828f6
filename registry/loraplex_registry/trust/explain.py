"""Why an adapter is trusted or not: the checks of `trust.verify` themselves, written down as they are made.

There is no second implementation that could disagree: the same function runs with a recorder, against marks that
remember nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import RegistryError
from ..refs import AdapterRef
from ..registry import Registry
from .marks import MemoryMarks
from .policy import Rule, TrustedKey, TrustPolicy
from .verdict import CHECKS
from .verifier import Verifier


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check: `ok`, `FAILED`, `waived` (audit mode), `skipped` (does not apply) or `not reached`, and why."""

    check: str
    outcome: str
    detail: str


@dataclass(slots=True)
class Explanation:
    """What `explain` found out.

    Attributes:
        ref: what was asked.
        policy_digest: names the policy file's bytes.
        rule: the rule that decided, None when none covers the adapter.
        also: scopes that match too and do not count, the closest first.
        checks: every check in the order of `trust.CHECKS`.
        trusted: the verdict.
        code, message: why not; empty when trusted.
        warnings: of a trusted version: audit mode and what it let pass.
    """

    ref: AdapterRef
    policy_digest: str
    rule: Rule | None = None
    also: tuple[str, ...] = ()
    checks: list[CheckResult] = field(default_factory=list)
    trusted: bool = False
    code: str = ""
    message: str = ""
    warnings: tuple[str, ...] = ()

    def note(self, check: str, outcome: str, detail: str) -> None:
        """Take note of a check: the recorder that `trust.verify` calls."""
        self.checks.append(CheckResult(check, outcome, detail))

    def to_value(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "ref": str(self.ref),
            "trusted": self.trusted,
            "code": self.code or None,
            "message": self.message or None,
            "policy": self.policy_digest,
            "rule": None if self.rule is None else _rule_value(self.rule),
            "also_matching": list(self.also),
            "checks": [
                {"check": item.check, "outcome": item.outcome, "detail": item.detail} for item in self.checks
            ],
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """Return the lines for people."""
        wide = max(map(len, CHECKS))
        head = [f"{self.ref}  {'trusted' if self.trusted else f'REFUSED {self.code}'}"]
        if self.rule is not None:
            head += [f"  {line}" for line in _rule_lines(self.rule, self.also)]
        checks = [
            f"  {item.outcome:<11}  {item.check:<{wide}}  {item.detail}".rstrip() for item in self.checks
        ]
        return [*head, *checks, *(f"  warning: {warning}" for warning in self.warnings)]


def explain(
    registry: Registry,
    policy: TrustPolicy,
    ref: AdapterRef,
    *,
    marks: MemoryMarks | None = None,
    base_digest: str | None = None,
) -> Explanation:
    """Verify a reference as a server would and return every step of it. Nothing is remembered or changed.

    Args:
        registry: where it is.
        policy: the trust policy.
        ref: what is asked.
        marks: what was seen before; pass `FrozenMarks`.
        base_digest: the base that would serve it, None for any.

    Raises:
        AdapterNotFoundError: nothing answers to the reference.
        StoreUnavailableError, StoreRefusedError, DamagedError: it could not be read.
    """
    resolved = registry.resolve(ref)
    matching = policy.matching(ref.name)
    found = Explanation(
        ref, policy.digest, matching[0] if matching else None, tuple(rule.scope for rule in matching[1:])
    )
    verifier = Verifier(registry, policy, marks=marks, refresh_s=0)
    try:
        verified = verifier.decide(resolved, base_digest=base_digest, trace=found.note)
    except RegistryError as error:
        found.code, found.message = error.code, error.message
    else:
        found.trusted, found.warnings = True, verified.warnings
    reached = {item.check for item in found.checks}
    found.checks += [CheckResult(name, "not reached", "") for name in CHECKS if name not in reached]
    return found


def _rule_value(rule: Rule) -> dict[str, Any]:
    return {
        "scope": rule.scope,
        "mode": rule.mode,
        "keys": [_key_value(item) for item in rule.keys],
        "authorities": [str(item) for item in rule.authorities],
        "taggers": [_key_value(item) for item in rule.taggers],
        "revokers": [_key_value(item) for item in rule.revokers],
        "encryption": rule.encryption,
        "attestations": [item.type for item in rule.attestations],
    }


def _key_value(item: TrustedKey) -> dict[str, Any]:
    return {
        "keyid": item.key.keyid,
        "path": item.path,
        "algorithm": item.key.algorithm,
        "from": None if item.valid_from is None else item.valid_from.isoformat(),
        "to": None if item.valid_to is None else item.valid_to.isoformat(),
    }


def _rule_lines(rule: Rule, also: tuple[str, ...]) -> list[str]:
    lines = [f"rule      {rule.scope!r}, mode {rule.mode}"]
    if also:
        lines.append(f"          also matching, not counting: {', '.join(map(repr, also))}")
    for role, keys in (("keys", rule.keys), ("taggers", rule.taggers), ("revokers", rule.revokers)):
        lines += [f"{role:<9} {item}" for item in keys]
    return lines + [f"{'signer':<9} {item}" for item in rule.authorities]
