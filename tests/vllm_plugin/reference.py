"""A plain reference for the LoRA wrapper: one row at a time, in float64, with nothing shared between rows.

Also builds random stacked weights in vLLM's shapes, writing slots the way vLLM's layers do: zero the slot,
then copy the adapter's own rank into the padded place, in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Mapping:
    """The fields of vLLM's LoRAMapping that a wrapper reads."""

    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]
    is_prefill: bool = True


class Stacked:
    """One wrapped module with packed projections: stacked A and B as vLLM allocates them."""

    def __init__(
        self, rng: np.random.Generator, *, slots: int, rank: int, width: int, outs: tuple[int, ...], dtype
    ):
        self.rng, self.rank, self.width, self.outs, self.dtype = rng, rank, width, outs, dtype
        self.a = tuple(torch.zeros(slots, 1, rank, width, dtype=dtype) for _ in outs)
        self.b = tuple(torch.zeros(slots, 1, out, rank, dtype=dtype) for out in outs)

    def set(self, slot: int, rank: int, *, slices: tuple[int, ...] | None = None) -> None:
        """Overwrite a slot with a new random adapter of `rank` in the given slices (all if None)."""
        for index in range(len(self.outs)):
            self.a[index][slot] = 0
            self.b[index][slot] = 0
        for index in range(len(self.outs)) if slices is None else slices:
            a = self._random(rank, self.width) / self.width**0.5
            b = self._random(self.outs[index], rank) / rank**0.5
            self.a[index][slot, 0, :rank].copy_(a)
            self.b[index][slot, 0, :, :rank].copy_(b)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape))

    def input(self, rows: int) -> torch.Tensor:
        return self._random(rows, self.width).to(self.dtype)

    def output(self, rows: int) -> torch.Tensor:
        return self._random(rows, sum(self.outs)).to(self.dtype)


def expected_rows(y, x, a, b, slots, scale=1.0):
    """Return `y` plus each row's delta, in float64; `slots[row]` is -1 for base rows, which stay as they are.

    Args:
        y: (rows, sum of the slices' outs). x: (rows, width). a, b: per slice, stacked; `a` None if applied
        already. slots: per row.
        scale: factor on the delta.

    """
    result = y.double().clone()
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        start = 0
        for index, stacked in enumerate(b):
            low = x[row].double()
            if a is not None:
                low = a[index][slot, 0].double() @ low
            width = min(stacked.shape[2], y.shape[1] - start)
            result[row, start : start + width] += (stacked[slot, 0].double() @ low)[:width] * scale
            start += stacked.shape[2]
    return result


def largest_error(actual, expected, y, x, a, b, slots, scale=1.0):
    """Return the largest error in units of the bound that `test_differential` states (<= 1 passes)."""
    unit = torch.finfo(actual.dtype).eps
    magnitude = expected_rows(
        y.abs(),
        x.abs(),
        None if a is None else tuple(one.abs() for one in a),
        tuple(one.abs() for one in b),
        slots,
        abs(scale),
    )
    bound = 2 * unit * magnitude + torch.finfo(actual.dtype).tiny
    return float(((actual.double() - expected).abs() / bound).max()) if actual.numel() else 0.0
