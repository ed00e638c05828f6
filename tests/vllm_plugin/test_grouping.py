"""Laws of the plan: every wanted row is multiplied exactly once, by its own slot, and pads are thrown
away."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.vllm_plugin.grouping import (
    PADDED_ROWS_MAX,
    group_rows,
    make_plan,
    slots_of_rows,
)
from loraplex_server.vllm_plugin.slots import stacked_version, true_ranks_of_a, true_ranks_of_b

RUNS = st.lists(
    st.tuples(st.integers(-1, 9), st.integers(1, 3 * PADDED_ROWS_MAX)), min_size=0, max_size=12
).map(lambda runs: np.array([slot for slot, length in runs for _ in range(length)], dtype=np.int64))


def rows_and_slots(plan):
    """Return (row, slot) for each product the plan keeps."""
    for segment in plan.segments:
        rows = segment.rows
        numbers = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        yield from ((row, segment.slot) for row in numbers)
    if (padded := plan.padded) is None:
        return
    stacked = torch.arange(10)
    taken = padded.slots
    slots = stacked[taken] if isinstance(taken, slice) else stacked.index_select(0, taken)
    assert len(slots) == padded.n_groups
    assert len(padded.gather) == padded.n_groups * padded.n_each
    places = torch.arange(len(padded.gather)) if padded.places is None else padded.places
    assert torch.equal(padded.gather[places], padded.rows)
    if padded.direct is not None:
        assert list(range(padded.direct.start, padded.direct.stop)) == padded.gather.tolist()
    for place, row in zip(places.tolist(), padded.rows.tolist(), strict=True):
        yield row, int(slots[place // padded.n_each])


@settings(deadline=None, max_examples=300)
@given(RUNS, st.sets(st.integers(0, 9)))
def test_each_touched_row_is_in_exactly_one_piece_with_its_own_slot(slots, touched):
    groups = group_rows(slots)
    found = sorted(rows_and_slots(make_plan(groups, tuple(touched))))
    assert found == [(row, int(slot)) for row, slot in enumerate(slots) if slot in touched]
    assert groups.n_rows == len(slots)
    assert groups.idle == bool((slots < 0).all())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 5), max_size=40), st.permutations(range(5)))
def test_slots_of_rows_equals_a_lookup_per_row(ids, order):
    slot_of_id = {number + 1: slot for slot, number in enumerate(order)}
    assert slots_of_rows(ids, slot_of_id).tolist() == [slot_of_id[one] if one else -1 for one in ids]


def test_an_id_in_no_slot_is_refused():
    with pytest.raises(KeyError):
        slots_of_rows([3], {4: 0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [5, 8, 64, 896])
def test_true_ranks_are_read_from_the_weights_for_any_width(dtype, width):
    rng = np.random.default_rng(width)
    for _ in range(20):
        a = torch.zeros(4, 1, 16, width, dtype=dtype)
        b = torch.zeros(4, 1, width, 16, dtype=dtype)
        ranks = [int(rank) for rank in rng.integers(0, 17, size=4)]
        for slot, rank in enumerate(ranks):
            if rank:  # a single tiny value, of either sign, in the last row
                value = float(rng.choice((-1.0, 1.0))) * torch.finfo(dtype).tiny
                a[slot, 0, rank - 1, int(rng.integers(width))] = value
                b[slot, 0, int(rng.integers(width)), rank - 1] = value
        assert list(true_ranks_of_a(a)) == ranks
        assert list(true_ranks_of_b(b)) == ranks


def test_every_way_vllm_writes_a_slot_raises_the_version():
    stacked = torch.zeros(2, 1, 4, 8)
    seen = [stacked_version((stacked,))]
    with torch.inference_mode():
        stacked[1] = 0
        seen.append(stacked_version((stacked,)))
        stacked[1, 0, :2, :8].copy_(torch.ones(2, 8), non_blocking=True)
        seen.append(stacked_version((stacked,)))
    assert seen == sorted(set(seen))
    with torch.inference_mode():
        assert stacked_version((torch.zeros(1),)) == -1
