"""The grouped wrapper against a row-by-row reference, over random batches, and vLLM's own wrapper beside it.

Error bound, for each element of the output: ``|error| <= 2 * eps * (|y| + |scale| * |B| @ |A| @ |x|)`` with
eps of the output's type (2**-7 for bf16, 2**-10 for fp16, 2**-23 for fp32), absolute values taken before
the products. The wrapper rounds the low-rank value once and the result once, each by at most eps / 2.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from loraplex_server.vllm_plugin.punica import GroupedPunicaWrapper
from tests.vllm_plugin.reference import Mapping, Stacked, expected_rows, largest_error

VOCABULARY = 50
SLOTS = 6
RANK_MAX = 64
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SHAPES = ((64, (64,)), (48, (48, 16, 16)), (32, (80, 80)), (96, (24,)))


def make_wrapper(cls=GroupedPunicaWrapper):
    return cls(2048, 64, "cpu")


def random_slots(rng: np.random.Generator) -> np.ndarray:
    """Slot per row: decode, prefill and mixed steps, with base rows and empty slots among them."""
    kind = rng.integers(4)
    used = rng.choice(SLOTS, size=rng.integers(1, SLOTS + 1), replace=False)
    choices = np.append(used, -1)
    if kind == 0:  # decode: one row per sequence
        return rng.choice(choices, size=rng.integers(1, 33))
    if kind == 1:  # prefill: runs of tokens
        return np.repeat(rng.choice(choices, size=rng.integers(1, 5)), rng.integers(1, 90))
    if kind == 2:  # both
        runs = [np.repeat(rng.choice(choices), rng.integers(1, 100)) for _ in range(rng.integers(1, 4))]
        return np.concatenate([rng.choice(choices, size=rng.integers(0, 17)), *runs])
    return np.full(rng.integers(1, 20), rng.choice(choices))  # all alike, base included


def announce(wrapper, slots, samples=None):
    """Tell the wrapper the batch as vLLM does: adapter ids per row, and the id in each slot."""
    ids = [100 + slot for slot in range(SLOTS)]
    rows = tuple(np.array([ids[slot] if slot >= 0 else 0 for slot in slots], dtype=np.int64))
    sampled = rows if samples is None else tuple(ids[slot] if slot >= 0 else 0 for slot in samples)
    wrapper.update_metadata(Mapping(rows, sampled), ids, SLOTS + 1, VOCABULARY)


def fill(stacked: Stacked, rng: np.random.Generator) -> None:
    """Write every slot: mixed true ranks, some adapters that touch only some projections or none."""
    for slot in range(SLOTS):
        touched = tuple(index for index in range(len(stacked.outs)) if rng.random() < 0.8)
        stacked.set(slot, int(rng.choice((1, 3, 4, 8, 16, 33, 64))), slices=touched)


def check_linear(wrapper, stacked: Stacked, slots, rng) -> None:
    x, y = stacked.input(len(slots)), stacked.output(len(slots))
    scale = float(rng.choice((1.0, 0.5)))
    expected = expected_rows(y, x, stacked.a, stacked.b, slots, scale)
    actual = y.clone()
    wrapper.add_lora_linear(actual, x, stacked.a, stacked.b, scale, stacked.outs)
    base = torch.from_numpy(np.flatnonzero(np.asarray(slots) < 0))
    assert torch.equal(actual[base], y[base]), "a base row was changed"
    assert largest_error(actual, expected, y, x, stacked.a, stacked.b, slots, scale) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_every_row_gets_its_own_delta_through_batches_and_slot_churn(dtype, seed):
    rng = np.random.default_rng([seed, DTYPES.index(dtype)])
    wrapper = make_wrapper()
    modules = [
        Stacked(rng, slots=SLOTS, rank=RANK_MAX, width=width, outs=outs, dtype=dtype)
        for width, outs in SHAPES
    ]
    for stacked in modules:
        fill(stacked, rng)
    for _ in range(12):
        slots = random_slots(rng)
        announce(wrapper, slots)
        for stacked in modules:
            check_linear(wrapper, stacked, slots, rng)
        # A slot is overwritten between steps, with the batch unchanged: the next step must use the new
        # weights.
        stacked = modules[int(rng.integers(len(modules)))]
        stacked.set(int(rng.integers(SLOTS)), int(rng.choice((1, 2, 64))))
        check_linear(wrapper, stacked, slots, rng)


@pytest.mark.parametrize("seed", range(6))
def test_inputs_weights_and_outputs_of_different_types_are_joined_in_fp32(seed):
    rng = np.random.default_rng(seed)
    wrapper = make_wrapper()
    stacked = Stacked(rng, slots=SLOTS, rank=16, width=32, outs=(24, 8), dtype=torch.bfloat16)
    for slot in range(SLOTS):
        stacked.set(slot, 5)
    slots = random_slots(rng)
    announce(wrapper, slots)
    x, y = stacked.input(len(slots)), stacked.output(len(slots)).float()
    expected = expected_rows(y, x, stacked.a, stacked.b, slots)
    actual = y.clone()
    wrapper.add_lora_linear(actual, x, stacked.a, stacked.b, 1.0, stacked.outs)
    assert largest_error(actual, expected, y, x, stacked.a, stacked.b, slots) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_rows_get_their_own_delta(dtype):
    rng = np.random.default_rng(7)
    wrapper = make_wrapper()
    stacked = Stacked(rng, slots=SLOTS, rank=16, width=16, outs=(40,), dtype=dtype)
    for slot in range(SLOTS - 1):  # the last adapter has no embedding weights
        stacked.set(slot, slot + 1)
    for _ in range(10):
        slots = random_slots(rng)
        announce(wrapper, slots)
        lookup, y = stacked.input(len(slots)), stacked.output(len(slots))
        expected = expected_rows(y, lookup, None, stacked.b, slots)
        actual = y.clone()
        wrapper.add_lora_embedding(actual, lookup, stacked.b[0], add_input=True)
        assert largest_error(actual, expected, y, lookup, None, stacked.b, slots) <= 1
        stacked.set(int(rng.integers(SLOTS)), int(rng.integers(1, 17)))


def test_embedding_lookups_stay_inside_the_stacked_table_and_in_the_rows_own_slot():
    wrapper = make_wrapper()
    announce(wrapper, [2, -1, 0, 5])
    assert wrapper._embeddings_indices[:4].tolist() == [2 * VOCABULARY, 0, 0, 5 * VOCABULARY]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extra", [0, 4], ids=["exact", "padded"])
def test_logits_follow_the_sampled_positions_not_the_tokens(dtype, extra):
    rng = np.random.default_rng(3)
    wrapper = make_wrapper()
    stacked = Stacked(rng, slots=SLOTS, rank=16, width=24, outs=(VOCABULARY,), dtype=dtype)
    for slot in range(SLOTS):
        stacked.set(slot, 16 - slot)
    for _ in range(10):
        tokens, samples = random_slots(rng), random_slots(rng)
        announce(wrapper, tokens, samples)
        x = stacked.input(len(samples))
        y = torch.cat([stacked.output(len(samples)), torch.zeros(len(samples), extra, dtype=dtype)], dim=1)
        expected = expected_rows(y, x, stacked.a, stacked.b, samples)
        actual = y.clone()
        wrapper.add_lora_logits(actual, x, stacked.a[0], stacked.b[0], 1.0)
        assert largest_error(actual, expected, y, x, stacked.a, stacked.b, samples) <= 1


def test_logits_of_prompt_rows_use_the_one_adapter_and_are_refused_when_there_are_two():
    rng = np.random.default_rng(5)
    wrapper = make_wrapper()
    stacked = Stacked(rng, slots=SLOTS, rank=8, width=24, outs=(VOCABULARY,), dtype=torch.float32)
    for slot in range(SLOTS):
        stacked.set(slot, 8)
    x, y = stacked.input(9), stacked.output(9)
    announce(wrapper, [4, 4])
    actual = y.clone()
    wrapper.add_lora_logits(actual, x, stacked.a[0], stacked.b[0], 1.0)
    expected = expected_rows(y, x, stacked.a, stacked.b, [4] * 9)
    assert largest_error(actual, expected, y, x, stacked.a, stacked.b, [4] * 9) <= 1
    announce(wrapper, [4, 3])
    with pytest.raises(ValueError, match="batch of that adapter alone"):
        wrapper.add_lora_logits(y.clone(), x, stacked.a[0], stacked.b[0], 1.0)


def test_sharded_shrink_and_expand_equal_the_whole():
    rng = np.random.default_rng(11)
    wrapper = make_wrapper()
    stacked = Stacked(rng, slots=SLOTS, rank=16, width=32, outs=(20, 12), dtype=torch.float32)
    fill_ranks = [stacked.set(slot, 16) for slot in range(SLOTS)]
    assert len(fill_ranks) == SLOTS
    slots = [0, -1, 3, 3, 5, -1, 0]
    announce(wrapper, slots)
    x, y = stacked.input(len(slots)), stacked.output(len(slots))
    low = torch.zeros(2, len(slots), 16)
    wrapper.add_shrink(low, x, stacked.a, 1.0)
    actual = y.clone()
    wrapper.add_expand(actual, low, stacked.b, stacked.outs, offset_start=0, add_input=True)
    expected = expected_rows(y, x, stacked.a, stacked.b, slots)
    assert largest_error(actual, expected, y, x, stacked.a, stacked.b, slots) <= 1


def test_a_full_layer_replaces_only_the_rows_whose_adapter_brings_one():
    wrapper = make_wrapper()
    announce(wrapper, [0, -1, 2, 1])
    weight, bias = torch.randn(SLOTS, 1, 3, 8), torch.randn(SLOTS, 3)
    enabled = torch.zeros(SLOTS, dtype=torch.bool)
    enabled[:2] = True
    x, y = torch.randn(4, 8), torch.randn(4, 3)
    actual = y.clone()
    wrapper.apply_lora_full_linear(actual, x, weight, bias, enabled)
    assert torch.equal(actual[1:3], y[1:3])
    for row, slot in ((0, 0), (3, 1)):
        torch.testing.assert_close(actual[row], weight[slot, 0] @ x[row] + bias[slot])


def test_without_adapter_rows_nothing_is_read_at_all():
    """Every argument but `y` may be missing: the early return comes before any of them is touched."""
    wrapper = make_wrapper()
    announce(wrapper, [-1, -1, -1])
    y = torch.randn(3, 8)
    kept = y.clone()
    wrapper.add_lora_linear(y, None, None, None, 1.0, (8,))
    wrapper.add_lora_embedding(y, None, None)
    wrapper.add_lora_logits(y, None, None, None, 1.0)
    assert torch.equal(y, kept)
    assert wrapper.no_lora


def test_fewer_rows_than_announced_are_refused():
    rng = np.random.default_rng(1)
    wrapper = make_wrapper()
    stacked = Stacked(rng, slots=SLOTS, rank=4, width=8, outs=(8,), dtype=torch.float32)
    stacked.set(0, 4)
    announce(wrapper, [0, 0, 0])
    with pytest.raises(ValueError, match="2 rows"):
        wrapper.add_lora_linear(stacked.output(2), stacked.input(2), stacked.a, stacked.b, 1.0, stacked.outs)


def test_a_row_whose_adapter_is_in_no_slot_is_refused():
    wrapper = make_wrapper()
    with pytest.raises(KeyError):
        wrapper.update_metadata(Mapping((9,), (9,)), [7, None], 3, VOCABULARY)


def test_the_error_in_bf16_is_not_above_that_of_the_stock_wrapper():
    """In bf16, where errors are large enough to matter; in fp32 only the order of the sums differs."""
    rng = np.random.default_rng(2)
    stacked = Stacked(rng, slots=SLOTS, rank=16, width=896, outs=(256,), dtype=torch.bfloat16)
    for slot in range(SLOTS):
        stacked.set(slot, 16)
    slots = np.arange(SLOTS).repeat(40)
    x, y = stacked.input(len(slots)), stacked.output(len(slots))
    expected = expected_rows(y, x, stacked.a, stacked.b, slots)
    errors = []
    for wrapper in (make_wrapper(), make_wrapper(PunicaWrapperCPU)):
        announce(wrapper, slots)
        actual = y.clone()
        wrapper.add_lora_linear(actual, x, stacked.a, stacked.b, 1.0, stacked.outs)
        errors.append(float((actual.double() - expected).abs().mean()))
    assert errors[0] <= errors[1] * 1.05


def test_the_stock_wrapper_gives_base_rows_the_last_slots_adapter():
    """Why this plugin exists. If this fails, vLLM has fixed its wrapper: read its change, then retire the
    claim.

    The same check that every batch above passes with ours: a base row between adapter rows must stay as it
    is.
    """
    rng = np.random.default_rng(4)
    stacked = Stacked(rng, slots=SLOTS, rank=8, width=16, outs=(16,), dtype=torch.float32)
    for slot in range(SLOTS):
        stacked.set(slot, 8)
    stock = make_wrapper(PunicaWrapperCPU)
    slots = [1, -1, 2]
    announce(stock, slots)
    x, y = stacked.input(3), stacked.output(3)
    actual = y.clone()
    stock.add_lora_linear(actual, x, stacked.a, stacked.b, 1.0, stacked.outs)
    last = expected_rows(y, x, stacked.a, stacked.b, [1, SLOTS - 1, 2])
    assert not torch.equal(actual[1], y[1]), "vLLM's own wrapper now leaves base rows alone"
    torch.testing.assert_close(actual.double(), last, rtol=1e-4, atol=1e-4)
    announce(ours := make_wrapper(), slots)
    check_linear(ours, stacked, slots, rng)
