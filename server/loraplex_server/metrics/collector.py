"""Bounded series as families of the metrics library, made anew for each scrape."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_server.metrics.bounded import Bounded, Series


@dataclass(frozen=True)
class CounterFamily:
    """A counter, or several that differ in one more label.

    Attributes:
        name: without `_total`.
        places: where in `Series.counters`, by the value of `label`; one place under "" where there is no label.
    """

    name: str
    help: str
    places: Mapping[str, int]
    label: str = ""


@dataclass(frozen=True)
class HistogramFamily:
    """A histogram; `place` is where in `Series.buckets` and `Series.sums`."""

    name: str
    help: str
    place: int
    bounds: Sequence[float]


class BoundedCollector(Collector):
    """Shows the series of `bounded`, each label under `label`."""

    def __init__(
        self,
        bounded: Bounded,
        *,
        label: str,
        counters: Sequence[CounterFamily],
        histograms: Sequence[HistogramFamily],
    ) -> None:
        self._bounded = bounded
        self._label = label
        self._counters = counters
        self._histograms = [
            (family, [*(repr(float(bound)) for bound in family.bounds), "+Inf"]) for family in histograms
        ]

    def describe(self) -> Iterator[Metric]:
        """Return the families without samples; the library calls it to find names that are taken."""
        for counter in self._counters:
            yield Metric(counter.name, counter.help, "counter")
        for histogram, _ in self._histograms:
            yield Metric(histogram.name, histogram.help, "histogram")

    def collect(self) -> Iterator[Metric]:
        """Return every family with what was counted until now; all families show the same moment."""
        copies = self._bounded.copy()
        for counter in self._counters:
            yield self._counter(counter, copies)
        for histogram, edges in self._histograms:
            yield self._histogram(histogram, edges, copies)

    def _counter(self, family: CounterFamily, copies: Mapping[str, Series]) -> Metric:
        metric = Metric(family.name, family.help, "counter")
        for name, series in copies.items():
            for value, place in family.places.items():
                labels = {self._label: name, **({family.label: value} if family.label else {})}
                metric.add_sample(f"{family.name}_total", labels, series.counters[place])
        return metric

    def _histogram(
        self, family: HistogramFamily, edges: Sequence[str], copies: Mapping[str, Series]
    ) -> Metric:
        metric = Metric(family.name, family.help, "histogram")
        bucket_name = f"{family.name}_bucket"
        for name, series in copies.items():
            labels, count = {self._label: name}, 0
            for edge, count in zip(edges, accumulate(series.buckets[family.place]), strict=True):
                metric.add_sample(bucket_name, {self._label: name, "le": edge}, count)
            metric.add_sample(f"{family.name}_count", labels, count)
            metric.add_sample(f"{family.name}_sum", labels, series.sums[family.place])
        return metric
