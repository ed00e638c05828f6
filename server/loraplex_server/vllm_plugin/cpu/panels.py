"""What the linear layers on `panels.h` share on this side: which rows they take, and how torch learns of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

HEADERS: Final = tuple(Path(__file__).with_name(name) for name in ("panels.h", "beside.h"))

TAKE_LORA: Final = "loraplex_take_lora"
"""The attribute of a layer on these kernels: called with its number in the LoRA table, the layer itself adds from then
on what the rows' adapters add (`ops.with_lora`)."""


def checked_rows(x: torch.Tensor, bias: torch.Tensor | None, out_features: int) -> torch.Tensor:
    """Return x (..., in_features) as (rows, in_features) with unit stride along a row.

    Raises:
        ValueError: x or bias is not bf16, or bias is not (out_features) with unit stride.

    """
    if x.dtype != torch.bfloat16 or (bias is not None and bias.dtype != torch.bfloat16):
        raise ValueError(f"x and bias must be bf16, not {x.dtype}, {None if bias is None else bias.dtype}")
    if bias is not None and (bias.shape != (out_features,) or bias.stride(0) != 1):
        raise ValueError(f"bias of {tuple(bias.shape)} for {out_features} outputs")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@dataclass
class Operator:
    """An operator of torch in the namespace loraplex, which torch.compile keeps in its graph without looking into it.

    Attributes:
        schema: name, arguments and result as torch writes them.
    """

    schema: str
    _library: list[torch.library.Library] = field(default_factory=list)  # an operator goes with its library

    def define(self, body: Callable[..., Any], like: Callable[..., Any]) -> None:
        """Make the operator on CPU; `like` returns an empty result for tracing. Again is harmless."""
        if self._library:
            return
        library, name = torch.library.Library("loraplex", "FRAGMENT"), self.schema.partition("(")[0]
        library.define(self.schema)
        library.impl(name, body, "CPU")
        torch.library.register_fake(f"loraplex::{name}", like, lib=library)
        self._library.append(library)
