"""Where native mode enters vLLM: four places, each checked to be what this was written for.

* ``lora_model_runner_mixin.LRUCacheWorkerLoRAManager``, which the model runner makes: a function that makes ours.
* ``CpuPlatform.check_and_update_config``: see `compiling`.
* ``EngineCore.preprocess_add_request``, on the thread that takes requests in: an adapter that no step could use without
  reading it first is read there, so that the step does not, and one that cannot be read fails its request alone. (vLLM
  reads it within the step, where a failure ends the engine.) The request takes the block with it.
* ``Worker.execute_model``, a step: see `pace`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import msgspec
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from loraplex_server.vllm_plugin.cpu.choice import reason_against_native
from loraplex_server.vllm_plugin.cpu.compiling import keep_compiling, keep_to_own_files, reuse_compiled
from loraplex_server.vllm_plugin.cpu.pace import PACE

_log = logging.getLogger("vllm.loraplex")  # below vLLM's own: it alone has a handler in vLLM's processes

_managers: list[Any] = []  # the manager this process made, if it holds the model


def install(platform: Any, *, required: bool) -> None:
    """Put native mode into this process.

    Args:
        platform: the class of vLLM's current platform, a CPU one.
        required: an engine that cannot have native mode does not start, instead of falling back to grouped.

    Raises:
        AttributeError, ImportError, TypeError: vLLM does not have the places named above.

    """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker import lora_model_runner_mixin as mixin
    from vllm.v1.worker.gpu_worker import Worker

    keep_compiling(platform)
    reuse_compiled()
    keep_to_own_files()
    stock = mixin.LRUCacheWorkerLoRAManager
    if not hasattr(stock, "makes_native"):
        _expect(stock.__init__, "vllm_config", "device", "embedding_modules", "lora_model_cls")
        mixin.LRUCacheWorkerLoRAManager = _maker(stock, required=required)
    take_in = EngineCore.preprocess_add_request
    if not hasattr(take_in, "stages_adapters"):
        _expect(take_in, "request")
        EngineCore.preprocess_add_request = _staging(take_in)
    step = Worker.execute_model
    if not hasattr(step, "keeps_pace"):
        _expect(step, "scheduler_output")
        Worker.execute_model = _paced(step)


def _expect(function: Any, *names: str) -> None:
    taken = tuple(inspect.signature(function).parameters)
    if taken != ("self", *names):
        raise TypeError(f"{function.__qualname__} takes {taken}, expected {('self', *names)}")


def _maker(stock: Any, *, required: bool) -> Any:
    def make(vllm_config: Any, device: Any, embedding_modules: Any) -> Any:
        reason = reason_against_native(vllm_config)
        if not reason:
            from loraplex_server.vllm_plugin.cpu.manager import NativeWorkerLoRAManager

            manager = NativeWorkerLoRAManager(vllm_config, device, embedding_modules)
            _managers[:] = [manager]
            return manager
        if required:
            raise RuntimeError(f"LORAPLEX_CPU_LORA=native cannot serve this engine: {reason}")
        _log.warning("LoRA runs on the slower grouped wrapper, without torch.compile: %s", reason)
        return stock(vllm_config, device, embedding_modules)

    make.makes_native = True  # type: ignore[attr-defined]
    return make


class BoundRequest(LoRARequest):  # type: ignore[misc]  # vLLM is not typed for us
    """An adapter as a request names it, and its block, which so lives as long as the request."""

    block: Any = None


def _staging(take_in: Any) -> Any:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        wanted = request.lora_request
        if wanted is not None and _managers:
            request.lora_request = _bound(_managers[0], wanted)
        return take_in(self, request)

    preprocess_add_request.stages_adapters = True  # type: ignore[attr-defined]
    return preprocess_add_request


def _paced(step: Any) -> Any:
    @functools.wraps(step)
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        with PACE.step():
            return step(self, scheduler_output)

    execute_model.keeps_pace = True  # type: ignore[attr-defined]
    return execute_model


def _bound(manager: Any, wanted: Any) -> BoundRequest:
    block = None if wanted.load_inplace else manager.block(wanted.lora_int_id)
    if block is None:
        block = manager.reader().read(get_adapter_absolute_path(wanted.lora_path))
        manager.stage(wanted.lora_int_id, block)
    return BoundRequest(**msgspec.structs.asdict(wanted), block=block)
