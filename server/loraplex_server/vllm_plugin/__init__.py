"""Put loraplex's LoRA code into vLLM, through vLLM's public plugin entry point.

vLLM calls `register()` in every process it starts (frontend, engine core, workers) because it is named under
the entry point group ``vllm.general_plugins``. On a CPU platform `register()` makes
``current_platform.get_punica_wrapper()`` name `loraplex_server.vllm_plugin.punica.GroupedPunicaWrapper`
instead of vLLM's own class, which gives base-model rows the weights of the last adapter slot when they
share a batch with LoRA rows; and it puts native mode (`cpu`) in front of it, which is that and fast. On any other
platform it does neither: the GPU kernels are not affected by that fault. On every platform it bounds what a
structured-output grammar may cost a step (`grammar_guard`).

Importing this module does nothing and imports neither torch nor vLLM. Environment:

``LORAPLEX_CPU_LORA``
    ``native``, ``grouped`` or ``stock``. Not set: native where it can serve the engine (a C++ compiler, or kernels
    built before; bfloat16 or float32; one process), else grouped, and a line in the log why. ``native``: an engine
    that cannot have it does not start. ``grouped``: rows grouped by adapter in pure torch, over vLLM's own slots.
    ``stock`` leaves vLLM's wrapper in place; it exists for benchmarks and for the test that shows the fault, and the
    loraplex server refuses to serve with it.
``LORAPLEX_CPU_BF16``
    ``native`` (default) or ``stock``: whether the linear layers of a bf16 base run on our kernels (`cpu.bf16_layers`)
    or as vLLM has them. Without a compiler or AVX-512-BF16, or with AMX, it is stock, with a line in the log.
``LORAPLEX_CPU_NF4``
    ``native`` (default), ``int8`` or ``stock``: whether the linear layers of an NF4 base run on our kernels
    (`cpu.nf4_layers`), in bf16 or with products in eight bits (AVX-512-VNNI), which is faster and a little less
    accurate, or as vLLM's bitsandbytes plugin has them. Where the processor cannot, or a compiler is missing, it is
    what it can be, with a line in the log.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Final

CPU_LORA_ENV: Final = "LORAPLEX_CPU_LORA"
CPU_BF16_ENV: Final = "LORAPLEX_CPU_BF16"
CPU_NF4_ENV: Final = "LORAPLEX_CPU_NF4"
GROUPED_WRAPPER: Final = "loraplex_server.vllm_plugin.punica.GroupedPunicaWrapper"
NATIVE_WRAPPER: Final = "loraplex_server.vllm_plugin.cpu.layers.ModuleLora"
CORRECT_WRAPPERS: Final = frozenset({GROUPED_WRAPPER, NATIVE_WRAPPER})
STOCK_WRAPPER: Final = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
WORKER_EXTENSION: Final = "loraplex_server.vllm_plugin.worker.WorkerExtension"


class PluginHookError(RuntimeError):
    """vLLM does not have the shape this plugin was written for, or the plugin's own setting is unknown.

    Raised while an engine starts, so that a vLLM upgrade that moves the hook stops the engine instead of
    silently serving with the faulty wrapper.
    """

    code: Final = "ENGINE_UNAVAILABLE"


def register() -> None:
    """Install the guard of grammars in this process; on CPU also our LoRA, linear layers and plain ranking.

    Calling it again is harmless.

    Raises:
        PluginHookError: a variable has an unknown value, or a hook is not where it was.

    """
    choice = _choice(CPU_LORA_ENV, "", "native", "grouped", "stock")
    bf16 = _choice(CPU_BF16_ENV, "native", "stock")
    nf4 = _choice(CPU_NF4_ENV, "native", "int8", "stock")
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and (choice, bf16, nf4) != ("stock",) * 3:
        from loraplex_server.vllm_plugin.cpu.compiling import tell_apart

        tell_apart(type(current_platform), (choice, bf16, nf4))
        if bf16 == "native":
            _install_bf16()
        if nf4 != "stock":
            _install_nf4(int8=nf4 == "int8")
    if choice == "stock":
        return
    _guard_grammars()
    if current_platform.is_cpu():
        from loraplex_server.vllm_plugin.sampling import rank_uncompiled

        install(type(current_platform))
        if choice != "grouped":
            install_native(type(current_platform), required=choice == "native")
        rank_uncompiled()


def _choice(variable: str, default: str, *others: str) -> str:
    """Read one of a few words from the environment; `default` holds where it is not set, and may be ""."""
    chosen = os.environ.get(variable, default)
    if chosen not in (default, *others):
        allowed = " or ".join(map(repr, filter(None, (default, *others))))
        raise PluginHookError(f"{variable}={chosen!r} is unknown: set it to {allowed}, or not at all")
    return chosen


def _install_bf16() -> None:
    try:
        from vllm.model_executor.layers import utils

        from loraplex_server.vllm_plugin.cpu.bf16_layers import install as install_bf16

        install_bf16(utils)
    except (ImportError, AttributeError) as error:
        raise PluginHookError(
            f"vLLM's choice of a linear layer's kernel is not where it was ({error}): use the version loraplex pins, "
            f"or set {CPU_BF16_ENV}=stock"
        ) from error


def _install_nf4(*, int8: bool = False) -> None:
    if find_spec("vllm_bnb_plugin") is None:
        return  # then vLLM has no NF4 either
    try:
        from vllm_bnb_plugin.quantization.linear import BitsAndBytesLinearMethod

        from loraplex_server.vllm_plugin.cpu.nf4_layers import install as install_nf4

        install_nf4(BitsAndBytesLinearMethod, int8=int8)
    except (ImportError, AttributeError) as error:
        raise PluginHookError(
            f"vLLM's bitsandbytes plugin is not where it was ({error}): use the version loraplex pins, or set "
            f"{CPU_NF4_ENV}=stock"
        ) from error


def _guard_grammars() -> None:
    from loraplex_server.vllm_plugin.grammar_guard import guard

    try:
        from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

        guard(XgrammarBackend, XgrammarGrammar)
    except (ImportError, AttributeError) as error:
        raise PluginHookError(
            f"vLLM's structured output is not where it was ({error}), so its cost in a step cannot be bounded: "
            "use the vLLM version loraplex pins"
        ) from error


def install(platform: Any) -> None:
    """Make `platform.get_punica_wrapper()` name the grouped wrapper.

    Args:
        platform: the class of vLLM's current platform, a CPU one.

    Raises:
        PluginHookError: the method is missing, or names a wrapper other than the stock CPU one or ours
        (another
            plugin got there first, or vLLM changed): nothing is replaced that we do not know.

    """
    current = getattr(platform, "get_punica_wrapper", None)
    if not callable(current):
        raise PluginHookError(
            f"{platform.__name__} has no get_punica_wrapper(): this vLLM moved the hook that makes LoRA on "
            f"CPU correct; use the vLLM version loraplex pins, or set {CPU_LORA_ENV}=stock outside the server"
        )
    named = current()
    if named == GROUPED_WRAPPER:
        return
    if named != STOCK_WRAPPER:
        raise PluginHookError(
            f"{platform.__name__}.get_punica_wrapper() names {named!r}, expected {STOCK_WRAPPER!r}: "
            "remove the other plugin or use the vLLM version loraplex pins"
        )
    platform.get_punica_wrapper = classmethod(lambda _cls: GROUPED_WRAPPER)


def install_native(platform: Any, *, required: bool) -> None:
    """Put native mode into this process; `required`: no engine without it.

    Raises:
        PluginHookError: vLLM does not have one of the places it enters at.

    """
    try:
        from loraplex_server.vllm_plugin.cpu import hooks

        hooks.install(platform, required=required)
    except (ImportError, AttributeError, TypeError) as error:
        raise PluginHookError(
            f"vLLM moved what LoRA on CPU in native mode enters at ({error}): use the vLLM version loraplex pins, "
            f"or set {CPU_LORA_ENV}=grouped"
        ) from error
