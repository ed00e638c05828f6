"""The CPU LoRA kernels: right for every row of a random batch, and nothing is touched that is not asked for."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from loraplex_server.vllm_plugin.cpu.kernels import (
    SAMPLES,
    TOKENS,
    Binding,
    Geometry,
    KernelError,
    Piece,
    Table,
    pack_b,
    packed_b_bytes,
)
from tests.vllm_plugin.kernel_cases import ISAS, World, instruction_set, run_cases

CASES = 30  # per instruction set and type; `make reliability K=kernels` runs 10,000
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture
def world(loaded):
    return World(np.random.default_rng(0), loaded, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ISAS)
def test_random_batches_stay_within_the_error_bound(loaded, dtype, name):
    with instruction_set(loaded, name) as here:
        if not here:
            pytest.skip(f"this processor has no {name}")
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    assert run_cases(loaded, dtype, name, seed, CASES) <= 1


def test_groups_of_many_rows_by_torchs_products_stay_within_the_bound_too(loaded):
    """The way of processors with AMX, forced here; groups below the limit still go through the kernels."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    world = World(rng, loaded, torch.bfloat16, many_from=3)
    for _ in range(60):
        assert world.check() <= 1
        world.churn()


def single(loaded, dtype=torch.bfloat16, *, features=40, out=70, rank=3, slots=2):
    """A table of one module with the adapter of slot 0 bound; returns it with A and B."""
    torch.manual_seed(features)
    a, b = torch.randn(rank, features).to(dtype), torch.randn(out, rank).to(dtype)
    packed = torch.empty(packed_b_bytes(out, rank, dtype), dtype=torch.uint8)
    pack_b(loaded, packed, b)
    table = Table(loaded, [Geometry(features, (0,), (out,))], slots, dtype)
    table.bind(0, Binding.of([Piece(0, 0, rank, a.data_ptr(), packed.data_ptr())], keep=(a, packed)))
    return table, a, b


def announce(table, *slots, kind=TOKENS):
    table.rows(kind, np.array(slots, dtype=np.int32))


def test_packed_b_holds_pairs_of_ranks_tile_by_tile(loaded):
    b = torch.arange(70 * 3).reshape(70, 3).bfloat16()
    packed = torch.empty(packed_b_bytes(70, 3, torch.bfloat16), dtype=torch.uint8)
    pack_b(loaded, packed, b, scale=0.5)
    halved = torch.nn.functional.pad(b * 0.5, (0, 1)).reshape(70, 2, 2).permute(1, 0, 2)
    first, rest = packed.view(torch.bfloat16).split([64 * 4, 6 * 4])
    assert torch.equal(first.reshape(2, 64, 2), halved[:, :64])
    assert torch.equal(rest.reshape(2, 6, 2), halved[:, 64:])


def test_what_is_not_finite_stays_in_its_row(loaded):
    table, *_ = single(loaded)
    announce(table, 0, 0, 0, 0, 0, -1)
    x, y = torch.ones(6, 40).bfloat16(), torch.zeros(6, 70).bfloat16()
    x[1, 3], x[2, 7] = torch.inf, torch.nan
    y[3, 5] = torch.nan
    table.add(0, TOKENS, y, x)
    assert y[2].isnan().all()
    assert not y[1].isfinite().any()
    assert y[3].isnan().nonzero().tolist() == [[5]]
    assert torch.isfinite(y[[0, 4, 5]]).all()


def test_a_rebound_slot_has_the_new_weights_and_an_emptied_one_is_refused(loaded):
    table, *_ = single(loaded)
    other = Binding.of([], keep=None)
    announce(table, 0)
    x, y = torch.ones(1, 40).bfloat16(), torch.zeros(1, 70).bfloat16()
    table.add(0, TOKENS, y, x)
    changed = y.clone()
    assert changed.any()
    table.bind(0, other)  # an adapter that does not touch this module, without a new mapping
    table.add(0, TOKENS, y, x)
    assert torch.equal(y, changed)
    table.unbind(0)
    with pytest.raises(KernelError, match="no adapter"):
        table.add(0, TOKENS, y, x)
    with pytest.raises(KernelError, match="no adapter"):
        announce(table, 0)
    assert table.idle[TOKENS]


def test_a_row_that_asks_for_a_slot_without_adapter_is_refused(loaded):
    table, *_ = single(loaded)
    for slots in ((0, 1), (2,), (7_000_000,)):
        with pytest.raises(KernelError):
            announce(table, *slots)


def test_fewer_rows_than_announced_are_refused_and_more_are_padding(loaded):
    table, *_ = single(loaded)
    announce(table, 0, -1, 0)
    y = torch.zeros(2, 70).bfloat16()
    with pytest.raises(KernelError, match="announced"):
        table.add(0, TOKENS, y, torch.ones(2, 40).bfloat16())
    assert not y.any()
    y = torch.zeros(5, 70).bfloat16()
    table.add(0, TOKENS, y, torch.ones(5, 40).bfloat16())
    assert y.any(dim=1).tolist() == [True, False, True, False, False]


def test_logits_of_a_whole_prompt_take_the_one_adapter_and_are_refused_when_there_are_two(loaded):
    table, *_ = single(loaded)
    announce(table, 0, kind=SAMPLES)
    x, y = torch.ones(9, 40).bfloat16(), torch.zeros(9, 70).bfloat16()
    table.add(0, SAMPLES, y, x)
    assert y.any(dim=1).all()
    assert torch.equal(y[0], y[8])
    announce(table, 0, -1, kind=SAMPLES)
    with pytest.raises(KernelError, match="announced"):
        table.add(0, SAMPLES, y, x)


@pytest.mark.parametrize(
    ("y", "x"),
    [
        (torch.zeros(1, 69), torch.zeros(1, 40)),
        (torch.zeros(1, 70), torch.zeros(1, 39)),
        (torch.zeros(1, 70), torch.zeros(2, 40)),
        (torch.zeros(70, 2).T, torch.zeros(2, 40)),
        (torch.zeros(1, 70, dtype=torch.float16), torch.zeros(1, 40)),
    ],
    ids=["narrow y", "narrow x", "rows differ", "columns apart", "another type"],
)
def test_tensors_that_do_not_fit_are_refused(loaded, y, x):
    table, *_ = single(loaded, torch.float32)
    announce(table, 0)
    with pytest.raises(KernelError, match="module 0"):
        table.add(0, TOKENS, y, x)


def test_ids_outside_the_vocabulary_are_refused_before_anything_is_written(loaded):
    a, packed = torch.randn(10, 4), torch.empty(packed_b_bytes(6, 4, torch.float32), dtype=torch.uint8)
    pack_b(loaded, packed, torch.randn(6, 4))
    table = Table(loaded, [Geometry(10, (0,), (6,))], 1, torch.float32)
    table.bind(0, Binding.of([Piece(0, 0, 4, a.data_ptr(), packed.data_ptr())], keep=(a, packed)))
    announce(table, 0, 0)
    y = torch.zeros(2, 6)
    for wrong in (10, -1, 1 << 40):
        with pytest.raises(KernelError, match="vocabulary"):
            table.add_embedding(0, y, torch.tensor([3, wrong]))
    assert not y.any()


@pytest.mark.parametrize(
    "piece",
    [Piece(1, 0, 1, 8, 8), Piece(-1, 0, 1, 8, 8), Piece(0, 1, 1, 8, 8), Piece(0, 0, -1, 8, 8),
     Piece(0, 0, 5000, 8, 8), Piece(0, 0, 1, 0, 8), Piece(0, 0, 1, 8, 0)],
)  # fmt: skip
def test_a_piece_out_of_range_is_refused_and_the_slot_stays_as_it_was(loaded, piece):
    table, *_ = single(loaded)
    with pytest.raises(KernelError):
        table.bind(0, Binding.of([piece], keep=None))
    announce(table, 0)
    y = torch.zeros(1, 70).bfloat16()
    table.add(0, TOKENS, y, torch.ones(1, 40).bfloat16())
    assert y.any()


@pytest.mark.parametrize("slot", [-1, 2, 1 << 30])
def test_a_slot_out_of_range_is_refused(loaded, slot):
    table, *_ = single(loaded)
    with pytest.raises(KernelError, match="slot"):
        table.bind(slot, Binding.of([], keep=None))
    with pytest.raises(KernelError, match="slot"):
        table.unbind(slot)


def test_slices_that_overlap_are_refused(loaded):
    with pytest.raises(KernelError):
        Table(loaded, [Geometry(8, (0, 4), (5, 5))], 1, torch.float32)


def test_results_do_not_depend_on_the_number_of_threads(loaded):
    table, *_ = single(loaded, features=896, out=4864, rank=16)
    announce(table, *[0] * 200)
    x, threads = torch.randn(200, 896).bfloat16(), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            y = torch.zeros(200, 4864).bfloat16()
            table.add(0, TOKENS, y, x)
            results.append(y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [40, 256, 896, 1000])
def test_a_rows_result_is_the_same_to_the_bit_whatever_rows_are_beside_it(loaded, dtype, features):
    table, _, _ = single(loaded, dtype, features=features, out=130, rank=9)
    x, y = torch.randn(90, features).to(dtype), torch.randn(90, 130).to(dtype)
    together = y.clone()
    announce(table, *(90 * (0,)))
    table.add(0, TOKENS, together, x)
    for count in (1, 3, 4, 7):
        announce(table, *(count * (0,)))
        apart = y[:count].clone()
        table.add(0, TOKENS, apart, x[:count])
        assert torch.equal(apart, together[:count]), count
