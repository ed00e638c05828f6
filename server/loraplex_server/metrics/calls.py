"""What is counted of every generation, once for its tenant and once for its adapter.

The labels are found once per call; a chunk of tokens then costs a search among the bucket bounds and a few additions.
"""

from bisect import bisect_left
from collections import Counter
from typing import Final

from loraplex_server.metrics.bounded import Bounded, Layout

# From one fast token to a long answer on a slow machine, in seconds.
TOKEN_BUCKETS: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10,
)  # fmt: skip
FIRST_TOKEN_BUCKETS: Final = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300, 600,
)  # fmt: skip

OUTCOMES: Final = ("completed", "failed", "cancelled", "expired")
BASE: Final = "base"
"""Label of calls of the base model alone. Adapters are called tenant/adapter, so none is called like this."""
UNRESOLVED: Final = "unresolved"
"""Label of calls that ended before it was known which adapter they may use."""

# Places in a `Series`. The counters of outcomes come first, in the order of OUTCOMES.
PROMPT_TOKENS, CACHED_TOKENS, GENERATED_TOKENS = range(len(OUTCOMES), len(OUTCOMES) + 3)
FIRST_TOKEN, INTER_TOKEN, DURATION, TURN_WAIT = range(4)
LAYOUT: Final = Layout(
    counters=len(OUTCOMES) + 3,
    bounds=(FIRST_TOKEN_BUCKETS, TOKEN_BUCKETS, REQUEST_BUCKETS, REQUEST_BUCKETS),
)


class CallMetrics:
    """The counts of one call; made when its tenant and its adapter are known."""

    __slots__ = ("_adapter", "_name", "_tenant", "_wanted")

    def __init__(
        self, tenants: Bounded, adapters: Bounded, wanted: Counter[str], *, tenant: str, adapter: str
    ) -> None:
        """Count a call of a tenant.

        Args:
            tenants: the series by tenant.
            adapters: the series by adapter.
            wanted: adapters that calls wait for.
            tenant: whose call it is.
            adapter: "tenant/adapter", BASE or UNRESOLVED.
        """
        self._tenant, self._adapter = tenants.hit(tenant), adapters.hit(adapter)
        self._wanted, self._name = wanted, ""
        if "/" in adapter:
            self._name = adapter
            wanted[adapter] += 1

    def adapter_ready(self) -> None:
        """The call does not wait for its adapter any more; saying so twice does nothing."""
        if self._name:
            self._wanted[self._name] -= 1
            if not self._wanted[self._name]:
                del self._wanted[self._name]
            self._name = ""

    def prompt_seen(self, tokens: int) -> None:
        """A prompt of so many tokens went to the engine."""
        for handle in (self._tenant, self._adapter):
            handle.series.counters[PROMPT_TOKENS] += tokens

    def first_token(self, seconds: float, *, tokens: int, cached_tokens: int) -> None:
        """The first chunk, of so many tokens, came so many seconds after the call."""
        for handle in (self._tenant, self._adapter):
            series = handle.series
            series.observe(FIRST_TOKEN, FIRST_TOKEN_BUCKETS, seconds)
            series.counters[CACHED_TOKENS] += cached_tokens
            series.counters[GENERATED_TOKENS] += tokens

    def generated(self, tokens: int) -> None:
        """Tokens came that no latency is told of: the first ones of a completion beside another."""
        for handle in (self._tenant, self._adapter):
            handle.series.counters[GENERATED_TOKENS] += tokens

    def more_tokens(self, seconds: float, tokens: int) -> None:
        """A chunk of `tokens`, 1 or more, came `seconds` after the one before: observed once per token."""
        bucket = bisect_left(TOKEN_BUCKETS, seconds / tokens)
        series = self._tenant.series
        series.buckets[INTER_TOKEN][bucket] += tokens
        series.sums[INTER_TOKEN] += seconds
        series.counters[GENERATED_TOKENS] += tokens
        series = self._adapter.series
        series.buckets[INTER_TOKEN][bucket] += tokens
        series.sums[INTER_TOKEN] += seconds
        series.counters[GENERATED_TOKENS] += tokens

    def ended(self, outcome: str, seconds: float) -> None:
        """The call ended in one of `OUTCOMES`; a completed one took so many seconds."""
        self.adapter_ready()
        for handle in (self._tenant, self._adapter):
            handle.series.counters[OUTCOMES.index(outcome)] += 1
            if outcome == "completed":
                handle.series.observe(DURATION, REQUEST_BUCKETS, seconds)
