"""What a probe says about a storage: its checks, as they are shown and as a root's marker keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..format.canonical import StrictJsonError, exact_object


@dataclass(frozen=True, slots=True)
class Check:
    """One promise.

    Attributes:
        name: stable, kebab-case.
        ok: the storage keeps it.
        detail: one sentence; of a failure it names the missing condition.
        required: without it the registry must not write.
    """

    name: str
    ok: bool
    detail: str
    required: bool = True


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a probe found."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every required check is good."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The required checks that are not."""
        return tuple(check for check in self.checks if check.required and not check.ok)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the checks as they stand in the root's marker."""
        return [
            {"name": check.name, "ok": check.ok, "required": check.required, "detail": check.detail}
            for check in self.checks
        ]

    @classmethod
    def from_json(cls, value: object) -> ProbeReport:
        """Read what `to_json` returned.

        Raises:
            StrictJsonError: it is something else.
        """
        if not isinstance(value, list):
            raise StrictJsonError("the probe has values of a wrong kind")
        return cls(tuple(map(_check, value)))

    def says_the_same(self, other: ProbeReport) -> bool:
        """Say whether two reports have the same verdicts; the sentences hold measurements."""
        return [(check.name, check.ok) for check in self.checks] == [
            (check.name, check.ok) for check in other.checks
        ]


def _check(value: object) -> Check:
    fields = exact_object(value, frozenset({"name", "ok", "required", "detail"}))
    if not (isinstance(fields["ok"], bool) and isinstance(fields["required"], bool)):
        raise StrictJsonError("a check has values of a wrong kind")
    if not (isinstance(fields["name"], str) and isinstance(fields["detail"], str)):
        raise StrictJsonError("a check has values of a wrong kind")
    return Check(fields["name"], fields["ok"], fields["detail"], fields["required"])
