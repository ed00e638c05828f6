"""Every metric of the server. Names begin with `loraplex_` and end in their base unit; vLLM's `vllm:` stand beside.

The labels `tenant` and `adapter` are bounded, see `bounded`; the version of an adapter is never a label. Reasons,
outcomes, phases and tiers are closed sets. All methods belong to the event loop's thread.
"""

from collections import Counter as Counts
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

from loraplex_server.metrics import calls
from loraplex_server.metrics.bounded import Bounded
from loraplex_server.metrics.calls import BASE, OUTCOMES, UNRESOLVED, CallMetrics
from loraplex_server.metrics.collector import BoundedCollector, CounterFamily, HistogramFamily
from loraplex_server.metrics.gateway import ADAPTERS_INFO, Gateway
from loraplex_server.metrics.hooks import HookedGauge, hooked
from loraplex_server.metrics.page import MetricsPage

LOAD_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60,
)  # fmt: skip

TIERS: Final = ("slot", "memory", "disk")
"""Where adapters are: in the engine, verified in memory, in the cache on disk. One adapter may be in several."""

_OUTCOME_PLACES: Final = {outcome: place for place, outcome in enumerate(OUTCOMES)}


class Metrics:
    """Counters and histograms of one server. `registry` is the library's default one in production."""

    def __init__(
        self, *, tenants_max: int, adapters_max: int = 10, registry: CollectorRegistry = REGISTRY
    ) -> None:
        """Register everything.

        Args:
            tenants_max: tenants with a label of their own, at least 1.
            adapters_max: the same for adapters.
            registry: where the engine's own metrics are, too.
        """
        self._registry = registry
        self._tenants = Bounded(calls.LAYOUT, names_max=tenants_max)
        self._adapters = Bounded(calls.LAYOUT, names_max=adapters_max, fixed=(BASE, UNRESOLVED))
        self._wanted: Counts[str] = Counts()
        self._gateway: Gateway | None = None
        registry.register(_by_tenant(self._tenants))
        registry.register(_by_adapter(self._adapters))
        self._failures = Counter(
            "loraplex_failures", "Calls of any method that ended in an error, by reason.",
            ("method", "reason"), registry=registry,
        )  # fmt: skip
        self._in_flight = Gauge(
            "loraplex_requests_in_flight",
            "Generate and Embed calls accepted and not yet ended.",
            registry=registry,
        )
        self._repeated = Counter(
            "loraplex_requests_repeated",
            "Generate calls with the request id of another: joined while it ran, replayed, or refused.",
            ("result",),
            registry=registry,
        )
        self._resolve = _load_histogram(
            registry, "loraplex_resolve_seconds", "From an adapter's name to its verified version."
        )
        self._adapter_wait = _load_histogram(
            registry,
            "loraplex_adapter_wait_seconds",
            "Arrival of a call to its adapter being ready.",
            "resident",
        )
        self._adapter_phases = _load_histogram(
            registry, "loraplex_adapter_load_phase_seconds", "Phases of bringing an adapter in.", "phase"
        )
        self._adapter_requests = Counter(
            "loraplex_adapter_cache_requests", "Calls that wanted an adapter: hit, staged, miss, or joined to a load.",
            ("result",), registry=registry,
        )  # fmt: skip
        self._adapter_loads = Counter(
            "loraplex_adapter_loads", "Loads by how they ended.", ("reason",), registry=registry
        )
        self._adapter_gone = Counter(
            "loraplex_adapter_removals",
            "Adapters that left a tier, by tier and cause.",
            ("tier", "cause"),
            registry=registry,
        )
        self._adapter_ahead = Counter(
            "loraplex_adapter_prefetches", "Fetches ahead of a call: started, here, or full.", ("result",),
            registry=registry,
        )  # fmt: skip
        self._canary_calls = Counter(
            "loraplex_canary_calls",
            "Calls a canary was chosen for: completed, failed, or replaced by the stable version.",
            ("outcome",),
            registry=registry,
        )
        self._canary_rollbacks = Counter(
            "loraplex_canary_rollbacks", "Canaries that lost their share.", registry=registry
        )
        self._engine_restarts = Counter(
            "loraplex_engine_restarts", "Engines that died and were replaced.", registry=registry
        )
        tier = ("tier",)
        self._tier_adapters = Gauge(
            "loraplex_adapters", "Adapters by where they are.", tier, registry=registry
        )
        self._tier_bytes = Gauge(
            "loraplex_adapter_bytes", "Bytes of adapters by where they are.", tier, registry=registry
        )
        self.waiting = hooked(registry, "loraplex_requests_waiting", "Calls that wait for a turn.")
        self.fairness_gap = hooked(
            registry,
            "loraplex_fairness_gap_tokens",
            "Most tokens of service, by weight, that a tenant with something to do is ahead of another.",
        )
        self.slots_total = hooked(registry, "loraplex_adapter_slots", "Slots of the engine.")
        self.slots_used = hooked(registry, "loraplex_adapter_slots_used", "Slots taken.")
        self.pins = hooked(registry, "loraplex_adapters_pinned", "Adapters that cannot be evicted.")

    def request_started(self) -> None:
        """A Generate or Embed call was accepted."""
        self._in_flight.inc()

    def call(self, tenant: str, adapter: str) -> CallMetrics:
        """Return where a call is counted, once it is known whose it is.

        Args:
            tenant: who is served.
            adapter: "tenant/adapter", "" for the base model.
        """
        return CallMetrics(
            self._tenants, self._adapters, self._wanted, tenant=tenant, adapter=adapter or BASE
        )

    def request_ended(self, counted: CallMetrics | None, tenant: str, outcome: str, seconds: float) -> None:
        """A Generate call ended in exactly one of `OUTCOMES`, so many seconds after it arrived.

        Args:
            counted: what `call` gave; None when it ended before.
            tenant: the caller's, for that case.
            outcome: how.
            seconds: observed for completed calls.
        """
        self._in_flight.dec()
        counted = counted or CallMetrics(
            self._tenants, self._adapters, self._wanted, tenant=tenant, adapter=UNRESOLVED
        )
        counted.ended(outcome, seconds)

    def request_repeated(self, how: str) -> None:
        """See `replays.ReplayEvents`."""
        self._repeated.labels(how).inc()

    def call_failed(self, method: str, reason: str) -> None:
        """A call of any method ended in an error status."""
        self._failures.labels(method, reason).inc()

    def resolved(self, seconds: float) -> None:
        """A call's adapter was resolved, in so many seconds."""
        self._resolve.observe(seconds)

    def adapter_ready(self, seconds: float, *, was_resident: bool) -> None:
        """A call had its adapter so many seconds after it arrived."""
        self._adapter_wait.labels("true" if was_resident else "false").observe(seconds)

    def turn_given(self, tenant: str, waited_s: float) -> None:
        """See `scheduling.scheduler.SchedulerEvents`."""
        self._tenants.find(tenant).series.observe(calls.TURN_WAIT, calls.REQUEST_BUCKETS, waited_s)

    def adapter_requested(self, result: str) -> None:
        """See `residency.ResidencyEvents`."""
        self._adapter_requests.labels(result).inc()

    def adapter_phase(self, phase: str, seconds: float) -> None:
        """See `residency.ResidencyEvents`."""
        self._adapter_phases.labels(phase).observe(seconds)

    def adapter_load_ended(self, reason: str) -> None:
        """See `residency.ResidencyEvents`."""
        self._adapter_loads.labels(reason).inc()

    def adapter_gone(self, tier: str, cause: str) -> None:
        """See `residency.ResidencyEvents`."""
        self._adapter_gone.labels(tier, cause).inc()

    def adapter_ahead(self, result: str) -> None:
        """See `residency.ResidencyEvents`."""
        self._adapter_ahead.labels(result).inc()

    def engine_restarted(self) -> None:
        """See `supervision.SupervisionEvents`."""
        self._engine_restarts.inc()

    def canary_call(self, outcome: str) -> None:
        """See `rollout.rollouts.RolloutEvents`."""
        self._canary_calls.labels(outcome).inc()

    def canary_rolled_back(self) -> None:
        """See `rollout.rollouts.RolloutEvents`."""
        self._canary_rollbacks.inc()

    def tier_adapters(self, tier: str) -> HookedGauge:
        """Return the gauge of how many adapters are in one of `TIERS`."""
        return HookedGauge(self._tier_adapters.labels(tier))

    def tier_bytes(self, tier: str) -> HookedGauge:
        """Return the gauge of their bytes."""
        return HookedGauge(self._tier_bytes.labels(tier))

    @property
    def wanted(self) -> list[str]:
        """Adapters that calls wait for: for a turn, or for the adapter itself."""
        return list(self._wanted)

    def show_gateway(self, gateway: Gateway) -> None:
        """Show routers what they ask for, see `gateway`."""
        self._gateway = gateway

    def serve(self, host: str, port: int) -> MetricsPage:
        """Show the metrics at http://host:port/metrics, from a thread of its own."""
        return MetricsPage(host, port, self._registry, self._shown)

    def _shown(self, metrics: Iterable[Metric]) -> Iterator[Metric]:
        """Leave out what has no bound: vLLM never removes a series of this one."""
        if self._gateway is not None:
            return self._gateway.instead_of(metrics)
        return (metric for metric in metrics if metric.name != ADAPTERS_INFO)


def _load_histogram(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Histogram:
    return Histogram(name, text, labels, buckets=LOAD_BUCKETS, registry=registry)


def _by_tenant(bounded: Bounded) -> BoundedCollector:
    counters = [
        CounterFamily("loraplex_requests", "Generate calls by their one outcome.", _OUTCOME_PLACES, "outcome"),
        CounterFamily("loraplex_prompt_tokens", "Tokens of prompts.", {"": calls.PROMPT_TOKENS}),
        CounterFamily(
            "loraplex_prompt_cached_tokens", "Prompt tokens answered from the prefix cache.",
            {"": calls.CACHED_TOKENS},
        ),
        CounterFamily("loraplex_generated_tokens", "Tokens generated.", {"": calls.GENERATED_TOKENS}),
    ]  # fmt: skip
    histograms = [
        HistogramFamily(
            "loraplex_time_to_first_token_seconds", "Arrival of a call to its first token.",
            calls.FIRST_TOKEN, calls.FIRST_TOKEN_BUCKETS,
        ),
        HistogramFamily(
            "loraplex_inter_token_latency_seconds", "Between tokens after the first, per token.",
            calls.INTER_TOKEN, calls.TOKEN_BUCKETS,
        ),
        HistogramFamily(
            "loraplex_request_duration_seconds", "Arrival of a call to its last token, completed calls only.",
            calls.DURATION, calls.REQUEST_BUCKETS,
        ),
        HistogramFamily(
            "loraplex_turn_wait_seconds", "Waiting for a turn at the engine, among all tenants' calls.",
            calls.TURN_WAIT, calls.REQUEST_BUCKETS,
        ),
    ]  # fmt: skip
    return BoundedCollector(bounded, label="tenant", counters=counters, histograms=histograms)


def _by_adapter(bounded: Bounded) -> BoundedCollector:
    counters = [
        CounterFamily(
            "loraplex_adapter_requests", "Generate calls by adapter and outcome.", _OUTCOME_PLACES, "outcome"
        ),
        CounterFamily(
            "loraplex_adapter_generated_tokens", "Tokens generated, by adapter.", {"": calls.GENERATED_TOKENS}
        ),
    ]
    histograms = [
        HistogramFamily(
            "loraplex_adapter_time_to_first_token_seconds", "Arrival of a call to its first token, by adapter.",
            calls.FIRST_TOKEN, calls.FIRST_TOKEN_BUCKETS,
        ),
        HistogramFamily(
            "loraplex_adapter_inter_token_latency_seconds", "Between tokens after the first, by adapter.",
            calls.INTER_TOKEN, calls.TOKEN_BUCKETS,
        ),
    ]  # fmt: skip
    return BoundedCollector(bounded, label="adapter", counters=counters, histograms=histograms)
