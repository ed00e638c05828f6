"""Our settings as vLLM's: arguments of its engine, and what it takes from the environment only."""

import os
from pathlib import Path
from typing import Any

from loraplex_registry.validation.base import BaseModel
from loraplex_server.config import SLOTS, Config
from loraplex_server.vllm_plugin import CPU_LORA_ENV, WORKER_EXTENSION

SPIN_COUNT = "20000"  # some hundred microseconds, after which a thread with nothing to do sleeps


def set_environment(config: Config) -> None:
    """Settings that vLLM takes from the environment only; what the operator set stays."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.model.kv_cache_gib))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault(
        "VLLM_LOGGING_STREAM", "ext://sys.stderr"
    )  # what is on stdout is ours, and may be JSON
    # Expressions that reach vLLM passed `form_trials`, which bounds CPU time; vLLM's own five seconds are of the clock,
    # and refuse on a busy machine what they take on an idle one.
    os.environ.setdefault("VLLM_REGEX_COMPILATION_TIMEOUT_S", "60")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # vLLM would put the model into a process of its own, and the engine core would poll for its answers: on
        # few cores that polling takes much of the throughput (docs/adr/0001). The engine core is a
        # process of its own in any case.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Threads sleep while they have nothing to do, but not at once: a step is some 300 loops on all threads, tens of
        # microseconds apart, and to wake a thread for each costs a fifth of it (docs/adr/0001).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def model_is_apart() -> bool:
    """Whether, on CPU, the model was put into a process beside the engine core's after all (see `set_environment`)."""
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0"


def engine_arguments(config: Config, directory: Path, base: BaseModel) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs` for a checkpoint directory that holds this base."""
    arguments: dict[str, Any] = {
        "model": str(directory),
        "served_model_name": config.model.name,
        "dtype": config.model.dtype,
        "seed": config.model.seed,
        "max_num_seqs": config.model.batch_requests,
        "gpu_memory_utilization": config.model.gpu_memory_fraction,
        "enforce_eager": config.model.eager,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if config.model.task == "embed":
        arguments |= {"runner": "pooling", "convert": "embed"}
    else:
        # By name: left to itself vLLM keeps for good whatever library the first form happened to need.
        arguments["structured_outputs_config"] = {"backend": "xgrammar"}
    if config.serves_adapters:
        arguments |= _lora_arguments(config, base)
    if config.model.context_tokens:
        arguments["max_model_len"] = config.model.context_tokens
    if config.model.quantization == "nf4":
        # In-flight by vllm-bnb-plugin: reads bf16 weights, keeps NF4 ones.
        arguments |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    return arguments


def widen_slots(vllm_config: Any) -> None:
    """Give an engine that will serve LoRA natively as many slots as it has rows: there they are pointers.

    vLLM keeps requests waiting whose adapter is not among `max_loras` in the running batch; so no request waits.
    """
    if _serves_natively(vllm_config):
        vllm_config.lora_config.max_loras = vllm_config.scheduler_config.max_num_seqs
        vllm_config.lora_config.max_cpu_loras = vllm_config.scheduler_config.max_num_seqs


def _serves_natively(vllm_config: Any) -> bool:
    """Whether the engine will choose native mode; the same question is put to the worker afterwards."""
    from vllm.platforms import current_platform

    chosen = os.environ.get(CPU_LORA_ENV, "") in ("", "native")
    if vllm_config.lora_config is None or not current_platform.is_cpu() or not chosen:
        return False
    from loraplex_server.vllm_plugin.cpu.choice import reason_against_native

    return not reason_against_native(vllm_config)


def _lora_arguments(config: Config, base: BaseModel) -> dict[str, Any]:
    """What vLLM needs for adapters, and what slows every step down a little even while none is in use."""
    slots = config.adapters.slots or SLOTS
    arguments: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": slots,
        "max_lora_rank": config.engine_rank,
    }
    if not config.adapters.embeddings:
        # Otherwise vLLM reserves slots x rank x vocabulary twice, for adapters that hardly anybody makes.
        arguments["lora_target_modules"] = inner_modules(base) or None
    return arguments


def inner_modules(base: BaseModel) -> list[str]:
    """Last names of a base's linear layers, such as "q_proj", without embedding and output layer."""
    return sorted(
        {name.rpartition(".")[2] for name, shape in base.layers.items() if base.vocab_size not in shape}
    )
