"""The metrics page as a scraper gets it after calls of ever so many adapters, at the settings a server has by itself.

Every adapter has a tenant of its own, so both labels are strained; names have one length, so that the page grows by
what it shows and not by how it is spelt.
"""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.config import LimitSettings
from loraplex_server.metrics import OUTCOMES, Gateway, Metrics

CALLS_PER_ADAPTER = 3
TOKENS_PER_CALL = 5


@dataclass(frozen=True)
class Scraped:
    """One page.

    Attributes:
        adapters: how many had calls before it.
        size_bytes: its length.
        series: lines that hold a value.
        tokens: generated tokens, summed over the label of tenants and over that of adapters.
    """

    adapters: int
    size_bytes: int
    series: int
    tokens: tuple[float, float]

    @property
    def exact(self) -> bool:
        """Whether both sums are what was generated."""
        return set(self.tokens) == {float(self.adapters * CALLS_PER_ADAPTER * TOKENS_PER_CALL)}


def one_call(metrics: Metrics, tenant: str, adapter: str, outcome: str = "completed") -> None:
    """Count a call as the server does, with everything that can be observed of one."""
    metrics.request_started()
    counted = metrics.call(tenant, adapter)
    metrics.turn_given(tenant, 0.25)
    counted.adapter_ready()
    counted.prompt_seen(7)
    counted.first_token(0.125, tokens=1, cached_tokens=5)
    counted.more_tokens(0.5, 4)
    metrics.request_ended(counted, tenant, outcome, 0.75)


def scraped(adapters: int, limits: LimitSettings | None = None) -> Scraped:
    """Return the page after calls of so many adapters."""
    limits, names = limits or LimitSettings(), [f"tenant{number:05}" for number in range(adapters)]
    metrics = Metrics(
        tenants_max=limits.tenants_labelled_max,
        adapters_max=limits.adapters_labelled_max,
        registry=CollectorRegistry(),
    )
    slots = [f"{name}/adapter" for name in names[:8]]
    metrics.show_gateway(Gateway(slots=8, running=lambda: slots, waiting=list, queued=int))
    for round_number in range(CALLS_PER_ADAPTER):
        for number, name in enumerate(names):
            one_call(metrics, name, f"{name}/adapter", OUTCOMES[(round_number + number) % len(OUTCOMES)])
    page = metrics.serve("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=30) as reply:
            text = reply.read().decode()
    finally:
        page.close()
    sums = [_sum(text, f"loraplex_{kind}generated_tokens") for kind in ("", "adapter_")]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return Scraped(adapters, len(text.encode()), len(lines), (sums[0], sums[1]))


def _sum(text: str, family: str) -> float:
    [found] = [each for each in text_string_to_metric_families(text) if each.name == family]
    return sum(sample.value for sample in found.samples if sample.name == f"{family}_total")
