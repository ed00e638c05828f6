"""Whether native mode can serve an engine: one answer, the same in every process of it."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from loraplex_server.vllm_plugin.cpu import kernels
from loraplex_server.vllm_plugin.cpu.build import BuildError


@functools.cache
def kernel_library() -> ctypes.CDLL:
    """Return this process's kernels, built if they are not in the cache yet.

    Raises:
        BuildError: there is no compiler, or it failed.

    """
    return kernels.load()


def reason_against_native(vllm_config: Any) -> str:
    """Return why an engine with LoRA on cannot have native mode, "" if it can.

    Depends on the settings and the machine alone. Builds the kernels if they are not in the cache yet.
    """
    lora, parallel = vllm_config.lora_config, vllm_config.parallel_config
    if lora.lora_dtype not in (torch.bfloat16, torch.float32):
        return f"adapters would be {lora.lora_dtype}, the kernels take bfloat16 and float32"
    if lora.lora_dtype != vllm_config.model_config.dtype:
        return f"adapters would be {lora.lora_dtype} over a base of {vllm_config.model_config.dtype}"
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1 or lora.fully_sharded_loras:
        return "the model is spread over processes"
    if lora.enable_tower_connector_lora:
        return "adapters may touch parts that are not the language model"
    try:
        kernel_library()
    except BuildError as error:
        return str(error)
    return ""
