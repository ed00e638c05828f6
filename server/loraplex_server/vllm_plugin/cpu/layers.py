"""What vLLM's wrapped layers call in native mode: one operator per module, which the compiler need not look into."""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

from loraplex_server.vllm_plugin.cpu.kernels import SAMPLES, Table
from loraplex_server.vllm_plugin.cpu.panels import TAKE_LORA


class ModuleLora:
    """The punica wrapper of one layer: the stacked tensors vLLM passes are not read, the table is.

    See `punica.GroupedPunicaWrapper` for what the methods promise; `module` is the layer's number in the table. Where
    the base's layer runs on our kernels it adds LoRA itself, and there is nothing left to do (`by_base`).
    """

    def __init__(self, table: Table, module: int, base: torch.nn.Module | None = None) -> None:
        self.table = table
        self.module = module
        take_lora = getattr(base, TAKE_LORA, None)
        self.by_base = take_lora is not None
        if take_lora is not None:
            take_lora(module)

    def add_lora_linear(self, y: torch.Tensor, x: torch.Tensor, *_stacked: Any, **_unused: Any) -> None:
        """Add each row's delta to `y` (rows, sum of slices), for `x` (rows, in_features)."""
        if not self.by_base:
            torch.ops.loraplex.add_lora(y, x, self.module)

    def add_lora_logits(self, y: torch.Tensor, x: torch.Tensor, *_stacked: Any, **_unused: Any) -> None:
        """Add the delta of each sampled position's adapter to the logits `y` (positions, vocabulary).

        Raises:
            ValueError: other rows than vLLM announced, and adapters differ among them.

        """
        if y.dtype == self.table.dtype:
            torch.ops.loraplex.add_lora_logits(y, x, self.module)
        elif not self.table.idle[SAMPLES]:  # a head computed in fp32 over adapters in bf16
            delta = torch.zeros_like(y, dtype=self.table.dtype)
            torch.ops.loraplex.add_lora_logits(delta, x.to(delta.dtype), self.module)
            y += delta


class NativeEmbedding(VocabParallelEmbeddingWithLoRA):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's looks A up in its stacked tensors for every row; here only rows with an adapter look it up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (..., dim) of token ids `x`, adapters' deltas added."""
        y = self.base_layer.forward(x)
        torch.ops.loraplex.add_lora_embedding(y, x, self.punica_wrapper.module)
        return y
