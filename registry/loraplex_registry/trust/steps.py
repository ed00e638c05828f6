"""How a verdict is reached step by step: each check is reported as it is made, and audit mode lets some refusals pass.

With `mode = "audit"` the refusals that only say *who* may do *what* (`WAIVED`) become warnings of the result, where the
check says that it is one of those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final, Protocol

from ..errors import ExpiredError, PolicyRefusedError, RankTooLargeError, RegistryError, SignatureInvalidError
from .policy import Rule

WAIVED: Final = (SignatureInvalidError, ExpiredError, PolicyRefusedError, RankTooLargeError)
"""Refusals that audit mode turns into warnings, where the check is one of who may do what."""


class Trace(Protocol):
    """Is told of every check as it is made: its name, `ok`, `FAILED`, `waived` or `skipped`, and why."""

    def __call__(self, check: str, outcome: str, detail: str) -> None:
        """Take note."""


class Note:
    """What a check has to say about its success."""

    def __init__(self) -> None:
        self.detail = ""
        self.outcome = "ok"


class Steps:
    """Reports each check, and turns refusals into warnings where the mode and the check allow it."""

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace
        self._audit = False
        self.warnings: list[str] = []

    def begin(self, rule: Rule) -> None:
        """Take the mode from the rule that decides."""
        self._audit = rule.mode == "audit"
        if self._audit:
            self.warnings.append(
                f"The policy rule {rule.scope!r} is in audit mode: its demands are not enforced."
            )

    @contextlib.contextmanager
    def check(self, name: str, *, waivable: bool = False, quiet: bool = False) -> Iterator[Note]:
        """Make one check; the block raises to refuse. A quiet one tells of a refusal only."""
        note = Note()
        try:
            yield note
        except RegistryError as error:
            waive = waivable and self._audit and isinstance(error, WAIVED)
            self._tell(name, "waived" if waive else "FAILED", f"{error.code}: {error.message}")
            if not waive:
                raise
            self.warnings.append(f"{error.code}: {error.message}")
        else:
            if not quiet:
                self._tell(name, note.outcome, note.detail)

    def skip(self, why: str, *names: str) -> None:
        """Report checks that do not apply."""
        for name in names:
            self._tell(name, "skipped", why)

    def _tell(self, name: str, outcome: str, detail: str) -> None:
        if self._trace is not None:
            self._trace(name, outcome, detail)
