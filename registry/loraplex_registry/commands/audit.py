"""`registry audit`: what was done to a tenant's adapters, by which key, and proof that nobody rewrote it.

`verify` tells three things apart: the log was tampered with (DIGEST_MISMATCH, exit code 8); it is whole, but has
entries of keys that the policy does not list (SIGNATURE_INVALID, 5), or of keys outside their dates (EXPIRED, 6). A key
that is retired now is judged by the time of its entries.
"""

from __future__ import annotations

import argparse
import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import DamagedError, ExpiredError, SignatureInvalidError
from ..lifecycle.audit import AuditLog
from ..lifecycle.audit_check import reconcile
from ..lifecycle.audit_entry import AuditEntry
from ..refs import AdapterRef
from ..registry import Registry
from ..trust.policy import TrustedKey, TrustPolicy
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
    known = _known_keys(session.policy(), tenant)
    report = log.verify(
        lambda keyid: known[keyid][0].key if keyid in known else None,
        dates=lambda keyid, at: _require_counted(known[keyid], at),
    )
    findings = list(report.findings)
    if session.arguments.expect:
        findings += _cut(log, session.arguments.expect)
    if session.arguments.reconcile:
        findings += reconcile(log.entries(), _held(session.registry(), tenant))
    if findings:
        raise DamagedError(f"The audit log of {tenant} is not whole: {_shown(findings)}.")
    if report.unknown:
        raise SignatureInvalidError(
            f"No entry of the audit log of {tenant} is missing or altered, but the policy does not list who signed "
            f"some: {_shown(report.unknown)}. Was it a key of yours, put its entry with its `to` date back "
            "into the policy that this command uses."
        )
    if report.outdated:
        raise ExpiredError(
            f"No entry of the audit log of {tenant} is missing or altered, but some are signed by keys that did not "
            f"count then: {_shown(report.outdated).rstrip('.')}. Ask who used them."
        )
    result: dict[str, Any] = {"tenant": tenant, "entries": report.entries, "head": report.head}
    return result, [
        f"the audit log of {tenant} is whole: {report.entries} entries",
        f"  head    {report.entries}:{report.head}",
    ]


def _shown(findings: Sequence[str]) -> str:
    return "; ".join(findings[:5]) + ("" if len(findings) <= 5 else f"; and {len(findings) - 5} more")


def _known_keys(policy: TrustPolicy, tenant: str) -> dict[str, list[TrustedKey]]:
    """Return every key the policy names for a tenant, whatever it may sign: an entry only says who did something."""
    known: dict[str, list[TrustedKey]] = {}
    for rule in policy.rules_of(tenant):
        others = [item for _, tag in rule.tags for item in tag.taggers or ()]
        others += [item for attestation in rule.attestations for item in attestation.keys]
        for item in (*rule.keys, *rule.taggers, *rule.revokers, *others):
            known.setdefault(item.key.keyid, []).append(item)
    return known


def _require_counted(entries: Sequence[TrustedKey], at: dt.datetime) -> None:
    """Raise ExpiredError unless one of a key's entries in the policy counts at a time."""
    refusals = []
    for item in entries:
        try:
            item.check(at)
        except ExpiredError as error:
            refusals.append(error)
        else:
            return
    raise ExpiredError(refusals[0].message.partition(";")[0])


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
