"""What a check of the registry reports: findings with a severity, and how much was looked at."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from ..errors import RegistryError, RevokedError, RollbackError

NOT_TRUSTED: Final = "not-trusted"
"""Code of a version that a reader would refuse."""

FINDINGS_MAX: Final = 10_000
"""Most findings a report holds; the counts go on."""

TOLD_MAX: Final = 200_000
"""Most tags whose generation by the audit log is compared with the tag; of further ones it is not looked at."""

Severity = Literal["damage", "warning", "note"]
"""damage: something acknowledged cannot be read or proven. warning: needs a hand. note: nothing to do."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: stable `code`, the `key` it is about, what is wrong, and what to do.

    `refusal` is the reason code a reader would get, such as SIGNATURE_INVALID; empty where nobody was asked.
    """

    severity: Severity
    code: str
    key: str
    reason: str
    advice: str = ""
    refusal: str = ""


def refused(what: str, key: str, error: RegistryError) -> Finding:
    """Return the finding that a reader would refuse a thing, and why.

    A bad signature and a rollback are damage; what a policy or a date forbids is a warning; a revoked version, which
    may well stay where it is, a note.

    Args:
        what: the finding's code.
        key: the object.
        error: the refusal.
    """
    severity: Severity = "damage" if error.exit_code == 5 or isinstance(error, RollbackError) else "warning"
    if what == NOT_TRUSTED and isinstance(error, RevokedError):
        severity = "note"
    return Finding(severity, what, key, error.message, "registry policy explain", error.code)


@dataclass
class Report:
    """Findings and counts of one check. Many threads may add to it."""

    findings: list[Finding] = field(default_factory=list)
    severities: dict[str, int] = field(default_factory=lambda: {"damage": 0, "warning": 0, "note": 0})
    counts: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, finding: Finding) -> None:
        """Take a finding."""
        with self._lock:
            self.severities[finding.severity] += 1
            if len(self.findings) < FINDINGS_MAX:
                self.findings.append(finding)

    def extend(self, findings: list[Finding]) -> None:
        """Take several findings."""
        for finding in findings:
            self.add(finding)

    def count(self, what: str, number: int = 1) -> None:
        """Count what was looked at."""
        with self._lock:
            self.counts[what] = self.counts.get(what, 0) + number

    @property
    def damaged(self) -> bool:
        """Whether there is any damage."""
        return self.severities["damage"] > 0

    def of(self, code: str) -> list[Finding]:
        """Return the findings with a code."""
        return [finding for finding in self.findings if finding.code == code]

    def to_value(self) -> dict[str, Any]:
        """Return the JSON form, the worst first."""
        order = {"damage": 0, "warning": 1, "note": 2}
        ranked = sorted(
            self.findings, key=lambda finding: (order[finding.severity], finding.key, finding.code)
        )
        return {
            "damaged": self.damaged,
            "severities": dict(self.severities),
            "counts": dict(sorted(self.counts.items())),
            "findings": [asdict(finding) for finding in ranked],
        }
