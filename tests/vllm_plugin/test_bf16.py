"""bf16 linear layers on CPU: weights unchanged, products within their bound, and loud on misuse."""

from __future__ import annotations

import random

import pytest
import torch

from loraplex_server.vllm_plugin.cpu import bf16
from loraplex_server.vllm_plugin.cpu.bf16 import NotBf16Error, linear, pack
from tests.vllm_plugin.bf16_cases import run_bf16_cases

CASES = 300  # `make reliability K=kernels` runs 10,000

pytestmark = pytest.mark.usefixtures("bf16_here")


def weight_of(outs: int, ins: int) -> torch.Tensor:
    return torch.randn(outs, ins, generator=torch.Generator().manual_seed(outs * ins)).bfloat16()


def test_random_weights_and_rows_stay_within_the_error_bound():
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    assert run_bf16_cases(seed, CASES) <= 1


@pytest.mark.parametrize("shape", [(96, 128), (17, 896), (129, 514)])
def test_an_identity_takes_each_weight_through_unchanged(shape):
    weight = weight_of(*shape)
    y = linear(torch.eye(shape[1]).bfloat16(), pack(weight), None, shape[0])
    assert torch.equal(y.t().contiguous().view(torch.int16), weight.view(torch.int16))


def test_a_weight_that_does_not_lie_in_order_is_read_as_it_is():
    weight = weight_of(64, 40).t()
    assert torch.equal(pack(weight), pack(weight.contiguous()))


def test_a_rows_result_is_the_same_to_the_bit_whatever_rows_are_beside_it():
    packed, x = pack(weight_of(96, 4864)), torch.randn(70, 4864).bfloat16()
    together = linear(x, packed, None, 96)
    for count in (1, 2, 5, 9, 12, 13, 16, 17, 33):
        assert torch.equal(linear(x[:count], packed, None, 96), together[:count]), count


def test_the_result_does_not_depend_on_the_number_of_threads():
    packed, threads = pack(weight_of(2048, 896)), torch.get_num_threads()
    for n_rows in (1, 16, 50):
        x = torch.randn(n_rows, 896).bfloat16()
        try:
            results = [(torch.set_num_threads(n), linear(x, packed, None, 2048))[1] for n in (1, 2, 3)]
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("n_rows", [5, 14, 40])
def test_what_is_not_finite_stays_in_its_row(n_rows):
    x, packed = torch.randn(n_rows, 128).bfloat16(), pack(weight_of(70, 128))
    expected = linear(x, packed, None, 70)
    x[1, 3], x[2, 7] = torch.inf, torch.nan
    y = linear(x, packed, None, 70)
    others = [row for row in range(n_rows) if row not in (1, 2)]
    assert torch.equal(y[others], expected[others])
    assert y[2].isnan().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("n_rows", [3, 14, 20])
def test_nothing_beside_the_result_is_written(n_rows):
    packed, x = pack(weight_of(45, 64)), torch.randn(n_rows, 64).bfloat16()
    around = torch.full((n_rows + 2, 45 + 9), 7.0).bfloat16()
    status = bf16.load().lp_bf16_linear(
        around[1:, 4:].data_ptr(),
        around.stride(0),
        x.data_ptr(),
        64,
        packed.data_ptr(),
        None,
        n_rows,
        45,
        64,
        None,
    )
    assert status == 0
    assert torch.equal(around[1:-1, 4:49], linear(x, packed, None, 45))
    around[1:-1, 4:49] = 7.0
    assert (around == 7).all()


def test_shapes_of_any_dimension_and_no_rows_at_all():
    packed, x = pack(weight_of(40, 64)), torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(linear(x, packed, None, 40), linear(x.view(6, 64), packed, None, 40).view(2, 3, 40))
    assert linear(x[:0], packed, None, 40).shape == (0, 3, 40)
    across = torch.randn(64, 5).bfloat16().t()
    assert torch.equal(linear(across, packed, None, 40), linear(across.contiguous(), packed, None, 40))


def test_misuse_is_refused_before_memory_is_touched():
    packed = pack(weight_of(40, 64))
    x, bias = torch.zeros(2, 64).bfloat16(), torch.zeros(40).bfloat16()
    for arguments in [
        (x.float(), packed, bias, 40),
        (x, packed, bias.float(), 40),
        (x, packed, bias[:-1], 40),
        (torch.zeros(2, 128).bfloat16(), packed, bias, 40),
        (x, packed, None, 80),
        (x, packed, None, 0),
        (x, packed.view(torch.int16), bias, 40),
    ]:
        with pytest.raises(NotBf16Error):
            linear(*arguments)


def test_weights_the_kernels_do_not_know_are_refused():
    for wrong in [torch.zeros(40, 64), torch.zeros(64).bfloat16(), torch.zeros(40, 63).bfloat16()]:
        with pytest.raises(NotBf16Error):
            pack(wrong)


def test_the_operator_is_what_torch_expects_of_one():
    packed = pack(weight_of(40, 64))
    for x in (torch.randn(3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()):
        torch.library.opcheck(torch.ops.loraplex.bf16_linear.default, (x, packed, None, 40))


def test_a_compiled_graph_keeps_the_operator():
    packed, bias = pack(weight_of(40, 64)), torch.randn(40).bfloat16()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.loraplex.bf16_linear(x, packed, bias, 40).relu()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for n_rows in (2, 5, 33):
        x = torch.randn(n_rows, 64).bfloat16()
        assert torch.equal(compiled(x), layer(x))
