"""Random bf16 layers and inputs, a plain float64 reference, and the error bound the kernels are held to.

The bound is that of `nf4_cases`: products of two bf16 values are exact in fp32, sums are fp32, y is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loraplex_server.vllm_plugin.cpu.bf16 import linear, pack
from tests.vllm_plugin.nf4_cases import MARGIN, ROWS, worst_over_bound


@dataclass(frozen=True)
class Case:
    """A layer and what it is applied to."""

    weight: torch.Tensor
    x: torch.Tensor
    bias: torch.Tensor | None


def random_case(rng: np.random.Generator) -> Case:
    """Return a layer of sizes around every edge of the kernels, with weights from tiny ones to 4 and whole zeros."""
    ins = 2 * int(rng.integers(1, 300) if rng.random() < 0.8 else rng.integers(300, 1300))
    outs = int(rng.integers(1, 150))
    scale = rng.choice((0.0, 1e-38, 1e-20, 0.01, 1.0, 1.0), (outs, 1)).astype(np.float32)
    weight = torch.from_numpy(scale * rng.standard_normal((outs, ins), dtype=np.float32)).bfloat16()
    n_rows = int(rng.choice(ROWS)) if rng.random() < 0.97 else int(rng.integers(630, 660))
    wide = torch.from_numpy(rng.standard_normal((n_rows, ins + MARGIN), dtype=np.float32)).bfloat16()
    bias = torch.from_numpy(rng.standard_normal(outs, dtype=np.float32)).bfloat16()
    return Case(weight, wide[:, :ins], bias if rng.random() < 0.5 else None)


def error_over_bound(case: Case) -> float:
    """Run the kernels on a case and return the largest error as a part of what the bound allows."""
    y = linear(case.x, pack(case.weight), case.bias, len(case.weight))
    return worst_over_bound(y, case.x, case.weight, case.bias)


def run_bf16_cases(seed: int, count: int) -> float:
    """Return the worst of `count` cases; names the case that is worst so far when it breaks the bound."""
    worst = 0.0
    for number in range(count):
        worst = max(worst, error_over_bound(random_case(np.random.default_rng([seed, number]))))
        assert worst <= 1, f"case {number} of seed {seed} is {worst} times as wrong as may be"
    return worst
