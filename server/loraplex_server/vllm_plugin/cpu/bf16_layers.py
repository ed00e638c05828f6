"""vLLM's linear layers of a bf16 base on CPU, computed by the kernels of `bf16`.

vLLM decides when weights are loaded how a layer on CPU is multiplied (`dispatch_cpu_unquantized_gemm`): with oneDNN on
most processors. `install()` goes in front of that: on a processor with AVX-512-BF16 and without AMX, a layer's weight
is put into the kernels' order, in place of the original where vLLM lets go of that too, and the layer computes by
``loraplex::bf16_linear``. Every other layer and machine keeps vLLM's way, and so does one where someone put AMD's
zentorch in.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, Final

import torch
from vllm.platforms import current_platform

from loraplex_server.vllm_plugin.cpu import bf16, many_rows
from loraplex_server.vllm_plugin.cpu.build import BuildError
from loraplex_server.vllm_plugin.cpu.panels import TAKE_LORA

_ARGUMENTS: Final = ["layer", "remove_weight"]
_log = logging.getLogger("vllm.loraplex")  # below vLLM's own: it alone has a handler in vLLM's processes


def install(utils: Any) -> None:
    """Have `utils`, the module with vLLM's choice, choose our kernels where they fit. Again is harmless.

    Raises:
        AttributeError: the choice is not there, or takes other arguments.

    """
    stock = utils.dispatch_cpu_unquantized_gemm
    if hasattr(stock, "loraplex_stock"):
        return
    taken = list(inspect.signature(stock).parameters)
    if taken != _ARGUMENTS:
        raise AttributeError(f"dispatch_cpu_unquantized_gemm takes {taken}, expected {_ARGUMENTS}")

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        if _fits(layer.weight) and _usable():
            _pack(layer, remove_weight=remove_weight)
        else:
            stock(layer, remove_weight)

    dispatch_cpu_unquantized_gemm.loraplex_stock = stock  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def _fits(weight: torch.Tensor) -> bool:
    even = weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] > 0 and weight.shape[1] % 2 == 0
    return even and weight.dtype == torch.bfloat16 and str(weight.device.type) == "cpu"


def _pack(layer: torch.nn.Module, *, remove_weight: bool) -> None:
    packed, out_features = bf16.pack(layer.weight.data), layer.weight.shape[0]
    if remove_weight:
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)  # the original is let go
        layer.cpu_linear = _from_argument(out_features)
        setattr(layer, TAKE_LORA, functools.partial(_take_lora, layer, out_features))
    else:  # an output layer: its rows are read as embeddings too
        layer.cpu_linear = _from(packed, out_features)


def _take_lora(layer: torch.nn.Module, out_features: int, module: int) -> None:
    def cpu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = torch.ops.loraplex.bf16_linear_lora(x, weight, bias, out_features, module)
        return y

    layer.cpu_linear = cpu_linear


def _from_argument(out_features: int) -> Callable[..., torch.Tensor]:
    """The layer's own weight is the packed one, and comes with the call."""

    def cpu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = torch.ops.loraplex.bf16_linear(x, weight, bias, out_features)
        return y

    return cpu_linear


def _from(packed: torch.Tensor, out_features: int) -> Callable[..., torch.Tensor]:
    def cpu_linear(x: torch.Tensor, _weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = torch.ops.loraplex.bf16_linear(x, packed, bias, out_features)
        return y

    return cpu_linear


@functools.cache
def _usable() -> bool:
    """Whether the kernels run here; says in the log what is used, once per process."""
    if current_platform.is_zen_cpu():
        return False
    try:
        usable = bf16.supported() and not many_rows.useful(
            torch.bfloat16
        )  # oneDNN uses AMX where there is some
    except BuildError as error:
        _log.warning("The bf16 base runs on vLLM's own kernels: %s", error)
        return False
    vllms = "vLLM's own kernels: loraplex's need AVX-512-BF16 and are slower than AMX"
    _log.info("The bf16 base runs on %s.", "loraplex's kernels for AVX-512-BF16" if usable else vllms)
    return usable
