"""Linear layers of a bf16 base (`bf16.cpp`), and the operator that torch may compile around.

    memory = pack(weight)                                          # (outputs, inputs), once
    y = torch.ops.loraplex.bf16_linear(x, memory, bias, outputs)
    y = torch.ops.loraplex.bf16_linear_lora(x, memory, bias, outputs, module)      # and what adapters add (`ops`)

Sums are fp32, the bias is added in fp32, the result is rounded to bf16 once. A row's result is the same to the bit
whatever rows are beside it and on any number of threads. The packed weight takes the memory of the original, outputs
padded to a multiple of 32. With few rows each weight is read once from memory; docs/performance.md has the figures,
beside those of oneDNN, which vLLM uses.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

import torch

from loraplex_server.vllm_plugin.cpu import build, ops, pages
from loraplex_server.vllm_plugin.cpu.build import INT, LONG, POINTER, Signature
from loraplex_server.vllm_plugin.cpu.panels import HEADERS, Operator, checked_rows

SOURCES: Final = (Path(__file__).with_name("bf16.cpp"), *HEADERS)

_SIGNATURES: Final[Mapping[str, Signature]] = {
    "lp_bf16_supported": (INT, ()),
    "lp_bf16_values": (LONG, (LONG, LONG)),
    "lp_bf16_pack": (INT, (POINTER, POINTER, LONG, LONG)),
    "lp_bf16_linear": (INT, (POINTER, LONG, POINTER, LONG, POINTER, POINTER, LONG, LONG, LONG, POINTER)),
}
_MESSAGES: Final = {-1: "a null pointer or a size that cannot be", -2: "out of memory"}


class NotBf16Error(ValueError):
    """The weight or the rows are not what these kernels compute with."""


@cache
def load() -> ctypes.CDLL:
    """Build the kernels if need be, load them and make the operator.

    Raises:
        BuildError: there is no compiler, or it failed.

    """
    loaded = build.load(SOURCES, _SIGNATURES)
    _LINEAR.define(linear, _like_linear)
    _LINEAR_LORA.define(_linear_lora, _like_linear)
    return loaded


def supported() -> bool:
    """Whether this processor has AVX-512-BF16.

    Raises:
        BuildError: the kernels cannot be built, so it cannot be asked.

    """
    return platform.machine() == "x86_64" and bool(load().lp_bf16_supported())


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` (outputs, inputs), bf16, in the kernels' order, as one row of bf16.

    Raises:
        NotBf16Error: another type or number of dimensions, or an odd number of inputs.

    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2:
        raise NotBf16Error(f"a weight of {weight.dtype} and {weight.dim()} dimensions")
    values = _packed_values(*weight.shape)
    if values < 0:
        raise NotBf16Error(f"a weight of {tuple(weight.shape)}")
    memory = pages.zeros(values * weight.itemsize).view(torch.bfloat16)
    source = weight.contiguous()
    _check(load().lp_bf16_pack(memory.data_ptr(), source.data_ptr(), *weight.shape))
    return memory


@cache
def _packed_values(out_features: int, in_features: int) -> int:
    return int(load().lp_bf16_values(out_features, in_features))


def linear(
    x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    """Return x (..., in_features) times the packed weight, plus bias (out_features); all bf16.

    Raises:
        NotBf16Error: types or sizes that do not fit.

    """
    rows, y = _checked(x, memory, bias, out_features)
    _multiply(y, rows, memory, bias, None)
    return y.view(*x.shape[:-1], out_features)


def _linear_lora(
    x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, out_features: int, module: int
) -> torch.Tensor:
    rows, y = _checked(x, memory, bias, out_features)
    ops.with_lora(module, y, rows, lambda beside: _multiply(y, rows, memory, bias, beside))
    return y.view(*x.shape[:-1], out_features)


def _checked(
    x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows (rows, in_features), and memory for the result (rows, out_features)."""
    try:
        rows = checked_rows(x, bias, out_features)
    except ValueError as error:
        raise NotBf16Error(str(error)) from None
    in_features = rows.shape[1]
    if memory.dtype != torch.bfloat16 or memory.numel() != _packed_values(out_features, in_features):
        raise NotBf16Error(f"{memory.numel()} values are no weight of {out_features} x {in_features}")
    return rows, torch.empty((rows.shape[0], out_features), dtype=torch.bfloat16)


def _multiply(
    y: torch.Tensor, rows: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, beside: int | None
) -> None:
    (count, in_features), out_features = rows.shape, y.shape[1]
    _check(
        load().lp_bf16_linear(
            y.data_ptr(), out_features, rows.data_ptr(), rows.stride(0), memory.data_ptr(),
            None if bias is None else bias.data_ptr(), count, out_features, in_features, beside,
        )
    )  # fmt: skip


def _like_linear(
    x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, out_features: int, module: int = 0
) -> torch.Tensor:
    """Say for tracing what comes out."""
    del memory, bias, module
    return x.new_empty((*x.shape[:-1], out_features))


_LINEAR: Final = Operator("bf16_linear(Tensor x, Tensor memory, Tensor? bias, int out_features) -> Tensor")
_LINEAR_LORA: Final = Operator(
    "bf16_linear_lora(Tensor x, Tensor memory, Tensor? bias, int out_features, int module) -> Tensor"
)


def _check(error: int) -> None:
    if error:
        raise NotBf16Error(_MESSAGES.get(error, f"error {error}"))
