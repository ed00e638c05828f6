"""The hook into vLLM's choice of kernels for linear layers on CPU, and that it is loud when vLLM has moved."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

from loraplex_server import vllm_plugin
from loraplex_server.vllm_plugin import PluginHookError, register
from loraplex_server.vllm_plugin.cpu import bf16, bf16_layers
from loraplex_server.vllm_plugin.cpu.bf16_layers import install
from loraplex_server.vllm_plugin.cpu.build import BuildError
from tests.vllm_plugin.nf4_cases import worst_over_bound

STOCK = getattr(utils.dispatch_cpu_unquantized_gemm, "loraplex_stock", utils.dispatch_cpu_unquantized_gemm)


@pytest.fixture
def choosing():
    """vLLM's module with our hook, as one of its own: the process's is left alone."""
    module = SimpleNamespace(dispatch_cpu_unquantized_gemm=STOCK)
    install(module)
    return module


@pytest.fixture(autouse=True)
def asked_afresh():
    bf16_layers._usable.cache_clear()
    yield
    bf16_layers._usable.cache_clear()


def layer_of(outs: int = 80, ins: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(outs, ins).to(dtype), requires_grad=False)
    return layer


def computed(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `cpu_unquantized_gemm` asks."""
    return layer.cpu_linear(x, layer.weight, bias)


def test_vllm_still_asks_the_choice_by_its_name_when_weights_are_loaded():
    for kind in (linear.UnquantizedLinearMethod, vocab_parallel_embedding.UnquantizedEmbeddingMethod):
        source = inspect.getsource(kind.process_weights_after_loading)
        assert "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm" in source
    assert "layer.cpu_linear(x, weight, bias)" in inspect.getsource(utils.cpu_unquantized_gemm)


@pytest.mark.usefixtures("bf16_here")
@pytest.mark.parametrize("remove_weight", [True, False])
def test_a_layer_is_computed_by_our_kernels_within_their_bound(choosing, remove_weight, monkeypatch):
    monkeypatch.setattr(bf16_layers.many_rows, "useful", lambda _dtype: False)  # on a processor with AMX too
    layer = layer_of()
    weight = layer.weight.data.clone()
    choosing.dispatch_cpu_unquantized_gemm(layer, remove_weight)
    for n_rows in (1, 16, 40):
        x, bias = torch.randn(n_rows, 64).bfloat16(), torch.randn(80).bfloat16()
        assert worst_over_bound(computed(layer, x, bias), x, weight, bias) <= 1
    kept = layer.weight.dim() == 2
    assert kept != remove_weight  # the weight is there once, in one order or the other
    assert not kept or torch.equal(layer.weight, weight)


@pytest.mark.usefixtures("bf16_here")
@pytest.mark.parametrize(
    "layer",
    [
        layer_of(dtype=torch.float32),
        layer_of(ins=63),
        SimpleNamespace(weight=torch.empty(4, 6, device="meta", dtype=torch.bfloat16)),
        SimpleNamespace(weight=torch.empty(4, 6, 8, dtype=torch.bfloat16)),
    ],
)
def test_a_layer_the_kernels_do_not_know_is_left_to_vllm(layer):
    asked = []
    module = SimpleNamespace(dispatch_cpu_unquantized_gemm=lambda layer, remove_weight: asked.append(layer))
    install(module)
    module.dispatch_cpu_unquantized_gemm(layer, True)  # as vLLM calls it
    assert asked == [layer]


@pytest.mark.parametrize("broken", ["processor", "compiler"])
def test_where_the_kernels_cannot_run_vllms_do_and_the_log_says_so(choosing, monkeypatch, caplog, broken):
    def supported():
        if broken == "compiler":
            raise BuildError("no C++ compiler (g++): install one")
        return False

    monkeypatch.setattr(bf16, "supported", supported)
    layer = layer_of()
    with caplog.at_level(logging.INFO, "vllm.loraplex"):
        choosing.dispatch_cpu_unquantized_gemm(layer, False)
        choosing.dispatch_cpu_unquantized_gemm(layer_of(), False)
    assert computed(layer, torch.randn(3, 64).bfloat16(), None).shape == (3, 80)
    (line,) = caplog.messages
    assert {"processor": "AVX-512-BF16", "compiler": "no C++ compiler"}[broken] in line


def test_installing_twice_is_installing_once(choosing):
    once = choosing.dispatch_cpu_unquantized_gemm
    install(choosing)
    assert choosing.dispatch_cpu_unquantized_gemm is once


def test_a_vllm_that_has_moved_stops_the_start(monkeypatch):
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", lambda layer: None)
    with pytest.raises(PluginHookError, match="expected"):
        vllm_plugin._install_bf16()
    monkeypatch.delattr(utils, "dispatch_cpu_unquantized_gemm")
    with pytest.raises(PluginHookError, match="dispatch_cpu_unquantized_gemm"):
        vllm_plugin._install_bf16()


def test_an_unknown_choice_stops_the_start(monkeypatch):
    monkeypatch.setenv(vllm_plugin.CPU_BF16_ENV, "fp8")
    with pytest.raises(PluginHookError, match="fp8"):
        register()


@pytest.mark.parametrize("choice", ["native", "stock"])
def test_the_choice_decides_whether_vllm_is_changed(monkeypatch, choice):
    installed = []
    monkeypatch.setattr(vllm_plugin, "_install_bf16", lambda: installed.append(True))
    monkeypatch.setenv(vllm_plugin.CPU_BF16_ENV, choice)
    monkeypatch.setenv(vllm_plugin.CPU_LORA_ENV, "stock")  # the choices are independent
    monkeypatch.setenv(vllm_plugin.CPU_NF4_ENV, "stock")
    register()
    assert bool(installed) == (choice == "native")
