"""vLLM's bitsandbytes layers on CPU, computed by the kernels of `nf4`.

vLLM's plugin (`vllm_bnb_plugin`) has bitsandbytes turn the whole weight into bf16 at every call. `install()` changes
two methods of its `BitsAndBytesLinearMethod`: once weights are loaded, a layer's codes and scales are put into the
kernels' order, in place of the original; and such a layer is applied by ``loraplex::nf4_linear``. Layers that the
kernels do not know (FP4, odd widths, eight bits) and machines without AVX-512-BF16 or a compiler keep the plugin's own
way, with a line in the log. Products are in bf16, or in eight bits if asked for and the processor has AVX-512-VNNI.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Final, Literal

import torch

from loraplex_server.vllm_plugin.cpu import nf4
from loraplex_server.vllm_plugin.cpu.build import BuildError
from loraplex_server.vllm_plugin.cpu.panels import TAKE_LORA

PACKED: Final = "loraplex_nf4"
"""The attribute of a layer with packed weights: outputs, group and int8 of its `nf4.Packed`, and its number in the LoRA
table where it adds LoRA itself."""

PLAIN: Final = 3  # of PACKED, without LoRA
_APPLY_ARGUMENTS: Final = ["self", "layer", "x", "bias"]
_log = logging.getLogger("vllm.loraplex")  # below vLLM's own: it alone has a handler in vLLM's processes


def install(method: Any, *, int8: bool = False) -> None:
    """Have the plugin's linear method pack weights after loading and compute with them. Again is harmless.

    Args:
        method: the plugin's class.
        int8: with products in eight bits.

    Raises:
        AttributeError: the class has not the methods it had.

    """
    if "loraplex_stock_apply" in vars(method):
        return
    stock_apply, stock_process = method._apply_4bit_weight, method.process_weights_after_loading
    taken = list(inspect.signature(stock_apply).parameters)
    if taken != _APPLY_ARGUMENTS:
        raise AttributeError(
            f"{method.__name__}._apply_4bit_weight takes {taken}, expected {_APPLY_ARGUMENTS}"
        )

    def process_weights_after_loading(self: Any, layer: torch.nn.Module) -> None:
        stock_process(self, layer)
        if not self.quant_config.load_in_8bit and (products := _products(int8=int8)):
            _pack(layer, int8=products == "int8")

    method.process_weights_after_loading = process_weights_after_loading
    method._apply_4bit_weight = _apply_packed(stock_apply)
    method.loraplex_stock_apply = stock_apply


def _apply_packed(stock_apply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def apply(
        self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        packed = getattr(layer, PACKED, None)
        if packed is None:
            return stock_apply(self, layer, x, bias)
        linear = getattr(torch.ops.loraplex, "nf4_linear" if len(packed) == PLAIN else "nf4_linear_lora")
        if x.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16):
            y: torch.Tensor = linear(x, layer.weight, bias, *packed)
            return y
        y = linear(x.to(torch.bfloat16), layer.weight, None, *packed).to(x.dtype)
        return y if bias is None else y + bias

    return apply


def _pack(layer: torch.nn.Module, *, int8: bool) -> None:
    """Put the kernels' weight in place of the layer's own, if they know it."""
    try:
        packed = nf4.pack(_quantized(layer.weight), int8=int8)
    except nf4.NotNF4Error as error:
        _log.info("%s stays with bitsandbytes: %s", getattr(layer, "prefix", "a layer"), error)
        return
    layer.weight = torch.nn.Parameter(packed.memory, requires_grad=False)  # the original is let go
    plain = (packed.out_features, packed.group, packed.int8)
    setattr(layer, PACKED, plain)
    setattr(layer, TAKE_LORA, lambda module: setattr(layer, PACKED, (*plain, module)))


def _quantized(weight: Any) -> list[nf4.Quantized]:
    """Read what the plugin's loader notes at a weight: a state per projection, and where each one's codes begin.

    Raises:
        NotNF4Error: quantized in another way.
        AttributeError: the loader notes something else.

    """
    states, offsets = weight.bnb_quant_state, weight.bnb_shard_offsets.tolist()
    found = []
    for number in range(len(states)):
        state = states[number]
        if state.quant_type != "nf4" or state.nested or not torch.equal(state.code.float(), nf4.TABLE):
            raise nf4.NotNF4Error(f"quantized as {state.quant_type}, nested: {state.nested}")
        codes = weight.data[offsets[number] : offsets[number + 1]].reshape(-1)
        out_features, in_features = state.shape
        found.append(nf4.Quantized(codes, state.absmax, (out_features, in_features), state.blocksize))
    return found


@cache
def _products(*, int8: bool) -> Literal["bf16", "int8"] | None:
    """Return what the kernels multiply in here, None where they do not run; says it in the log, once per process."""
    try:
        usable = nf4.supported()
        reason = "this processor has no AVX-512-BF16"
    except BuildError as error:
        usable, reason = False, str(error)
    if not usable:
        _log.warning("The NF4 base runs on bitsandbytes, several times slower: %s", reason)
        return None
    if int8 and nf4.supported(int8=True):
        _log.info("The NF4 base runs on loraplex's kernels, in eight bits: faster, a little less accurate.")
        return "int8"
    if int8:
        _log.warning("The NF4 base multiplies in bf16, not in eight bits: no AVX-512-VNNI here.")
    _log.info("The NF4 base runs on loraplex's kernels for AVX-512-BF16.")
    return "bf16"
