"""NF4 linear layers on CPU: the weights of bitsandbytes to the bit, products within their bound, and loud on misuse."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from loraplex_server.vllm_plugin.cpu import nf4
from loraplex_server.vllm_plugin.cpu.nf4 import NotNF4Error, Packed, Quantized, linear, pack
from tests.vllm_plugin.nf4_cases import random_weight, rows_in_bytes, run_nf4_cases, weight_in_bytes

CASES = 150  # of each kind; `make reliability K=kernels` runs 10,000

pytestmark = pytest.mark.usefixtures("nf4_here")


@pytest.fixture(params=[False, True], ids=["bf16", "int8"])
def int8(request: pytest.FixtureRequest) -> bool:
    """Both kinds of products."""
    if request.param and not nf4.supported(int8=True):
        pytest.skip("this processor has no AVX-512-VNNI")
    return bool(request.param)


def quantized(outs: int, ins: int, *, seed: int = 0) -> Quantized:
    return random_weight(np.random.default_rng(seed), outs, ins, 64)


def apply(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    return linear(x, packed.memory, bias, packed.out_features, packed.group, packed.int8)


def unpacked(packed: Packed) -> torch.Tensor:
    """The weight as the kernels have it: an identity takes each value through unchanged."""
    return apply(torch.eye(packed.in_features, dtype=torch.bfloat16), packed).t()


def test_random_weights_and_rows_stay_within_the_error_bound(int8):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    assert run_nf4_cases(seed, CASES, int8=int8) <= 1


def test_rounding_to_eight_bits_is_within_half_a_step():
    """The law that `nf4_cases` states; the kernels are held to what these two functions return."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for size in (1e-30, 1.0, 1e30):
        x = torch.from_numpy(size * rng.standard_normal((50, 640))).bfloat16()
        rounded, step = rows_in_bytes(x, 64)
        assert ((x.double() - rounded).abs() <= step * (0.5 + 2.0**-14)).all()
        assert (rounded.abs() <= 127 * step).all()
    one = random_weight(rng, 40, 640, 64)
    scales = one.absmax.double().repeat_interleave(64).view(40, 640)
    codes = torch.stack([one.codes >> 4, one.codes & 15], dim=1).view(40, 640).long()
    difference = (weight_in_bytes(one) - nf4.TABLE.double()[codes] * scales).abs()
    assert (difference <= scales / 254 * (1 + 2.0**-20)).all()


def test_many_rows_by_torch_stay_within_the_error_bound(monkeypatch):
    """The way of processors with AMX, on this one; strips end within the weight."""
    monkeypatch.setattr(nf4, "_amx", lambda: True)
    monkeypatch.setattr("loraplex_server.vllm_plugin.cpu.many_rows.MANY_ROWS", 5)
    monkeypatch.setattr(nf4, "STRIP_BYTES", 32 * 2 * 300)
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    assert run_nf4_cases(seed, CASES // 3) <= 1


@pytest.mark.parametrize("shape", [(96, 128), (17, 896), (128, 4864)])
def test_weights_are_those_of_bitsandbytes_to_the_bit(shape):
    weight = torch.randn(shape).bfloat16()
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    theirs = dequantize_4bit(codes, state)
    ours = unpacked(pack([Quantized(codes, state.absmax, shape, state.blocksize)]))
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def test_blocks_that_begin_within_a_row_have_their_own_scale():
    weight = torch.randn(33, 688).bfloat16() * torch.logspace(-3, 3, 33)[:, None].bfloat16()
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    ours = unpacked(pack([Quantized(codes, state.absmax, (33, 688), state.blocksize)]))
    scales = state.absmax.repeat_interleave(64)[: weight.numel()].view(33, 688)
    widest = (nf4.TABLE[1:] - nf4.TABLE[:-1]).max() / 2
    assert ((ours - weight).abs() <= scales * (widest + 0.01)).all()


def test_packed_weights_take_the_memory_of_the_original(int8):
    one = quantized(4864, 896)
    original = one.codes.numel() + 4 * one.absmax.numel()
    assert original <= pack([one], int8=int8).memory.numel() <= original + 64


def test_the_result_does_not_depend_on_the_number_of_threads(int8):
    packed, threads = pack([quantized(256, 4864)], int8=int8), torch.get_num_threads()
    for n_rows in (1, 16, 50):
        x = torch.randn(n_rows, 4864).bfloat16()
        try:
            results = [(torch.set_num_threads(n), apply(x, packed))[1] for n in (1, 2, 3)]
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("n_rows", [5, 40])
def test_what_is_not_finite_stays_in_its_row(n_rows, int8):
    x = torch.randn(n_rows, 128).bfloat16()
    expected = apply(x, packed := pack([quantized(70, 128)], int8=int8))
    x[1, 3], x[2, 7] = torch.inf, torch.nan
    y = apply(x, packed)
    others = [row for row in range(n_rows) if row not in (1, 2)]
    assert torch.equal(y[others], expected[others])
    assert y[2].isnan().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("n_rows", [3, 20])
def test_nothing_beside_the_result_is_written(n_rows, int8):
    packed = pack([quantized(45, 64)], int8=int8)
    x = torch.randn(n_rows, 64).bfloat16()
    around = torch.full((n_rows + 2, 45 + 9), 7.0).bfloat16()
    status = nf4.load().lp_nf4_linear(
        around[1:, 4:].data_ptr(), around.stride(0), x.data_ptr(), 64, packed.memory.data_ptr(), None,
        nf4.TABLE.data_ptr(), n_rows, 45, 64, packed.group, int8, None,
    )  # fmt: skip
    assert status == 0
    assert torch.equal(around[1:-1, 4:49], apply(x, packed))
    around[1:-1, 4:49] = 7.0
    assert (around == 7).all()


def test_shapes_of_any_dimension_and_no_rows_at_all(int8):
    packed = pack([quantized(40, 64)], int8=int8)
    x = torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(apply(x, packed), apply(x.view(6, 64), packed).view(2, 3, 40))
    assert apply(x[:0], packed).shape == (0, 3, 40)
    across = torch.randn(64, 5).bfloat16().t()
    assert torch.equal(apply(across, packed), apply(across.contiguous(), packed))


def test_misuse_is_refused_before_memory_is_touched():
    packed = pack([quantized(40, 64)])
    x, bias = torch.zeros(2, 64).bfloat16(), torch.zeros(40).bfloat16()
    for wrong_x, wrong_bias in [
        (x.float(), bias),
        (x, bias.float()),
        (x, bias[:-1]),
        (torch.zeros(2, 128).bfloat16(), bias),
    ]:
        with pytest.raises(NotNF4Error):
            apply(wrong_x, packed, wrong_bias)
    for wrong in [replace(packed, out_features=80), replace(packed, group=32), replace(packed, group=0)]:
        with pytest.raises(NotNF4Error):
            apply(x, wrong)


def test_weights_the_kernels_do_not_know_are_refused():
    one = quantized(40, 64)
    for wrong in [
        [replace(one, codes=one.codes[:-1])],
        [replace(one, absmax=one.absmax[:-1])],
        [replace(one, absmax=one.absmax.half())],
        [replace(one, codes=one.codes.view(torch.int8))],
        [one, quantized(40, 128)],
        [Quantized(one.codes, one.absmax, (64, 40), 64)],  # gcd(40, 64) is 8
    ]:
        with pytest.raises(NotNF4Error):
            pack(wrong)


def test_the_operator_is_what_torch_expects_of_one(int8):
    packed = pack([quantized(40, 64)], int8=int8)
    for x in (torch.randn(3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()):
        torch.library.opcheck(
            torch.ops.loraplex.nf4_linear.default,
            (x, packed.memory, None, packed.out_features, packed.group, packed.int8),
        )


def test_a_compiled_graph_keeps_the_operator():
    packed = pack([quantized(40, 64)])
    bias = torch.randn(40).bfloat16()

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.loraplex.nf4_linear(
            x, packed.memory, bias, packed.out_features, packed.group, packed.int8
        )
        return y.relu()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for n_rows in (2, 5, 33):
        x = torch.randn(n_rows, 64).bfloat16()
        assert torch.equal(compiled(x), layer(x))


def test_a_rows_result_is_the_same_to_the_bit_whatever_rows_are_beside_it(int8):
    packed = pack([quantized(96, 4864)], int8=int8)  # more inputs than are taken at a time
    x = torch.randn(70, 4864).bfloat16()
    together = apply(x, packed)
    for count in (1, 2, 5, 9, 16, 17, 33):
        assert torch.equal(apply(x[:count], packed), together[:count]), count


def test_in_eight_bits_a_group_of_zeros_and_numbers_too_small_to_round_count_as_zero():
    if not nf4.supported(int8=True):
        pytest.skip("this processor has no AVX-512-VNNI")
    packed = pack([quantized(40, 128)], int8=True)
    x = torch.randn(3, 128).bfloat16()
    x[:, 64:] = 0
    expected = apply(x, packed)
    x[:, 64:] = 1e-37
    assert torch.equal(apply(x, packed), expected)
    assert not apply(torch.zeros(2, 128).bfloat16(), packed).any()
