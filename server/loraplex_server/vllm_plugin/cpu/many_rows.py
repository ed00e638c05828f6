"""Groups of many rows on processors with AMX: torch's own matrix products in place of our kernels.

A prefill is bound by arithmetic. Where the processor has AMX, torch's products (oneDNN) run on it, at several times the
rate of the vector instructions that our kernels use; the base's own products do so too, so ours would fall behind.
There, groups of at least `MANY_ROWS` rows of one adapter go through one pair of products per slice. Elsewhere the
kernels are as fast as torch's products without their overhead, and this is not used.

The factors are read where they lie; packed B is put back into (rank, out_features) for the product, which costs about
what 16 rows cost. Rounding is as in the kernels: the low-rank value once, y once.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

# The fixed cost of a torch product, about 20 us on one machine, is then a small part of a group's.
MANY_ROWS: Final = 128
TILE: Final = 64  # columns per tile of packed B, as in lora_isa.h

Group = tuple[int, torch.Tensor]  # slot, its rows


def useful(dtype: torch.dtype) -> bool:
    """Say whether torch's products of this type run on AMX here."""
    return dtype == torch.bfloat16 and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def split(slots: NDArray[np.int32], at_least: int) -> tuple[NDArray[np.int32], list[Group]]:
    """Take the groups of `at_least` rows out of a batch.

    Returns:
        The slot per row with -1 in the rows taken out, and the groups taken out.

    """
    present, counts = np.unique(slots, return_counts=True)
    long = [int(slot) for slot, count in zip(present, counts, strict=True) if slot >= 0 and count >= at_least]
    groups = [(slot, torch.from_numpy(np.flatnonzero(slots == slot))) for slot in long]
    return np.where(np.isin(slots, long), np.int32(-1), slots), groups


def add(y: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add ``x @ a.T @ b`` to the given rows of `y` (n, out_features); a (rank, in_features), b (rank, out_features)."""
    first, n = int(rows[0]), len(rows)
    if int(rows[-1]) - first + 1 == n:  # ascending, so they are consecutive
        y[first : first + n].addmm_(torch.mm(x[first : first + n], a.t()), b)
        return
    y.index_copy_(0, rows, y.index_select(0, rows).addmm_(torch.mm(x.index_select(0, rows), a.t()), b))


def at(address: int, n_values: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the memory at `address` as a tensor; its owner must outlive it."""
    memory = (ctypes.c_char * (n_values * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def unpacked_b(packed: torch.Tensor, out_features: int, rank: int) -> torch.Tensor:
    """Return packed bf16 B as (rank, out_features)."""
    words = (rank + 1) // 2
    full = out_features // TILE * TILE
    tiles, rest = packed[: full * words * 2], packed[full * words * 2 :]
    parts = []
    if full:
        parts.append(tiles.view(-1, words, TILE, 2).permute(1, 3, 0, 2).reshape(words * 2, full))
    if out_features > full:
        parts.append(rest.view(words, out_features - full, 2).transpose(1, 2).reshape(words * 2, -1))
    return torch.cat(parts, dim=1)[:rank]
