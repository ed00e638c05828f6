"""Every metric of the server, and the page that shows them. The only module that knows the metrics library.

Names begin with `loraplex_` and end in their base unit; vLLM's own `vllm:` metrics stand on the same page.
The `tenant` label is bounded: the first `tenants_max` tenants have series of their own, later ones share
"other". Reasons, outcomes and phases are closed sets.
"""

from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics_core import Metric

# From one fast token to a long answer on a slow machine, in seconds.
TOKEN_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10,
)  # fmt: skip
FIRST_TOKEN_BUCKETS = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 120, 300, 600,
)  # fmt: skip
LOAD_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60,
)  # fmt: skip

OUTCOMES = ("completed", "failed", "cancelled", "expired")
# One series per combination of adapter names ever seen together, never removed: unbounded by construction.
HIDDEN = frozenset({"vllm:lora_requests_info"})


class Metrics:
    """Counters and histograms of one server. `registry` is the library's default one in production."""

    def __init__(self, *, tenants_max: int, registry: CollectorRegistry = REGISTRY) -> None:
        self._tenants_max = tenants_max
        self._tenants: set[str] = set()
        self._registry = registry
        tenant = ("tenant",)
        self._requests = Counter(
            "loraplex_requests",
            "Generate and Embed calls by their one outcome.",
            (*tenant, "outcome"),
            registry=registry,
        )
        self._failures = Counter(
            "loraplex_failures", "Calls of any method that ended in an error, by reason.",
            ("method", "reason"), registry=registry,
        )  # fmt: skip
        self._repeated = Counter(
            "loraplex_requests_repeated",
            "Generate calls with the request id of another: joined while it ran, replayed, or refused.",
            ("result",),
            registry=registry,
        )
        self._in_flight = Gauge(
            "loraplex_requests_in_flight",
            "Generate and Embed calls accepted and not yet ended.",
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "loraplex_prompt_tokens", "Tokens of prompts.", tenant, registry=registry
        )
        self._cached_tokens = Counter(
            "loraplex_prompt_cached_tokens", "Prompt tokens answered from the prefix cache.", tenant,
            registry=registry,
        )  # fmt: skip
        self._generated_tokens = Counter(
            "loraplex_generated_tokens", "Tokens generated.", tenant, registry=registry
        )
        self._first_token = Histogram(
            "loraplex_time_to_first_token_seconds", "Arrival of a call to its first token.", tenant,
            buckets=FIRST_TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip
        self._inter_token = Histogram(
            "loraplex_inter_token_latency_seconds", "Between tokens after the first, per token.", tenant,
            buckets=TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip
        self._duration = Histogram(
            "loraplex_request_duration_seconds", "Arrival of a call to its last token, completed calls only.",
            tenant, buckets=REQUEST_BUCKETS, registry=registry,
        )  # fmt: skip
        self._adapter_wait = Histogram(
            "loraplex_adapter_wait_seconds", "Arrival of a call to its adapter being ready.", ("resident",),
            buckets=LOAD_BUCKETS, registry=registry,
        )  # fmt: skip
        self._adapter_requests = Counter(
            "loraplex_adapter_cache_requests", "Calls that wanted an adapter: hit, miss, or joined to a load.",
            ("result",), registry=registry,
        )  # fmt: skip
        self._adapter_phases = Histogram(
            "loraplex_adapter_load_phase_seconds", "Phases of bringing an adapter in.", ("phase",),
            buckets=LOAD_BUCKETS, registry=registry,
        )  # fmt: skip
        self._adapter_loads = Counter(
            "loraplex_adapter_loads", "Loads by how they ended.", ("reason",), registry=registry
        )
        self._adapter_gone = Counter(
            "loraplex_adapter_removals",
            "Resident adapters that left, by cause.",
            ("cause",),
            registry=registry,
        )
        self._turn_wait = Histogram(
            "loraplex_turn_wait_seconds", "Waiting for a turn at the engine, among all tenants' calls.", tenant,
            buckets=REQUEST_BUCKETS, registry=registry,
        )  # fmt: skip
        self.waiting = Gauge("loraplex_requests_waiting", "Calls that wait for a turn.", registry=registry)
        self.fairness_gap = Gauge(
            "loraplex_fairness_gap_tokens",
            "Most tokens of service, by weight, that a tenant with something to do is ahead of another.",
            registry=registry,
        )
        self.slots_total = Gauge("loraplex_adapter_slots", "Slots of the engine.", registry=registry)
        self.slots_used = Gauge("loraplex_adapter_slots_used", "Slots taken.", registry=registry)
        self.pins = Gauge("loraplex_adapters_pinned", "Adapters that cannot be evicted.", registry=registry)

    def request_started(self) -> None:
        """A Generate call was accepted."""
        self._in_flight.inc()

    def request_ended(self, tenant: str, outcome: str) -> None:
        """It ended in exactly one of `OUTCOMES`."""
        self._in_flight.dec()
        self._requests.labels(self._label(tenant), outcome).inc()

    def request_repeated(self, how: str) -> None:
        """See `replays.ReplayEvents`."""
        self._repeated.labels(how).inc()

    def call_failed(self, method: str, reason: str) -> None:
        """A call of any method ended in an error status."""
        self._failures.labels(method, reason).inc()

    def prompt_seen(self, tenant: str, *, tokens: int) -> None:
        """A prompt of so many tokens went to the engine."""
        self._prompt_tokens.labels(self._label(tenant)).inc(tokens)

    def first_token(self, tenant: str, seconds: float, *, cached_tokens: int) -> None:
        """The first token came so many seconds after the call."""
        label = self._label(tenant)
        self._first_token.labels(label).observe(seconds)
        self._cached_tokens.labels(label).inc(cached_tokens)

    def tokens_generated(self, tenant: str, tokens: int) -> None:
        """So many tokens were streamed out."""
        self._generated_tokens.labels(self._label(tenant)).inc(tokens)

    def inter_token(self, tenant: str, seconds: float, *, tokens: int) -> None:
        """A chunk of `tokens` came `seconds` after the one before: counted once per token."""
        series = self._inter_token.labels(self._label(tenant))
        for _ in range(tokens):
            series.observe(seconds / tokens)

    def request_completed(self, tenant: str, seconds: float) -> None:
        """A call ended well, so many seconds after it arrived."""
        self._duration.labels(self._label(tenant)).observe(seconds)

    def adapter_ready(self, seconds: float, *, was_resident: bool) -> None:
        """A call had its adapter so many seconds after it arrived."""
        self._adapter_wait.labels("true" if was_resident else "false").observe(seconds)

    def turn_given(self, tenant: str, waited_s: float) -> None:
        """See `scheduling.scheduler.SchedulerEvents`."""
        self._turn_wait.labels(self._label(tenant)).observe(waited_s)

    def adapter_requested(self, result: str) -> None:
        """See `residency.ResidencyEvents`."""
        self._adapter_requests.labels(result).inc()

    def adapter_phase(self, phase: str, seconds: float) -> None:
        """See `residency.ResidencyEvents`; `versions` adds the phase "verify"."""
        self._adapter_phases.labels(phase).observe(seconds)

    def adapter_load_ended(self, reason: str) -> None:
        """See `residency.ResidencyEvents`."""
        self._adapter_loads.labels(reason).inc()

    def adapter_gone(self, cause: str) -> None:
        """See `residency.ResidencyEvents`."""
        self._adapter_gone.labels(cause).inc()

    def serve(self, host: str, port: int) -> "MetricsPage":
        """Show the metrics at http://host:port/metrics, from a thread of its own."""
        return MetricsPage(host, port, self._registry)

    def _label(self, tenant: str) -> str:
        if tenant in self._tenants:
            return tenant
        if len(self._tenants) < self._tenants_max:
            self._tenants.add(tenant)
            return tenant
        return "other"


class MetricsPage:
    """The HTTP page; `port` is the one really taken."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        server, self._thread = start_http_server(port, host, registry=_WithoutHidden(registry))
        self._server: WSGIServer = server
        self.port = server.server_port

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _WithoutHidden(CollectorRegistry):
    """A view of a registry that leaves out metrics whose number of series has no bound."""

    def __init__(self, inner: CollectorRegistry) -> None:
        super().__init__()
        self._inner = inner

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in self._inner.collect() if metric.name not in HIDDEN)
