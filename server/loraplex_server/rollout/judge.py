"""Whether a canary does worse than the stable version: a window of each one's calls in, a reason out. Pure.

Two questions, each answered only when chance is an unlikely explanation (one side, 95%):

- failures: the lower end of the canary's failure rate (Wilson, "Probable inference, the law of succession, and
  statistical inference", 1927) is more than `error_rate_max` above the stable version's rate;
- latency: the lower end of the canary's median is more than `latency_ratio_max` times the upper end of the stable
  version's median, for the time to the first token or the time per token (ends of a median by order statistics:
  Conover, "Practical Nonparametric Statistics", section 3.2).
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

SAMPLES_MAX: Final = 1000
"""Most calls kept of one version; the oldest go first."""

_Z: Final = 1.6449  # 95% on one side


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much worse a canary may be.

    Attributes:
        window_s: seconds for which a call counts.
        requests_min: calls of the canary, and for latency of the stable version, before anything is said.
        error_rate_max: by which its rate of failed calls may be above the stable version's, 0 to 1.
        latency_ratio_max: how many times as slow it may be, 1 or more.
    """

    window_s: float = 300.0
    requests_min: int = 20
    error_rate_max: float = 0.05
    latency_ratio_max: float = 1.5


@dataclass(frozen=True)
class Sample:
    """One call that ended; times are seconds, None where it has none."""

    at_s: float
    failed: bool
    first_token_s: float | None = None
    token_s: float | None = None


@dataclass
class Window:
    """The newest calls of one version."""

    samples: "deque[Sample]" = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))

    def add(self, sample: Sample) -> None:
        """Count a call."""
        self.samples.append(sample)

    def forget(self, before_s: float) -> None:
        """Drop calls that ended before a moment."""
        while self.samples and self.samples[0].at_s < before_s:
            self.samples.popleft()

    @property
    def failed(self) -> int:
        """Calls that failed."""
        return sum(sample.failed for sample in self.samples)

    def first_tokens(self) -> list[float]:
        """Times to the first token in seconds, sorted."""
        return sorted(sample.first_token_s for sample in self.samples if sample.first_token_s is not None)

    def tokens(self) -> list[float]:
        """Times per token after the first in seconds, sorted."""
        return sorted(sample.token_s for sample in self.samples if sample.token_s is not None)


def verdict(stable: Window, canary: Window, limits: Limits) -> str:
    """Say in words why the canary has to go; "" when it may stay."""
    total = len(canary.samples)
    if total < limits.requests_min:
        return ""
    usual = stable.failed / len(stable.samples) if stable.samples else 0.0
    if wilson_low(canary.failed, total) > usual + limits.error_rate_max:
        return f"{canary.failed} of {total} calls failed, {usual:.1%} of the stable version's"
    return _slower(
        "time to the first token", stable.first_tokens(), canary.first_tokens(), limits
    ) or _slower("time per token", stable.tokens(), canary.tokens(), limits)


def _slower(what: str, stable: Sequence[float], canary: Sequence[float], limits: Limits) -> str:
    if min(len(stable), len(canary)) < limits.requests_min:
        return ""
    if median_low(canary) <= limits.latency_ratio_max * median_high(stable):
        return ""
    return f"median {what} is {median(canary):.4g} s, the stable version's {median(stable):.4g} s"


def wilson_low(failed: int, total: int) -> float:
    """Return the lower end of a rate's 95% interval on one side; `total` is 1 or more."""
    rate, z2 = failed / total, _Z * _Z
    middle = rate + z2 / (2 * total)
    spread = _Z * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total * total))
    return max(0.0, (middle - spread) / (1 + z2 / total))


def median(ordered: Sequence[float]) -> float:
    """Return the middle of sorted values, the lower one of two; 0 of none."""
    return ordered[(len(ordered) - 1) // 2] if ordered else 0.0


def median_low(ordered: Sequence[float]) -> float:
    """Return a value of sorted ones that their true median is below in at most 5 of 100 samples."""
    return ordered[_rank(len(ordered))]


def median_high(ordered: Sequence[float]) -> float:
    """Return a value of sorted ones that their true median is above in at most 5 of 100 samples."""
    return ordered[len(ordered) - 1 - _rank(len(ordered))]


def _rank(count: int) -> int:
    """Return the largest k with P(at most k of `count` fair coins show heads) <= 5%, 0 if there is none.

    `count` is at most SAMPLES_MAX, for which 0.5**count is still a number above 0.
    """
    rank, below, term = 0, 0.0, 0.5**count
    for heads in range(count):
        below += term
        if below > 0.05:
            break
        rank = heads
        term *= (count - heads) / (heads + 1)
    return rank
