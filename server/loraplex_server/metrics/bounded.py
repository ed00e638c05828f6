"""Series for ever so many names, of which only so many have a label of their own; the rest share `other`. Pure.

The busiest names are labelled (see `busiest`). When a name loses its label all its numbers are added to `other`: every
counter, every bucket, every sum. So at any moment the sum over all labels is exactly what was ever observed, and
`other` never goes back. Calls that are running hold a handle; from then on theirs leads to `other`.

Observations and handles belong to one thread, that of the event loop, and take no lock; `copy` may be called from any.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final

from loraplex_server.metrics.busiest import Busiest

OTHER: Final = "other"


@dataclass(frozen=True)
class Layout:
    """What every name has: so many counters, and a histogram for each sequence of ascending upper bounds."""

    counters: int
    bounds: tuple[Sequence[float], ...]


class Series:
    """The numbers of one label.

    Attributes:
        counters: they only grow.
        buckets: for each histogram the observations per bucket, not cumulated; the last bucket has no bound.
        sums: for each histogram the sum of what was observed.
    """

    __slots__ = ("buckets", "counters", "sums")

    def __init__(self, layout: Layout) -> None:
        self.counters = [0] * layout.counters
        self.buckets = [[0] * (len(bounds) + 1) for bounds in layout.bounds]
        self.sums = [0.0] * len(layout.bounds)

    def observe(self, histogram: int, bounds: Sequence[float], value: float, times: int = 1) -> None:
        """Count a value that came so many times."""
        self.buckets[histogram][bisect_left(bounds, value)] += times
        self.sums[histogram] += value * times

    def take_over(self, other: "Series") -> None:
        """Add another's numbers to these."""
        self.counters = [mine + theirs for mine, theirs in zip(self.counters, other.counters, strict=True)]
        self.sums = [mine + theirs for mine, theirs in zip(self.sums, other.sums, strict=True)]
        for mine_too, theirs_too in zip(self.buckets, other.buckets, strict=True):
            mine_too[:] = [mine + theirs for mine, theirs in zip(mine_too, theirs_too, strict=True)]

    def copied(self) -> "Series":
        """Return the numbers as they are now."""
        copy: Series = object.__new__(Series)
        copy.counters, copy.sums = list(self.counters), list(self.sums)
        copy.buckets = [list(buckets) for buckets in self.buckets]
        return copy


class Handle:
    """Where a name's observations go: ask `series` each time, since a name may lose its label meanwhile."""

    __slots__ = ("series",)

    def __init__(self, series: Series) -> None:
        self.series = series


class Bounded:
    """See the module."""

    def __init__(
        self, layout: Layout, *, names_max: int, fixed: Sequence[str] = (), halve_after: int | None = None
    ) -> None:
        """Begin with zeros.

        Args:
            layout: what every label has.
            names_max: most names with a label of their own, `other` and `fixed` aside; at least 1.
            fixed: names that always have a label, and are not counted.
            halve_after: see `Busiest`.
        """
        self._layout = layout
        self._busiest = Busiest(names_max, halve_after=halve_after)
        self._handles = {name: Handle(Series(layout)) for name in (OTHER, *fixed)}
        self._fixed = frozenset(self._handles)
        self._other = self._handles[OTHER]
        self._lock = Lock()  # held while names move and while they are copied

    def hit(self, name: str) -> Handle:
        """Return the handle of a name for one more call of it, which may move names."""
        if name in self._fixed:
            return self._handles[name]
        kept, left = self._busiest.hit(name)
        if not kept:
            return self._other
        found = self._handles.get(name)
        return found or self._move_in(name, left)

    def find(self, name: str) -> Handle:
        """Return the handle of a name without counting a call."""
        return self._handles.get(name, self._other)

    def copy(self) -> Mapping[str, Series]:
        """Return the numbers of every label, consistent with each other when names move; for any thread."""
        with self._lock:
            return {name: handle.series.copied() for name, handle in self._handles.items()}

    def _move_in(self, name: str, left: str | None) -> Handle:
        with self._lock:
            if left is not None:
                leaving = self._handles.pop(left)
                self._other.series.take_over(leaving.series)
                leaving.series = self._other.series
            handle = self._handles[name] = Handle(Series(self._layout))
        return handle
