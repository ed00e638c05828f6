"""Which names are the busiest of an endless stream of them, in a fixed amount of memory. Pure.

This is the filtered space-saving sketch: Homem and Carvalho, "Finding top-k elements in data streams", Information
Sciences 180(24), 2010. It refines the space-saving sketch (Metwally, Agrawal, El Abbadi, "Efficient computation of
frequent and top-k elements in data streams", ICDT 2005): a name that is not kept first gathers hits in one of many
cells, chosen by its hash, and takes the place of the least kept name only when its cell has more. So a long tail of
rare names does not push each other in and out, as it does without the cells.

Every `halve_after` hits all counts are halved, so that what was busy long ago makes room for what is busy now. `N`
below is the sum of all hits with the weights that this leaves them.

Laws, for `K` names kept:

- never more than `K` are kept;
- a name whose own hits weigh more than `N / K` is kept: one that is not kept has no more hits than its cell, no cell
  has more than the least kept count, and the kept counts grow by at most one per hit, so the least is at most `N / K`;
- a kept name's count is at least the weight of its own hits.
"""

from array import array
from typing import Final

CELLS_PER_NAME: Final = 256
CELLS_MAX: Final = 1 << 16
"""Cells of the filter, 8 bytes each."""

HALVE_AFTER_PER_NAME: Final = 1000
"""Hits after which all counts are halved, for each name kept: 10 names, 10,000 calls."""


class Busiest:
    """See the module. For one thread."""

    def __init__(self, names_max: int, *, halve_after: int | None = None) -> None:
        """Keep nothing yet.

        Args:
            names_max: most names kept, at least 1.
            halve_after: hits between two halvings; None: HALVE_AFTER_PER_NAME for each name.
        """
        self._names_max = names_max
        self._halve_after = halve_after or HALVE_AFTER_PER_NAME * names_max
        self._counts: dict[str, float] = {}
        self._least = 0.0  # at most the least count: counts only grow between two halvings
        cells = min(CELLS_MAX, 1 << (CELLS_PER_NAME * names_max - 1).bit_length())
        self._cells = array("d", bytes(8 * cells))
        self._mask = cells - 1
        self._hits = 0

    def __contains__(self, name: str) -> bool:
        """Whether a name is kept."""
        return name in self._counts

    def __len__(self) -> int:
        """Names kept."""
        return len(self._counts)

    def hit(self, name: str) -> tuple[bool, str | None]:
        """Count one hit.

        Returns:
            Whether the name is kept now, and the name that left its place to it, if any.
        """
        self._hits += 1
        if self._hits >= self._halve_after:
            self._halve()
        counts = self._counts
        if name in counts:
            counts[name] += 1.0
            return True, None
        if len(counts) < self._names_max:
            counts[name] = 1.0
            self._least = min(self._least, 1.0)
            return True, None
        return self._contend(name)

    def _contend(self, name: str) -> tuple[bool, str | None]:
        """Let a name that is not kept gather a hit, or take the least kept one's place."""
        cell = hash(name) & self._mask
        gathered = self._cells[cell] + 1.0
        if gathered > self._least:
            loser = min(self._counts, key=self._counts.__getitem__)
            self._least = self._counts[loser]
            if gathered > self._least:
                self._cells[hash(loser) & self._mask] = self._counts.pop(loser)
                self._counts[name] = gathered
                return True, loser
        self._cells[cell] = gathered
        return False, None

    def _halve(self) -> None:
        self._hits = 0
        self._least *= 0.5
        self._counts = {name: count * 0.5 for name, count in self._counts.items()}
        self._cells = array("d", [gathered * 0.5 for gathered in self._cells])
