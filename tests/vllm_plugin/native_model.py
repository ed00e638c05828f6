"""A model of vLLM's own layers in this process, wrapped for LoRA by the native manager; no engine, no attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.engine.mixed_models import ADAPTERS, make_adapters, make_base

SLOTS = 3
RANK_MAX = 16
SEED = 7


def write_models(directory: Path) -> dict[str, Path]:
    """Write a tiny base and adapters of ranks 1 to 16, and return the adapters' directories by name."""
    return make_adapters(make_base(directory, SEED), directory, SEED)


@contextmanager
def worker_manager(directory: Path, dtype: str = "float32") -> Iterator[Any]:
    """Build the base of `directory` and its `NativeWorkerLoRAManager`, as vLLM's model runner does it."""
    from vllm.config import CacheConfig, LoRAConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.parallel_state import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.model_loader import get_model

    from loraplex_server.vllm_plugin.cpu.manager import NativeWorkerLoRAManager

    model_config = ModelConfig(
        model=str(directory / "base"),
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
    )
    config = VllmConfig(
        model_config=model_config,
        cache_config=CacheConfig(block_size=32),
        lora_config=LoRAConfig(max_loras=SLOTS, max_lora_rank=RANK_MAX),
    )
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{directory}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        try:
            with patch("torch.accelerator.empty_cache"):  # as vLLM's CPU model runner has it: there is none
                model = get_model(vllm_config=config)
            manager = NativeWorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
            manager.create_lora_manager(model, config)
            yield manager
        finally:
            cleanup_dist_env_and_memory()


__all__ = ["ADAPTERS", "RANK_MAX", "SLOTS", "worker_manager", "write_models"]
