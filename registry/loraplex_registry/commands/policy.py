"""`registry policy`: look at the trust policy, and ask it why."""

from __future__ import annotations

import argparse
import stat
from pathlib import Path

from ..errors import PolicyRefusedError
from ..registry import utc_now
from ..trust.explain import explain
from ..trust.marks import FrozenMarks
from ..trust.policy import TrustPolicy
from ..trust.policy_lint import Finding, lint, lint_list
from ..validation.base import CARD_NAME, BaseModel
from .options import REFERENCE_HELP, common_options
from .session import Result, Session

GROUP = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        parents=[common_options()],
        help="load the policy and every key, and say what is probably not meant",
    )
    check.add_argument("--strict", action="store_true", help="exit 6 when there is an error or a warning")
    check.add_argument(
        "--lists",
        action="store_true",
        help="also look at the revocation list of each tenant in the registry: who signed it, and for how long that "
        "counts",
    )
    told = actions.add_parser(
        "explain", parents=[common_options()], help="print the rule that decides, and every check in order"
    )
    told.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    told.add_argument("--base", metavar="DIR", help="the base model that would serve it; default any")


def run(session: Session) -> Result:
    """Check or explain."""
    return _check(session) if session.arguments.action == "check" else _explain(session)


def _check(session: Session) -> Result:
    path = Path(session.settings.require("policy", option="--policy"))
    policy = TrustPolicy.load(path)
    findings = lint(policy, now=utc_now()) + _file_mode(path)
    if session.arguments.lists:
        findings = list_findings(session, policy) + findings
    serious = [finding for finding in findings if finding.level != "note"]
    if serious and session.arguments.strict:
        raise PolicyRefusedError(
            f"{path}: {len(serious)} findings; the first is {serious[0].scope}: {serious[0].sentence}"
        )
    result = {
        "policy": str(path),
        "digest": policy.digest,
        "rules": len(policy.rules),
        "findings": [
            {"level": item.level, "scope": item.scope, "message": item.sentence} for item in findings
        ],
    }
    return result, [
        f"{path}  {len(policy.rules)} rules  {policy.digest}",
        *(f"  {item}" for item in findings),
    ]


def list_findings(session: Session, policy: TrustPolicy) -> list[Finding]:
    """Return what is wrong, or soon will be, with how the tenants' revocation lists are signed: one request each."""
    registry, now = session.registry(), utc_now()
    scopes = {rule.scope.partition("/")[0] for rule in policy.rules if rule.revokers}
    tenants = registry.tenants() if "**" in scopes else sorted(scopes)
    return [
        finding
        for tenant in tenants
        for finding in lint_list(policy, tenant, registry.revocations(tenant), now=now)
    ]


def _file_mode(path: Path) -> list[Finding]:
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return [Finding("warning", "(policy)", f"{path} can be written by others than its owner.")]
    return []


def _explain(session: Session) -> Result:
    registry = session.registry()
    named = session.arguments.base
    base = None if named is None else BaseModel.load(_card(Path(named))).digest
    found = explain(
        registry,
        session.policy(),
        session.ref(session.arguments.ref),
        marks=FrozenMarks(session.marks(registry)),
        base_digest=base,
    )
    return found.to_value(), found.lines()


def _card(place: Path) -> Path:
    return place / CARD_NAME if (place / CARD_NAME).is_file() else place
