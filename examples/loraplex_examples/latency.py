"""Read latency histograms back from a Prometheus text page."""

import math
from collections import defaultdict

HISTOGRAMS = {
    "time to first token": ("loraplex_time_to_first_token_seconds", {}),
    "inter-token latency": ("loraplex_inter_token_latency_seconds", {}),
    "whole request": ("loraplex_request_duration_seconds", {}),
    "adapter: fetch and check": ("loraplex_adapter_load_phase_seconds", {"phase": "fetch"}),
    "adapter: into the engine": ("loraplex_adapter_load_phase_seconds", {"phase": "load"}),
}


def latency_rows(page: str) -> list[list[str]]:
    """Give [name, count, mean, p50, p99] of each latency histogram, in milliseconds, all tenants together.

    Quantiles are upper bounds: the edge of the bucket they fall into.
    """
    from prometheus_client.parser import text_string_to_metric_families

    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    rows = []
    for name, (metric, labels) in HISTOGRAMS.items():
        mine = [s for s in samples if s.name.startswith(metric) and labels.items() <= s.labels.items()]
        buckets: dict[float, float] = defaultdict(float)
        for sample in mine:
            if sample.name == f"{metric}_bucket":
                buckets[float(sample.labels["le"])] += sample.value
        count = buckets[math.inf]
        total = sum(sample.value for sample in mine if sample.name == f"{metric}_sum")
        mean = f"{1000 * total / count:.1f}" if count else "-"
        rows.append([name, f"{count:.0f}", mean, _edge(buckets, 0.5 * count), _edge(buckets, 0.99 * count)])
    return rows


def _edge(buckets: dict[float, float], rank: float) -> str:
    for edge in sorted(buckets):
        if rank and buckets[edge] >= rank:
            return f"{1000 * edge:g}" if math.isfinite(edge) else "more"
    return "-"
