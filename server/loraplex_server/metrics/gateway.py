"""What routers of the Gateway API Inference Extension ask of a model server (its proposal 003, and llm-d's).

They read vLLM's names. Two of those would mislead them here, so the page shows these in their place:

- `vllm:num_requests_waiting`: vLLM's own number and the calls that wait in this server, which is where they wait.
- `vllm:lora_requests_info`: one series, labelled with what is true now: `max_lora` (slots), `running_lora_adapters` (in
  the engine and ready to serve) and `waiting_lora_adapters` (waited for by calls). Its value is the time in seconds.
  vLLM's own keeps a series for every combination of names that was ever seen.

`vllm:num_requests_running`, `vllm:kv_cache_usage_perc` and `vllm:cache_config_info` are vLLM's own. Adapters stand
there by the names that callers use as `model`, without a tag: "tenant/adapter". At most `slots` names run and
WAITING_MAX wait.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client.metrics_core import Metric

from loraplex_server.metrics.hooks import steady

ADAPTERS_INFO: Final = "vllm:lora_requests_info"
REQUESTS_WAITING: Final = "vllm:num_requests_waiting"
WAITING_MAX: Final = 256


@dataclass(frozen=True)
class Gateway:
    """Where the numbers come from; each function is called at each scrape, from its thread."""

    slots: int
    running: Callable[[], Collection[str]]
    waiting: Callable[[], Collection[str]]
    queued: Callable[[], int]

    def instead_of(self, metrics: Iterable[Metric]) -> Iterator[Metric]:
        """Return vLLM's metrics with the two of this module in their places."""
        queued = steady(self.queued, otherwise=0)
        total = Metric(REQUESTS_WAITING, "Requests that wait, in the server and in the engine.", "gauge")
        for metric in metrics:
            if metric.name == REQUESTS_WAITING:
                total.samples = metric.samples
            elif metric.name != ADAPTERS_INFO:
                yield metric
        if total.samples:
            first = total.samples[0]
            total.samples = [first._replace(value=first.value + queued), *total.samples[1:]]
        else:
            total.add_sample(REQUESTS_WAITING, {}, queued)
        yield total
        yield self._adapters()

    def _adapters(self) -> Metric:
        nobody: Collection[str] = ()
        running = set(steady(self.running, otherwise=nobody))
        waiting = sorted(set(steady(self.waiting, otherwise=nobody)) - running)[:WAITING_MAX]
        metric = Metric(ADAPTERS_INFO, "Adapters in the engine, and those waited for.", "gauge")
        labels = {
            "max_lora": str(self.slots),
            "running_lora_adapters": ",".join(sorted(running)),
            "waiting_lora_adapters": ",".join(waiting),
        }
        metric.add_sample(ADAPTERS_INFO, labels, time.time())
        return metric
