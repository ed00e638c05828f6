"""Which rows of a batch belong to which adapter slot, and in what pieces they are multiplied.

Pure functions of the row-to-slot mapping; they run once per change of the batch, not per layer. A *row* is
one token of the step (or one sampled position, for the logits); a *slot* is a place in vLLM's stacked LoRA
tensors; -1 means the row wants the base model and must not be touched.

    slots_of_rows ids per row -> slot per row          (one dictionary lookup per distinct adapter)
    group_rows    slot per row -> rows per slot
    make_plan     rows per slot -> segments + one padded batch

Two kinds of work, because a small matrix product on a CPU costs about 25 us however little it computes:
rows of one slot in quantity go through one GEMM pair (`Segment`); the many slots with a few rows each of a
decode step go together through one batched product (`PaddedBatch`), short groups padded with repeats of a
row whose result is thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Rows = NDArray[np.int64]

# A group with more rows than this gets GEMMs of its own. Padding 16 groups from 1 row to 16 was measured to
# make a batched product pair 16% slower; 32 itself is a choice, not a measured optimum.
PADDED_ROWS_MAX = 32
# A padded batch reads a whole range of slots in place, holes included, if the range is at most this many
# times the slots wanted; otherwise it copies the wanted slots together first, which reads and writes them
# once more.
SPAN_RATIO_MAX = 1.5


@dataclass(frozen=True)
class Groups:
    """The rows of one batch that want an adapter, by slot; `rows[i]` (ascending) belong to `slots[i]`."""

    n_rows: int  # of the whole batch, base rows included
    slots: tuple[int, ...]  # ascending, each with at least one row
    rows: tuple[Rows, ...]

    @property
    def idle(self) -> bool:
        """No row wants an adapter."""
        return not self.slots


NO_ROWS = Groups(n_rows=0, slots=(), rows=())


@dataclass(frozen=True)
class Segment:
    """Rows of one slot, multiplied on their own. A slice where the rows are consecutive, else row numbers."""

    slot: int
    rows: slice | torch.Tensor


@dataclass(frozen=True)
class PaddedBatch:
    """Groups of a few rows each, multiplied together: `n_groups` groups of `n_each` rows."""

    slots: slice | torch.Tensor  # what to take of dimension 0 of the stacked weights; n_groups of them
    n_groups: int
    n_each: int
    direct: slice | None  # the batch's own rows where they already lie in order without padding, else None
    gather: torch.Tensor  # (n_groups * n_each,) row to read for each place
    places: torch.Tensor | None  # (n,) the places that hold a wanted row, None where all do ...
    rows: torch.Tensor  # (n,) ... and that row


@dataclass(frozen=True)
class Plan:
    """How to multiply one set of groups; every row of the groups is in exactly one piece."""

    segments: tuple[Segment, ...]
    padded: PaddedBatch | None


def slots_of_rows(ids: Sequence[int], slot_of_id: Mapping[int, int]) -> Rows:
    """Return the slot of each row, -1 for the base model (ids <= 0).

    Raises:
        KeyError: a row names an adapter that is in no slot; answering it from another slot would be wrong.

    """
    distinct, inverse = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
    slots = np.array([slot_of_id[int(one)] if one > 0 else -1 for one in distinct], dtype=np.int64)
    return slots[inverse.reshape(-1)]


def group_rows(slots: Rows) -> Groups:
    """Gather the rows of each slot: `slots` is the slot per row, -1 for base rows, which join no group."""
    wanted = np.flatnonzero(slots >= 0)
    order = wanted[np.argsort(slots[wanted], kind="stable")]
    present, starts = np.unique(slots[order], return_index=True)
    rows = tuple(np.split(order, starts[1:])) if len(present) else ()
    return Groups(n_rows=len(slots), slots=tuple(int(slot) for slot in present), rows=rows)


def make_plan(groups: Groups, touched: Sequence[int]) -> Plan:
    """Plan the products for those slots of `groups` that are in `touched`: the others have no weights."""
    segments: list[Segment] = []
    small: list[tuple[int, Rows]] = []
    for slot, rows in zip(groups.slots, groups.rows, strict=True):
        if slot not in touched:
            continue
        if len(rows) > PADDED_ROWS_MAX:
            segments.extend(_split_long_group(slot, rows))
        else:
            small.append((slot, rows))
    if len(small) == 1:
        segments.append(_segment(*small.pop()))
    return Plan(segments=tuple(segments), padded=_padded_batch(small) if small else None)


def _split_long_group(slot: int, rows: Rows) -> list[Segment]:
    """Cut a group into its long consecutive runs, used in place, and one rest, which has to be gathered."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    long_runs = [run for run in runs if len(run) > PADDED_ROWS_MAX]
    short_runs = [run for run in runs if len(run) <= PADDED_ROWS_MAX]
    segments = [_segment(slot, run) for run in long_runs]
    if short_runs:
        segments.append(_segment(slot, np.concatenate(short_runs)))
    return segments


def _segment(slot: int, rows: Rows) -> Segment:
    return Segment(slot=slot, rows=_as_slice(rows) or torch.from_numpy(rows.copy()))


def _as_slice(rows: Rows) -> slice | None:
    """Return the slice that equals `rows`, or None where they are not consecutive."""
    first, last = int(rows[0]), int(rows[-1])
    consecutive = last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all())
    return slice(first, last + 1) if consecutive else None


def _padded_batch(groups: list[tuple[int, Rows]]) -> PaddedBatch:
    """Lay the groups side by side, each padded to the longest."""
    slots = [slot for slot, _ in groups]
    first, span = slots[0], slots[-1] - slots[0] + 1
    in_place = span <= SPAN_RATIO_MAX * len(slots)
    n_groups = span if in_place else len(slots)
    n_each = max(len(rows) for _, rows in groups)
    # A pad repeats a row of the batch: it must be readable, and nothing reads its result.
    gather = np.full((n_groups, n_each), groups[0][1][0], dtype=np.int64)
    places, wanted = [], []
    for number, (slot, rows) in enumerate(groups):
        line = slot - first if in_place else number
        gather[line, : len(rows)] = rows
        places.append(line * n_each + np.arange(len(rows)))
        wanted.append(rows)
    rows = np.concatenate(wanted)
    unpadded = len(rows) == gather.size
    return PaddedBatch(
        slots=slice(first, first + span) if in_place else torch.tensor(slots),
        n_groups=n_groups,
        n_each=n_each,
        direct=_as_slice(rows) if unpadded else None,
        gather=torch.from_numpy(gather.reshape(-1)),
        places=None if unpadded else torch.from_numpy(np.concatenate(places)),
        rows=torch.from_numpy(rows),
    )
