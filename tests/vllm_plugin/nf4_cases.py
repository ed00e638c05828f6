"""Random NF4 weights and inputs, a plain float64 reference, and the error bound the kernels are held to.

**The bound.** A weight is exactly bf16(TABLE[code] * absmax). With u = 2**-8 the unit roundoff of bf16, v = 2**-24 that
of fp32 and g(n) = n v / (1 - n v), which bounds the relative error of a sum of n terms in any order (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd ed., section 3.1; products of two bf16 values are exact in fp32), element by
element:

    |error of y| <= ((1 + g(K + 1)) (1 + u) - 1) (|x| |W| + |bias|) + K 2**-120      K = in_features

where of u only u |y| can occur: the result is rounded once. The last term is for numbers below 2**-126, which the
processor's bf16 products take for zero; values here are below 64.

**In eight bits** the weight and the rows are rounded first, by a definition that needs no tolerance: within a group of
inputs, x becomes s q with s = max |x| / 127 and q = rint(x (127 / max |x|)) in fp32, a weight absmax rint(127 TABLE) /
127. The kernels are held to the product of these, whose G = K / group terms are exact until they are scaled (three
roundings) and added up:

    |error of y| <= ((1 + g(G + 4)) (1 + u) - 1) (|s q| |W| + |bias|) + K 2**-110

and the rounding to ``|x - s q| <= s (1/2 + 2**-14)``, ``|W - absmax TABLE| <= absmax / 254 (1 + 2**-20)``. The last
term is for groups that are all below 1e-36, which count as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loraplex_server.vllm_plugin.cpu.nf4 import GROUPS, TABLE, Quantized, linear, pack

MARGIN = 7  # columns beside x that belong to something else
ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 23, 24, 25, 40, 61)
BLOCKS = (64, 64, 64, 32, 128, 256, 4096)


@dataclass(frozen=True)
class Case:
    """Projections that share their input, and what they are applied to."""

    weights: list[Quantized]
    x: torch.Tensor
    bias: torch.Tensor | None


def random_case(rng: np.random.Generator) -> Case:
    """Return weights with rows that are whole blocks and rows that are not, sizes around every edge of the kernels."""
    block = int(rng.choice(BLOCKS))
    in_features = GROUPS[-1] * int(rng.integers(1, 40) if rng.random() < 0.8 else rng.integers(40, 160))
    outs = [int(rng.integers(1, 70)) for _ in range(int(rng.choice((1, 1, 2, 3))))]
    weights = [random_weight(rng, out, in_features, block) for out in outs]
    n_rows = int(rng.choice(ROWS)) if rng.random() < 0.97 else int(rng.integers(630, 660))
    wide = torch.from_numpy(rng.standard_normal((n_rows, in_features + MARGIN), dtype=np.float32)).bfloat16()
    bias = torch.from_numpy(rng.standard_normal(sum(outs), dtype=np.float32)).bfloat16()
    return Case(weights, wide[:, :in_features], bias if rng.random() < 0.5 else None)


def random_weight(rng: np.random.Generator, outs: int, ins: int, block: int) -> Quantized:
    """Return any codes, and scales from 0 over tiny ones to 4."""
    codes = torch.from_numpy(rng.integers(0, 256, outs * ins // 2, dtype=np.uint8))
    blocks = -(outs * ins // -block)
    scales = rng.uniform(0, 4, blocks) * rng.choice((0.0, 1e-38, 1e-20, 0.01, 1.0, 1.0), blocks)
    return Quantized(codes, torch.from_numpy(scales.astype(np.float32)), (outs, ins), block)


def plain_weight(one: Quantized) -> torch.Tensor:
    """Return the weight (outputs, inputs) in bf16 by the definition of NF4."""
    codes = torch.stack([one.codes >> 4, one.codes & 15], dim=1).flatten().long()
    scales = one.absmax.repeat_interleave(one.block)[: codes.numel()]
    return (TABLE[codes] * scales).bfloat16().view(one.shape)


def weight_in_bytes(one: Quantized) -> torch.Tensor:
    """Return the weight (outputs, inputs) in float64 as the products in eight bits have it."""
    codes = torch.stack([one.codes >> 4, one.codes & 15], dim=1).flatten().long()
    scales = one.absmax.double().repeat_interleave(one.block)[: codes.numel()]
    return ((TABLE * 127).round().double()[codes] / 127 * scales).view(one.shape)


def rows_in_bytes(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows (rows, inputs) in float64 as the products in eight bits have them, and one step of each value."""
    groups = x.float().unflatten(1, (-1, group))
    most = groups.abs().amax(2, keepdim=True)
    # Not 127 / most, which torch takes for most.reciprocal() * 127; round() takes ties to even, as rint does.
    steps = torch.where(most < 1e-36, 0.0, groups * torch.full_like(most, 127).div(most)).round()
    size = torch.where(most < 1e-36, 0.0, most.double() / 127)
    return (steps.double() * size).flatten(1), size.expand_as(groups).flatten(1)


def error_over_bound(case: Case, *, int8: bool = False) -> float:
    """Run the kernels on a case and return the largest error as a part of what the bound allows."""
    packed = pack(case.weights, int8=int8)
    y = linear(case.x, packed.memory, case.bias, packed.out_features, packed.group, int8)
    if not int8:
        weight = torch.cat([plain_weight(one) for one in case.weights])
        return worst_over_bound(y, case.x, weight, case.bias)
    x, _ = rows_in_bytes(case.x, packed.group)
    weight = torch.cat([weight_in_bytes(one) for one in case.weights])
    terms = packed.in_features // packed.group + 3
    return worst_over_bound(y, x, weight, case.bias, terms=terms, tiny=2.0**-110)


def worst_over_bound(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    terms: int | None = None,
    tiny: float = 2.0**-120,
) -> float:
    """Return the largest error of y (rows, outputs) as a part of what the bound allows; weight is (outputs, inputs).

    `terms` are added up in fp32, as many as there are inputs if not told; `tiny` may be lost of each input.
    """
    x, weight, added = x.double(), weight.double(), 0.0 if bias is None else bias.double()
    exact, size = x @ weight.t() + added, x.abs() @ weight.abs().t() + abs(added)
    sums = (terms or weight.shape[1]) + 1
    relative = sums * 2.0**-24 / (1 - sums * 2.0**-24)
    allowed = relative * size * (1 + 2.0**-8) + 2.0**-8 * exact.abs() + weight.shape[1] * tiny
    return float(((y.double() - exact).abs() / allowed).max())


def run_nf4_cases(seed: int, count: int, *, int8: bool = False) -> float:
    """Return the worst of `count` cases; names the case that is worst so far when it breaks the bound."""
    worst = 0.0
    for number in range(count):
        worst = max(worst, error_over_bound(random_case(np.random.default_rng([seed, number])), int8=int8))
        assert worst <= 1, f"case {number} of seed {seed} is {worst} times as wrong as may be"
    return worst
