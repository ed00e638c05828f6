"""Linear layers whose weights stay in NF4 (`nf4.cpp`), and the operator that torch may compile around.

    packed = pack([Quantized(codes, absmax, (n, k), 64), ...])     # the projections of one layer, one below the other
    y = torch.ops.loraplex.nf4_linear(x, packed.memory, bias, packed.out_features, packed.group, packed.int8)
    y = torch.ops.loraplex.nf4_linear_lora(..., module)      # the same, and what adapters add (`ops`)

Weights are those of bitsandbytes (QLoRA, arXiv 2305.14314): code i of a block stands for bf16(TABLE[i] * absmax), to
the bit. Blocks run over the flat weight, as it was quantized, whatever the width of its rows; bitsandbytes' own
dequantization on CPU begins a new block with each row, and so gives wrong weights where rows are not whole blocks.
Sums are fp32, the bias is added in fp32, the result is rounded to bf16 once; it does not depend on the number of
threads. The packed weight takes the memory of the original: half a byte per weight and one fp32 per block.

Weights packed with `int8=True` are multiplied in integers instead, which takes AVX-512-VNNI: rows are rounded to eight
bits, with a scale for every group of inputs, as llama.cpp's Q8_0 has them, and the table to 127ths. What that costs in
accuracy and brings in speed is in docs/performance.md.

With AMX (not measured on any so far) many rows go through torch's products, a strip of the weight at a time, for the
reason that `many_rows` gives.
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch

from loraplex_server.vllm_plugin.cpu import build, many_rows, ops, pages
from loraplex_server.vllm_plugin.cpu.build import INT, LONG, POINTER, Signature
from loraplex_server.vllm_plugin.cpu.panels import HEADERS, Operator, checked_rows

SOURCES: Final = (
    *(Path(__file__).with_name(name) for name in ("nf4.cpp", "nf4_panels.h", "nf4_int8.h")),
    *HEADERS,
)
GROUPS: Final = (64, 32, 16)  # inputs that share a scale; smaller ones would cost more memory than they save
STRIP_BYTES: Final = (
    1 << 22
)  # of the weight, in bf16, for torch's products: within the caches of a large processor
OUTPUTS_AT_ONCE: Final = 32  # a strip begins at a multiple of it
TABLE: Final = torch.tensor(  # QLoRA, appendix E
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=torch.float32,
)  # fmt: skip

_TABLE_AT: Final = TABLE.data_ptr()
_SIGNATURES: Final[Mapping[str, Signature]] = {
    "lp_nf4_supported": (INT, (INT,)),
    "lp_nf4_bytes": (LONG, (LONG, LONG, LONG)),
    "lp_nf4_pack": (INT, (POINTER, LONG, POINTER, POINTER, LONG, LONG, LONG, LONG, INT)),
    "lp_nf4_unpack": (INT, (POINTER, POINTER, POINTER, LONG, LONG, LONG, LONG, LONG)),
    "lp_nf4_linear": (
        INT,
        (POINTER, LONG, POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG, LONG, LONG, INT, POINTER),
    ),
}
_MESSAGES: Final = {-1: "a null pointer or a size that cannot be", -2: "out of memory"}


class NotNF4Error(ValueError):
    """The weight is not one these kernels compute with; it can stay with bitsandbytes."""


@dataclass(frozen=True)
class Quantized:
    """One weight as bitsandbytes holds it."""

    codes: torch.Tensor  # uint8, two codes a byte, the first in the high half, row behind row
    absmax: torch.Tensor  # fp32, one per block
    shape: tuple[int, int]  # outputs, inputs
    block: int  # codes that share a scale


@dataclass(frozen=True)
class Packed:
    """Weights in the kernels' order."""

    memory: torch.Tensor  # uint8
    out_features: int
    in_features: int
    group: int
    int8: bool


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


def supported(*, int8: bool = False) -> bool:
    """Whether this processor has AVX-512-BF16, and AVX-512-VNNI for products in eight bits.

    Raises:
        BuildError: the kernels cannot be built, so it cannot be asked.

    """
    return platform.machine() == "x86_64" and bool(load().lp_nf4_supported(int8))


def group_of(in_features: int, block: int) -> int:
    """Return how many neighbouring inputs surely share a scale.

    Raises:
        NotNF4Error: too few for these kernels.

    """
    group = min(math.gcd(in_features, block), GROUPS[0])
    if group not in GROUPS:
        raise NotNF4Error(f"{in_features} inputs in blocks of {block} share no scale for {GROUPS[-1]} inputs")
    return group


def pack(weights: Sequence[Quantized], *, int8: bool = False) -> Packed:
    """Return `weights`, which have the same inputs, as one weight with all their outputs.

    Args:
        weights: the projections, one below the other.
        int8: for products in eight bits instead of bf16.

    Raises:
        NotNF4Error: sizes or types that do not fit together, or inputs that cannot be grouped.

    """
    widths = {(one.shape[1], one.block) for one in weights}
    if len(widths) != 1:
        raise NotNF4Error(f"projections with different inputs and blocks cannot be packed: {sorted(widths)}")
    in_features, block = widths.pop()
    group = group_of(in_features, block)
    out_features = sum(one.shape[0] for one in weights)
    memory = pages.zeros(_packed_bytes(out_features, in_features, group))
    first = 0
    for one in weights:
        codes, absmax = _checked(one)
        _check(
            load().lp_nf4_pack(
                memory.data_ptr(), first, codes.data_ptr(), absmax.data_ptr(), *one.shape, block, group, int8
            )
        )
        first += one.shape[0]
    return Packed(memory, out_features, in_features, group, int8)


@cache
def _packed_bytes(out_features: int, in_features: int, group: int) -> int:
    return int(load().lp_nf4_bytes(out_features, in_features, group))


def _checked(one: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    count = math.prod(one.shape)
    blocks = -(count // -one.block)
    if one.codes.dtype != torch.uint8 or one.codes.numel() * 2 != count:
        raise NotNF4Error(f"{one.codes.numel()} codes of {one.codes.dtype} for a weight of {one.shape}")
    if one.absmax.dtype != torch.float32 or one.absmax.numel() != blocks:
        raise NotNF4Error(f"{one.absmax.numel()} scales of {one.absmax.dtype} for {blocks} blocks")
    return one.codes.contiguous(), one.absmax.contiguous()


def linear(
    x: torch.Tensor,
    memory: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group: int,
    int8: bool,  # torch calls an operator's arguments by position
) -> torch.Tensor:
    """Return x (..., in_features) times the packed weight, plus bias (out_features); all bf16.

    `out_features`, `group` and `int8` are those of the `Packed`.

    Raises:
        NotNF4Error: types or sizes that do not fit.

    """
    rows, y = _checked_for(x, memory, bias, out_features, group)
    _multiply(y, rows, memory, bias, group, int8=int8, beside=None)
    return y.view(*x.shape[:-1], out_features)


def _linear_lora(
    x: torch.Tensor,
    memory: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group: int,
    int8: bool,
    module: int,
) -> torch.Tensor:
    rows, y = _checked_for(x, memory, bias, out_features, group)

    def multiply(beside: int | None) -> None:
        _multiply(y, rows, memory, bias, group, int8=int8, beside=beside)

    ops.with_lora(module, y, rows, multiply, kernels=not _by_torch(rows, int8=int8))
    return y.view(*x.shape[:-1], out_features)


def _checked_for(
    x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, out_features: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows (rows, in_features), and memory for the result (rows, out_features)."""
    try:
        rows = checked_rows(x, bias, out_features)
    except ValueError as error:
        raise NotNF4Error(str(error)) from None
    in_features = rows.shape[1]
    if memory.numel() != _packed_bytes(out_features, in_features, group):
        raise NotNF4Error(f"{memory.numel()} bytes are no weight of {out_features} x {in_features}")
    return rows, torch.empty((rows.shape[0], out_features), dtype=torch.bfloat16)


def _by_torch(rows: torch.Tensor, *, int8: bool) -> bool:
    return not int8 and rows.shape[0] >= many_rows.MANY_ROWS and _amx()


def _multiply(
    y: torch.Tensor,
    rows: torch.Tensor,
    memory: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    *,
    int8: bool,
    beside: int | None,
) -> None:
    (count, in_features), out_features = rows.shape, y.shape[1]
    if _by_torch(rows, int8=int8):
        _linear_by_torch(y, rows, memory, bias, group)
        return
    _check(
        load().lp_nf4_linear(
            y.data_ptr(), out_features, rows.data_ptr(), rows.stride(0), memory.data_ptr(),
            None if bias is None else bias.data_ptr(), _TABLE_AT, count, out_features, in_features, group, int8, beside,
        )
    )  # fmt: skip


def _linear_by_torch(
    y: torch.Tensor, rows: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, group: int
) -> None:
    """Do the same by torch's products, unpacking a strip of the weight at a time."""
    (_, in_features), (_, out_features) = rows.shape, y.shape
    strip = max(STRIP_BYTES // (2 * in_features * OUTPUTS_AT_ONCE), 1) * OUTPUTS_AT_ONCE
    weight = torch.empty(min(strip, out_features), in_features, dtype=torch.bfloat16)
    for first in range(0, out_features, strip):
        outs = slice(first, min(first + strip, out_features))
        count = outs.stop - first
        _check(
            load().lp_nf4_unpack(
                weight.data_ptr(),
                memory.data_ptr(),
                _TABLE_AT,
                first,
                count,
                out_features,
                in_features,
                group,
            )
        )
        y[:, outs] = torch.nn.functional.linear(rows, weight[:count], None if bias is None else bias[outs])


@cache
def _amx() -> bool:
    return many_rows.useful(torch.bfloat16)


def _like_linear(
    x: torch.Tensor,
    memory: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    group: int,
    int8: bool,
    module: int = 0,
) -> torch.Tensor:
    """Say for tracing what comes out."""
    del memory, bias, group, int8, module
    return x.new_empty((*x.shape[:-1], out_features))


_TAKEN: Final = "Tensor x, Tensor memory, Tensor? bias, int out_features, int group, bool int8"
_LINEAR: Final = Operator(f"nf4_linear({_TAKEN}) -> Tensor")
_LINEAR_LORA: Final = Operator(f"nf4_linear_lora({_TAKEN}, int module) -> Tensor")


def _check(error: int) -> None:
    if error:
        raise NotNF4Error(_MESSAGES.get(error, f"error {error}"))
