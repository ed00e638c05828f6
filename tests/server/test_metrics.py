"""Metrics stay bounded and add up."""

import urllib.request

from prometheus_client import CollectorRegistry, Gauge

from loraplex_server.metrics import OUTCOMES, Metrics


def page(metrics: Metrics) -> str:
    shown = metrics.serve("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{shown.port}/metrics", timeout=5) as reply:
            return str(reply.read().decode())
    finally:
        shown.close()


def test_tenants_beyond_the_bound_share_one_series_and_totals_stay_exact() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(tenants_max=3, registry=registry)
    for number in range(50):
        metrics.request_started()
        metrics.request_ended(f"tenant{number}", OUTCOMES[number % 4])
        metrics.first_token(f"tenant{number}", 0.1, cached_tokens=0)
    samples = [s for m in registry.collect() for s in m.samples if s.name == "loraplex_requests_total"]
    assert {s.labels["tenant"] for s in samples} == {"tenant0", "tenant1", "tenant2", "other"}
    assert sum(s.value for s in samples) == 50
    assert registry.get_sample_value("loraplex_requests_in_flight") == 0
    assert registry.get_sample_value("loraplex_time_to_first_token_seconds_count", {"tenant": "other"}) == 47


def test_the_page_shows_ours_and_hides_the_unbounded_one_of_vllm() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(tenants_max=3, registry=registry)
    Gauge("vllm:lora_requests_info", "unbounded", registry=registry).set(1)
    Gauge("vllm:num_requests_running", "bounded", registry=registry).set(1)
    metrics.inter_token("acme", 0.3, tokens=3)
    text = page(metrics)
    assert 'loraplex_inter_token_latency_seconds_count{tenant="acme"} 3.0' in text
    assert "vllm:num_requests_running" in text
    assert "lora_requests_info" not in text
