"""Every check of a load without a load, and what one would need: for `ValidateAdapter`.

Promises: the verdict is the one that a load would end with now, short of the engine's own; the bytes are really fetched
and looked at, and stay in the cache on disk, where a load finds them; nothing enters memory or the engine, nothing
leaves them; what a caller may not see is not examined. Checks are those of the trust policy (`trust.verdict.CHECKS`)
and then "weights": the signed digests, the shapes against the base, rank and size against this server's limits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loraplex_registry.errors import AdapterNotFoundError, RegistryError, StoreError
from loraplex_registry.refs import AdapterRef
from loraplex_registry.trust.verdict import CHECKS
from loraplex_registry.validation.base import BaseModel
from loraplex_server.adapters.residency import Residency, State
from loraplex_server.adapters.versions import AdapterVersion, Versions

WEIGHTS: Final = "weights"
PASSED, FAILED, NOT_MADE = "passed", "failed", "not made"
_NAMES: Final = (*CHECKS, WEIGHTS)
_OUTCOMES: Final[Mapping[str, str]] = {"ok": PASSED, "waived": PASSED, "skipped": PASSED, "FAILED": FAILED}


@dataclass(frozen=True)
class Check:
    """One check; `reason` is the code of the error where it failed, and `detail` says more."""

    name: str
    outcome: str
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        checks: all of them, in their order.
        version: None where a check of the policy failed.
        rank: of the adapter; 0 where the weights were not looked at.
        size_bytes: of its weights file; 0 likewise.
    """

    checks: tuple[Check, ...]
    version: AdapterVersion | None = None
    rank: int = 0
    size_bytes: int = 0

    @property
    def valid(self) -> bool:
        """Whether a load would do."""
        return all(check.outcome == PASSED for check in self.checks)


async def examine(versions: Versions, ref: AdapterRef) -> Report:
    """Make every check of an adapter that the caller may see.

    Raises:
        AdapterNotFoundError: nothing answers to the reference.
        StoreError: the storage, which says nothing about the adapter.
    """
    made: list[Check] = []

    def note(check: str, outcome: str, detail: str) -> None:
        reason, _, why = detail.partition(": ") if outcome == "FAILED" else ("", "", detail)
        made.append(Check(check, _OUTCOMES[outcome], reason, why))

    try:
        version = await versions.verify(ref, note)
    except (AdapterNotFoundError, StoreError):
        raise
    except RegistryError as error:
        if not any(
            check.outcome == FAILED for check in made
        ):  # what the next check would have looked at is damaged
            made.append(Check(_next(made), FAILED, error.code, str(error)))
        return Report(_all(made))
    try:
        staged = await versions.try_out(version)
    except StoreError:
        raise
    except RegistryError as error:
        made.append(Check(WEIGHTS, FAILED, error.code, str(error)))
        return Report(_all(made), version)
    made.append(Check(WEIGHTS, PASSED))
    return Report(_all(made), version, staged.rank, staged.size_bytes)


def _next(made: list[Check]) -> str:
    names = {check.name for check in made}
    return next(name for name in _NAMES if name not in names)


def _all(made: list[Check]) -> tuple[Check, ...]:
    """Put all checks into their order, those that were not made among them."""
    done = {check.name: check for check in made}
    return tuple(done.get(name, Check(name, NOT_MADE)) for name in _NAMES)


@dataclass(frozen=True)
class Forecast:
    """See LoadForecast in adapters.proto."""

    staged_bytes: int
    slot_bytes: int
    slot_at_once: bool
    evicts: bool


def forecast(residency: Residency, report: Report, *, slot_bytes: int) -> Forecast:
    """Say what a load would need now.

    Args:
        residency: what is in the engine.
        report: of `examine`.
        slot_bytes: of one slot of this engine.
    """
    status = residency.status(report.version.digest) if report.version else None
    there = status is not None and status.state in (State.LOADING, State.RESIDENT)
    free = residency.slots_used < residency.slots_total
    idle = any(
        one.state is State.RESIDENT and not one.pinned and not one.active_requests
        for one in residency.statuses()
    )
    return Forecast(
        staged_bytes=report.size_bytes,
        slot_bytes=slot_bytes,
        slot_at_once=there or free or idle,
        evicts=not there and not free,
    )


def slot_bytes(base: BaseModel, *, rank: int, element_bytes: int, embeddings: bool) -> int:
    """Return the bytes of one slot: for each layer its A of rank x in and its B of out x rank, as vLLM reserves them.

    Args:
        base: names and shapes of the layers.
        rank: of the slots, whatever the adapters' are.
        element_bytes: of one weight, such as 2 for bfloat16.
        embeddings: whether embedding and output layer have slots too.
    """
    shapes = [shape for shape in base.layers.values() if embeddings or base.vocab_size not in shape]
    return sum(inner + outer for inner, outer in shapes) * rank * element_bytes
