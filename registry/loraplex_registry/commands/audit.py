"""`registry audit`: what was done to a tenant's adapters, by which key, and proof that nobody rewrote it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..errors import DamagedError
from ..lifecycle.audit import AuditEntry, AuditLog, reconcile
from ..refs import AdapterRef
from ..registry import Registry
from ..signing import PublicKey
from ..trust.verdict import TrustPolicy
from .options import common_options
from .session import Result, Session

GROUP = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    log = actions.add_parser("log", parents=[common_options()], help="print the entries, oldest first")
    log.add_argument("tenant", metavar="TENANT", nargs="?", help="default: the tenant of the settings")
    log.add_argument("--after", type=int, default=0, metavar="N", help="only entries behind number N")
    verify = actions.add_parser(
        "verify", parents=[common_options()], help="check numbers, chain and signatures of the whole log"
    )
    verify.add_argument("tenant", metavar="TENANT", nargs="?", help="default: the tenant of the settings")
    verify.add_argument(
        "--expect",
        metavar="N:HASH",
        help="a number and hash printed by an earlier run, kept elsewhere: shows that the end was not cut off",
    )
    verify.add_argument(
        "--reconcile",
        action="store_true",
        help="also report versions and tags that the registry holds and the log does not tell of",
    )


def run(session: Session) -> Result:
    """Print or verify the log."""
    tenant = session.arguments.tenant or session.settings.require("tenant", option="TENANT")
    log = AuditLog(session.store(), tenant)
    return _log(session, log) if session.arguments.action == "log" else _verify(session, log, tenant)


def _log(session: Session, log: AuditLog) -> Result:
    entries = list(log.entries(after=session.arguments.after))
    lines = [f"{entry.number:>6}  {entry.at}  {entry.actor[:16]}…  {_what(entry)}" for entry in entries]
    return {"entries": [{**asdict(entry), "detail": dict(entry.detail)} for entry in entries]}, lines


def _verify(session: Session, log: AuditLog, tenant: str) -> Result:
    report = log.verify(_known_keys(session.policy(), tenant).get)
    findings = list(report.findings)
    if session.arguments.expect:
        findings += _cut(log, session.arguments.expect)
    if session.arguments.reconcile:
        findings += reconcile(log.entries(), _held(session.registry(), tenant))
    if findings:
        shown = "; ".join(findings[:5]) + ("" if len(findings) <= 5 else f"; and {len(findings) - 5} more")
        raise DamagedError(f"The audit log of {tenant} is not whole: {shown}.")
    result: dict[str, Any] = {"tenant": tenant, "entries": report.entries, "head": report.head}
    return result, [
        f"the audit log of {tenant} is whole: {report.entries} entries",
        f"  head    {report.entries}:{report.head}",
    ]


def _known_keys(policy: TrustPolicy, tenant: str) -> dict[str, PublicKey]:
    """Return every key the policy names for a tenant, whatever it may sign: an entry only says who did something."""
    known: dict[str, PublicKey] = {}
    for rule in policy.rules_of(tenant):
        of_tags = [item for _, tag in rule.tags for item in tag.taggers or ()]
        for item in (*rule.keys, *rule.taggers, *rule.revokers, *of_tags):
            known[item.key.keyid] = item.key
    return known


def _cut(log: AuditLog, expected: str) -> list[str]:
    """Say whether the entry an earlier run saw last is still there and the same."""
    number, _, digest = expected.partition(":")
    if not number.isdigit():
        return [f"--expect {expected[:80]!r} is not N:HASH as an earlier run printed it"]
    found = log.hash_of(int(number))
    if found == digest:
        return []
    return [f"entry {number} " + ("is gone" if found is None else "is another one than an earlier run saw")]


def _held(registry: Registry, tenant: str) -> Iterator[tuple[str, str]]:
    for adapter in registry.adapters(tenant):
        ref = AdapterRef(tenant, adapter)
        for state in registry.versions(ref):
            if state.state == "committed":
                yield "push", f"{ref.name}@{state.version}"
        for tag in registry.tags(ref):
            yield "tag", f"{ref.name}@{tag}"


def _what(entry: AuditEntry) -> str:
    detail = " ".join(f"{name}={text}" for name, text in entry.detail)
    return f"{entry.action} {entry.subject} {detail}".rstrip()
