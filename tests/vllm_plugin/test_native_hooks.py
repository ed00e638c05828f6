"""Where native mode enters vLLM: each place by name and signature, so that an upgrade that moves one is seen here."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
from vllm.compilation import caching
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.worker import lora_model_runner_mixin as mixin

from loraplex_server import vllm_plugin
from loraplex_server.vllm_plugin import PluginHookError, install_native
from loraplex_server.vllm_plugin.cpu import compiling, hooks
from loraplex_server.vllm_plugin.cpu.blocks import STAGED
from loraplex_server.vllm_plugin.cpu.choice import reason_against_native
from loraplex_server.vllm_plugin.cpu.manager import NativeLoRAModelManager, NativeWorkerLoRAManager
from loraplex_server.vllm_plugin.cpu.pace import Pace


def parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def stock(owner: Any, name: str) -> Any:
    """vLLM's own, also where an earlier test of this process has installed ours over it."""
    return (
        inspect.getsource(inspect.getmodule(owner))
        .partition(f"    def {name}(")[2]
        .partition("\n    def ")[0]
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "name", "taken"),
    [
        (NativeLoRAModelManager, LoRAModelManager, "_create_lora_modules", ("self",)),
        (NativeLoRAModelManager, LoRAModelManager, "_add_adapter", ("self", "lora")),
        (NativeLoRAModelManager, LRUCacheLoRAModelManager, "activate_adapter", ("self", "lora_id")),
        (NativeLoRAModelManager, LoRAModelManager, "_deactivate_adapter", ("self", "lora_id")),
        (NativeLoRAModelManager, LoRAModelManager, "remove_all_adapters", ("self",)),
        (NativeLoRAModelManager, LoRAModelManager, "_set_adapter_mapping", ("self", "mapping")),
        (NativeWorkerLoRAManager, LRUCacheWorkerLoRAManager, "add_adapter", ("self", "lora_request")),
        (NativeWorkerLoRAManager, WorkerLoRAManager, "_load_adapter", ("self", "lora_request")),
        (NativeWorkerLoRAManager, WorkerLoRAManager, "remove_adapter", ("self", "adapter_id")),
        (NativeWorkerLoRAManager, WorkerLoRAManager, "list_adapters", ("self",)),
        (NativeWorkerLoRAManager, WorkerLoRAManager, "add_dummy_lora", ("self", "lora_request", "rank")),
    ],
)
def test_what_is_replaced_in_vllms_managers_is_there_and_takes_the_same(ours, theirs, name, taken):
    assert parameters(getattr(theirs, name)) == parameters(getattr(ours, name)) == taken


def test_what_is_used_of_vllms_managers_is_there():
    for name in ("capacity", "lora_slots"):
        assert isinstance(getattr(LoRAModelManager, name), property)
    source = inspect.getsource(LoRAModelManager)
    for attribute in (
        "_registered_adapters",
        "_active_adapters",
        "lora_index_to_id",
        "packed_modules",
        "_last_mapping",
    ):
        assert f"self.{attribute}" in source
    # A slot is given by our activate_adapter alone, and what it holds is in the mapping's key.
    assert "tuple(self.lora_index_to_id)" in inspect.getsource(LoRAModelManager.set_adapter_mapping)
    assert "self._lora_model_cls.from_local_checkpoint(" in inspect.getsource(WorkerLoRAManager._load_adapter)
    assert "dtype" in parameters(LoRAModel.from_local_checkpoint)


def test_vllms_layers_call_the_wrapper_as_our_layers_expect():
    linear = inspect.getsource(BaseLinearLayerWithLoRA._apply_lora_to_output)
    assert "self.punica_wrapper.add_lora_linear(\n            output, x," in linear
    logits = inspect.getsource(LogitsProcessorWithLoRA._get_logits)
    assert "self.punica_wrapper.add_lora_logits(\n            logits, hidden_states," in logits
    embedding = inspect.getsource(VocabParallelEmbeddingWithLoRA.forward)
    assert "self.base_layer.forward(x)" in embedding  # what ours does first


def test_the_model_runner_makes_the_manager_by_the_name_that_is_replaced():
    source = inspect.getsource(mixin.LoRAModelRunnerMixin.load_lora_model)
    assert (
        "LRUCacheWorkerLoRAManager(\n            vllm_config,\n            device,\n            model.embedding_modules"
        in source
    )


def test_requests_are_taken_in_where_a_failure_is_theirs_alone():
    loop = inspect.getsource(EngineCoreProc.process_input_sockets)
    call = loop.index("self.preprocess_add_request(req)")
    assert (
        call
        < loop.index("except Exception:", call)
        < loop.index("self._handle_request_preproc_error(req)", call)
    )
    assert "request" in parameters(EngineCore.preprocess_add_request)


def test_the_cpu_platform_reads_the_lora_settings_to_switch_compilation_off_and_for_nothing_else():
    source = stock(CpuPlatform, "check_and_update_config")
    assert source.count("lora") == 1
    assert (
        "if vllm_config.lora_config is not None:\n            compilation_config.mode = CompilationMode.NONE"
        in source
    )


def engine_config(**changes: Any) -> Any:
    fields = {
        "lora_config": SimpleNamespace(
            lora_dtype=torch.bfloat16, enable_tower_connector_lora=False, fully_sharded_loras=False
        ),
        "model_config": SimpleNamespace(dtype=torch.bfloat16),
        "parallel_config": SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        "additional_config": {},
        "mode": "compile",
    }
    return SimpleNamespace(**fields | changes)


class Platform:
    """vLLM's CPU platform, as far as compilation goes."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        cls.asked = cls
        if vllm_config.lora_config is not None:
            vllm_config.mode = "none"


@pytest.fixture
def platform(loaded):
    return type("OurPlatform", (Platform,), {})


def test_compilation_stays_on_with_lora_and_the_settings_are_put_back(platform):
    compiling.keep_compiling(platform)
    compiling.keep_compiling(platform)
    config = engine_config()
    lora = config.lora_config
    platform.check_and_update_config(config)
    assert (config.mode, config.lora_config, platform.asked) == ("compile", lora, platform)


def test_settings_with_other_layers_of_ours_are_other_settings_to_what_was_compiled(monkeypatch):
    def told(*choices: str, amx: bool = False) -> str:
        platform = type("OurPlatform", (Platform,), {})
        monkeypatch.setattr(compiling.many_rows, "useful", lambda _dtype: amx)
        compiling._fingerprint.cache_clear()
        compiling.tell_apart(platform, choices)
        once = platform.check_and_update_config
        compiling.tell_apart(platform, choices)
        assert platform.check_and_update_config == once
        config = engine_config(lora_config=None)
        platform.check_and_update_config(config)
        assert platform.asked is platform
        return str(config.additional_config["loraplex"])

    found = [told("native", "native"), told("native", "stock"), told("native", "native", amx=True)]
    assert len(set(found)) == 3
    assert told("native", "native") == found[0]


def test_compiled_graphs_on_disk_are_found_by_a_hash_of_our_code_and_can_be_read_back():
    from vllm.compilation import decorators
    from vllm.config import VllmConfig

    assert "self.additional_config" in inspect.getsource(VllmConfig.compute_hash)
    assert "vllm_config.compute_hash()" in inspect.getsource(caching.aot_compile_hash_factors)
    loading = inspect.getsource(decorators._try_load_aot_compiled_fn)
    assert "loaded_fn._artifacts.compiled_fn.finalize_loading(model.vllm_config)" in loading
    compiling.reuse_compiled()

    def graph(x: int) -> int:
        return x + 1

    graph.serialize = None  # type: ignore[attr-defined]
    compiled = BundledAOTAutogradSerializableCallable(graph)
    assert compiled.finalize_loading(None) is None
    assert compiled(1) == 2


@pytest.mark.parametrize(("mode", "used"), [(0o700, True), (0o755, True), (0o775, False), (0o777, False)])
def test_nothing_compiled_is_read_from_where_others_may_write(monkeypatch, tmp_path, mode, used):
    from torch._inductor import config as inductor
    from torch._inductor.runtime import cache_dir_utils
    from vllm import envs

    compiled, headers = tmp_path / "vllm", tmp_path / "headers"
    for directory in (compiled, headers):
        directory.mkdir()
        directory.chmod(mode)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(compiled))
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "0")
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "1")
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(headers))
    with inductor.patch(cpp_cache_precompile_headers=True):
        compiling.keep_to_own_files()
        assert envs.VLLM_DISABLE_COMPILE_CACHE is not used
        assert inductor.cpp_cache_precompile_headers is used
        assert os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] == str(int(used))


def test_headers_are_kept_in_a_directory_that_was_made_for_them_alone_and_not_behind_a_link(
    monkeypatch, tmp_path
):
    from torch._inductor import codecache, config
    from torch._inductor.runtime import cache_dir_utils

    assert Path(codecache._HEADER_DIR).parent == Path(cache_dir_utils.default_cache_dir())
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "1")
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(tmp_path / "new"))
    with config.patch(cpp_cache_precompile_headers=True):
        compiling.keep_to_own_files()
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
        assert config.cpp_cache_precompile_headers
        (tmp_path / "link").symlink_to(tmp_path / "new")
        monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(tmp_path / "link"))
        compiling.keep_to_own_files()
        assert not config.cpp_cache_precompile_headers


def test_the_settings_are_put_back_when_vllm_refuses_them(platform):
    def refuse(_cls: Any, _config: Any) -> None:
        raise ValueError("no")

    platform.check_and_update_config = classmethod(refuse)
    compiling.keep_compiling(platform)
    config = engine_config()
    with pytest.raises(ValueError, match="no"):
        platform.check_and_update_config(config)
    assert config.lora_config is not None


def test_without_a_compiler_the_engine_starts_uncompiled(platform, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    compiling.keep_compiling(platform)
    config = engine_config()
    platform.check_and_update_config(config)
    assert config.mode == "none"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallel_config": SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1)}, "spread"),
        ({"model_config": SimpleNamespace(dtype=torch.float32)}, "over a base of"),
        ({"lora_config": SimpleNamespace(lora_dtype=torch.float16)}, "float16"),
    ],
)
def test_what_the_kernels_cannot_serve_stays_as_vllm_has_it(platform, changes, reason):
    config = engine_config(**changes)
    assert reason in reason_against_native(config)
    compiling.keep_compiling(platform)
    platform.check_and_update_config(config)
    assert config.mode == "none"


def test_an_engine_that_cannot_have_native_mode_falls_back_unless_it_is_required(caplog):
    made = []
    config = engine_config(model_config=SimpleNamespace(dtype=torch.float32))
    hooks._maker(lambda *given: made.append(given), required=False)(config, "cpu", {})
    assert made == [(config, "cpu", {})]
    with pytest.raises(RuntimeError, match="over a base of"):
        hooks._maker(lambda *given: made.append(given), required=True)(config, "cpu", {})
    assert len(made) == 1


def test_a_vllm_that_moved_a_place_stops_the_start(monkeypatch):
    monkeypatch.delattr(mixin, "LRUCacheWorkerLoRAManager")
    with pytest.raises(PluginHookError, match="LRUCacheWorkerLoRAManager"):
        install_native(type("OurPlatform", (Platform,), {}), required=False)


def test_a_vllm_whose_places_take_something_else_stops_the_start(monkeypatch):
    monkeypatch.setattr(EngineCore, "preprocess_add_request", lambda self, request, more: None)
    monkeypatch.setattr(mixin, "LRUCacheWorkerLoRAManager", LRUCacheWorkerLoRAManager)
    with pytest.raises(PluginHookError, match="more"):
        install_native(type("OurPlatform", (Platform,), {}), required=False)


class Reader:
    """Reads blocks of text."""

    def read(self, path: str) -> str:
        if path == "/bad":
            raise ValueError("bad")
        return f"block of {path}"


@pytest.fixture
def taking_in(monkeypatch):
    """vLLM's method with ours around it, over a manager that holds adapter 1."""
    held = {1: "block 1"}
    manager = SimpleNamespace(
        reader=Reader, block=lambda number: held.get(number) or STAGED.get(number), stage=STAGED.put
    )
    monkeypatch.setattr(hooks, "_managers", [manager])
    taken: list[Any] = []
    method = hooks._staging(lambda self, request: taken.append(request))
    yield lambda request: method(None, request), taken
    for number in STAGED.ids():
        STAGED.drop(number)


def named(number: int, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return SimpleNamespace(lora_request=LoRARequest(f"a{number}", number, path))


def test_an_adapter_that_no_step_could_use_yet_is_read_as_its_request_comes_in(taking_in):
    take, taken = taking_in
    take(named(2, "/good"))
    take(named(1, "/gone"))
    take(SimpleNamespace(lora_request=None))
    assert STAGED.ids() == {2}
    assert len(taken) == 3


def test_a_request_holds_its_block_whatever_is_dropped_meanwhile(taking_in):
    take, taken = taking_in
    take(named(2, "/good"))
    assert STAGED.drop(2)
    assert taken[0].lora_request.block == "block of /good"
    assert (taken[0].lora_request.lora_name, taken[0].lora_request.lora_path) == ("a2", "/good")


def test_a_request_keeps_all_that_vllm_says_of_its_adapter(taking_in):
    from vllm.lora.request import LoRARequest

    take, taken = taking_in
    asked = LoRARequest("a1", 1, "/good", base_model_name="base", load_inplace=True)
    take(SimpleNamespace(lora_request=asked))
    found = taken[0].lora_request
    assert (found.base_model_name, found.load_inplace) == ("base", True)
    assert found.block == "block of /good", "what is loaded in place is read anew"


def test_an_adapter_that_cannot_be_read_fails_its_own_request_before_any_step(taking_in):
    take, taken = taking_in
    with pytest.raises(ValueError, match="bad"):
        take(named(3, "/bad"))
    assert taken == []
    assert not STAGED.ids()


def test_a_step_of_the_cpu_worker_is_what_pace_is_kept_around(monkeypatch):
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    assert "execute_model" not in vars(CPUWorker), "pace wraps its base class"
    assert '"execute_model"' in inspect.getsource(Executor.execute_model)
    pace, steps = Pace(), []
    monkeypatch.setattr(hooks, "PACE", pace)
    paced = hooks._paced(lambda _self, output: steps.append((output, pace._stepping)))
    paced(None, "scheduled")
    assert steps == [("scheduled", True)]
    hooks.install(type("OurPlatform", (Platform,), {}), required=False)
    assert Worker.execute_model.keeps_pace


def test_an_unknown_choice_names_the_known_ones(monkeypatch):
    monkeypatch.setenv(vllm_plugin.CPU_LORA_ENV, "fast")
    with pytest.raises(PluginHookError, match="'native' or 'grouped' or 'stock'"):
        vllm_plugin.register()
