"""The true rank of each adapter slot in vLLM's stacked LoRA tensors.

vLLM pads every slot to the engine's maximum rank and keeps slots of adapters that do not touch a module as
zeros. Trailing zero rows of A (or columns of B) add exactly nothing, so the products may stop before them:
a rank-4 adapter costs rank 4, an untouched module costs nothing.

Slots are overwritten in place by vLLM's layers (`set_lora`, `reset_lora`) without telling the wrapper. The
wrapper sees it from the tensors' version counters, which torch raises at every in-place write through any
view, also in inference mode; it then reads all slots of the module again (about 3 ms for all modules of a
0.5B model with 16 slots of rank 16, once per loaded adapter). Writing through ``.data`` would pass unseen;
vLLM does not.
"""

from __future__ import annotations

import torch


def stacked_version(tensors: tuple[torch.Tensor, ...]) -> int:
    """Return a number that grows with every in-place write to any of the tensors.

    -1 for tensors made in inference mode, which have no version counter.
    """
    if any(tensor.is_inference() for tensor in tensors):
        return -1
    return sum(tensor._version for tensor in tensors)


def true_ranks_of_a(stacked: torch.Tensor) -> tuple[int, ...]:
    """Return per slot the number of leading rows of A up to its last row that is not all zero.

    Args:
        stacked: (slots, 1, max_rank, in_features).

    """
    rows = stacked[:, 0]
    if not rows.is_contiguous() or rows.shape[-1] * rows.element_size() % 8:
        return _last_used(rows.ne(0).any(dim=-1))
    # Eight bytes at a time: many times as fast as comparing bf16 values, and it can only err towards calling a
    # row of negative zeros used.
    low, high = torch.aminmax(rows.view(torch.int64), dim=-1)
    return _last_used((low != 0) | (high != 0))


def true_ranks_of_b(stacked: torch.Tensor) -> tuple[int, ...]:
    """Return per slot the number of leading columns of B up to its last column that is not all zero.

    Args:
        stacked: (slots, 1, out_features, max_rank).

    """
    return _last_used(stacked[:, 0].ne(0).any(dim=1))


def _last_used(used: torch.Tensor) -> tuple[int, ...]:
    """Return per line of `used` (slots, max_rank) the index after its last True, 0 where there is none."""
    numbers = torch.arange(1, used.shape[-1] + 1, device=used.device)
    return tuple((used * numbers).amax(dim=-1).tolist())
