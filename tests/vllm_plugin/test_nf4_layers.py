"""The hook into vLLM's bitsandbytes plugin: layers compute as before, and it is loud when the plugin has moved."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from vllm.model_executor.model_loader import base_loader, utils
from vllm_bnb_plugin import bitsandbytes_loader
from vllm_bnb_plugin.quantization.linear import BitsAndBytesLinearMethod

from loraplex_server import vllm_plugin
from loraplex_server.vllm_plugin import PluginHookError, register
from loraplex_server.vllm_plugin.cpu import nf4, nf4_layers
from loraplex_server.vllm_plugin.cpu.build import BuildError
from loraplex_server.vllm_plugin.cpu.nf4_layers import PACKED, install

STOCK_APPLY = getattr(
    BitsAndBytesLinearMethod, "loraplex_stock_apply", BitsAndBytesLinearMethod._apply_4bit_weight
)


def hooked(*, int8=False):
    """The plugin's method with our hook, as a class of its own: the process's is left alone."""

    class Method(BitsAndBytesLinearMethod):
        _apply_4bit_weight = STOCK_APPLY

        def process_weights_after_loading(self, layer):
            """As vLLM's."""

    install(Method, int8=int8)
    return Method(SimpleNamespace(load_in_8bit=False))


@pytest.fixture
def method():
    return hooked()


@pytest.fixture(autouse=True)
def asked_afresh():
    nf4_layers._products.cache_clear()
    yield
    nf4_layers._products.cache_clear()


def loaded_layer(outs, in_features, *, quant_type="nf4", blocksize=64):
    """A layer as the plugin's loader leaves it, and its weight in bf16."""
    parts = [
        quantize_4bit(
            torch.randn(out, in_features).bfloat16(),
            quant_type=quant_type,
            blocksize=blocksize,
            compress_statistics=False,
        )
        for out in outs
    ]
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.cat([codes for codes, _ in parts]), requires_grad=False)
    layer.weight.bnb_quant_state = {number: state for number, (_, state) in enumerate(parts)}
    sizes = [0, *(codes.numel() for codes, _ in parts)]
    layer.weight.bnb_shard_offsets = torch.tensor(sizes).cumsum(0)
    return layer, torch.cat([dequantize_4bit(codes, state) for codes, state in parts])


def test_this_plugin_still_notes_at_weights_what_the_hook_reads():
    """Guards an upgrade: names in the loader, and that vLLM asks methods to process weights after that."""
    source = inspect.getsource(bitsandbytes_loader)
    assert '{"bnb_quant_state": quant_states}' in source
    assert '{"bnb_shard_offsets": offsets}' in source
    assert "self._apply_4bit_weight(layer, x, bias)" in inspect.getsource(BitsAndBytesLinearMethod.apply)
    assert "quant_method.process_weights_after_loading(module)" in inspect.getsource(utils)
    loading = inspect.getsource(base_loader.BaseModelLoader.load_model)
    assert 0 < loading.index("self.load_weights(") < loading.index("process_weights_after_loading(")


@pytest.mark.usefixtures("nf4_here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_packed_layer_computes_as_the_plugin_does(method, dtype):
    layer, weight = loaded_layer((96, 40, 40), 128)
    before = {
        "memory": layer.weight.numel()
        + 4 * sum(s.absmax.numel() for s in layer.weight.bnb_quant_state.values())
    }
    x, bias = torch.randn(2, 5, 128).to(dtype), torch.randn(176).to(dtype)
    stock = method.apply(layer, x, bias)
    method.process_weights_after_loading(layer)
    assert getattr(layer, PACKED) == (176, 64, False)
    assert not hasattr(layer.weight, "bnb_quant_state")
    assert layer.weight.numel() <= before["memory"] + 16 * 64 * 3 + 64  # 176 outputs are padded to 192
    ours = method.apply(layer, x, bias)
    exact = x.bfloat16().double() @ weight.double().t() + bias.double()
    assert ours.dtype == dtype
    assert ours.shape == (2, 5, 176)
    assert (ours - exact).abs().max() <= (stock - exact).abs().max()
    assert torch.allclose(ours.float(), stock.float(), rtol=2**-6, atol=0.1)


@pytest.mark.usefixtures("nf4_here")
def test_in_eight_bits_a_layer_is_a_percent_from_the_plugin():
    if not nf4.supported(int8=True):
        pytest.skip("this processor has no AVX-512-VNNI")
    layer, weight = loaded_layer((96, 40), 1024)
    method, x = hooked(int8=True), torch.randn(7, 1024).bfloat16()
    method.process_weights_after_loading(layer)
    assert getattr(layer, PACKED) == (136, 64, True)
    exact = x.double() @ weight.double().t()
    assert 0 < (method.apply(layer, x) - exact).norm() / exact.norm() < 0.012


@pytest.mark.usefixtures("nf4_here")
def test_without_eight_bit_products_the_layer_computes_in_bf16_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(nf4, "supported", lambda *, int8=False: not int8)
    layer, _ = loaded_layer((64,), 128)
    with caplog.at_level(logging.INFO, "vllm.loraplex"):
        hooked(int8=True).process_weights_after_loading(layer)
    assert getattr(layer, PACKED) == (64, 64, False)
    assert "no AVX-512-VNNI" in caplog.text


@pytest.mark.usefixtures("nf4_here")
@pytest.mark.parametrize("odd", [{"quant_type": "fp4"}, {"in_features": 40}])
def test_a_layer_the_kernels_do_not_know_stays_as_it_was(method, odd, caplog):
    layer, _ = loaded_layer((64,), odd.get("in_features", 128), quant_type=odd.get("quant_type", "nf4"))
    x, original = torch.randn(3, odd.get("in_features", 128)).bfloat16(), layer.weight
    before = method.apply(layer, x)
    with caplog.at_level(logging.INFO, "vllm.loraplex"):
        method.process_weights_after_loading(layer)
    assert layer.weight is original
    assert torch.equal(method.apply(layer, x), before)
    assert "stays with bitsandbytes" in caplog.text


def test_eight_bit_layers_are_not_looked_at(method):
    method.quant_config = SimpleNamespace(load_in_8bit=True)
    layer = torch.nn.Module()
    method.process_weights_after_loading(layer)
    assert not hasattr(layer, PACKED)


@pytest.mark.parametrize("broken", ["processor", "compiler"])
def test_where_the_kernels_cannot_run_the_plugin_does_and_the_log_says_so(
    method, monkeypatch, caplog, broken
):
    def supported():
        if broken == "compiler":
            raise BuildError("no C++ compiler (g++): install one")
        return False

    monkeypatch.setattr(nf4, "supported", supported)
    layer, _ = loaded_layer((64,), 128)
    with caplog.at_level(logging.INFO, "vllm.loraplex"):
        method.process_weights_after_loading(layer)
        method.process_weights_after_loading(layer)
    assert not hasattr(layer, PACKED)
    assert method.apply(layer, torch.randn(3, 128).bfloat16()).shape == (3, 64)
    (line,) = caplog.messages
    assert {"processor": "AVX-512-BF16", "compiler": "no C++ compiler"}[broken] in line


def test_installing_twice_is_installing_once(method):
    kind = type(method)
    once = kind._apply_4bit_weight
    install(kind)
    assert kind._apply_4bit_weight is once
    assert kind.loraplex_stock_apply is STOCK_APPLY


def test_a_plugin_that_has_moved_stops_the_start(monkeypatch):
    class Moved:
        def _apply_4bit_weight(self, layer, x):
            """Takes no bias any more."""

        def process_weights_after_loading(self, layer):
            """As before."""

    monkeypatch.setattr("vllm_bnb_plugin.quantization.linear.BitsAndBytesLinearMethod", Moved)
    with pytest.raises(PluginHookError, match="expected"):
        vllm_plugin._install_nf4()
    monkeypatch.setattr("vllm_bnb_plugin.quantization.linear.BitsAndBytesLinearMethod", type("Empty", (), {}))
    with pytest.raises(PluginHookError, match="_apply_4bit_weight"):
        vllm_plugin._install_nf4()


def test_an_unknown_choice_stops_the_start(monkeypatch):
    monkeypatch.setenv(vllm_plugin.CPU_NF4_ENV, "int4")
    with pytest.raises(PluginHookError, match="int4"):
        register()


@pytest.mark.parametrize(("choice", "expected"), [("native", [False]), ("int8", [True]), ("stock", [])])
def test_the_choice_decides_whether_the_plugin_is_changed(monkeypatch, choice, expected):
    installed = []
    monkeypatch.setattr(vllm_plugin, "_install_nf4", lambda *, int8: installed.append(int8))
    monkeypatch.setenv(vllm_plugin.CPU_NF4_ENV, choice)
    monkeypatch.setenv(vllm_plugin.CPU_LORA_ENV, "stock")  # the choices are independent
    monkeypatch.setenv(vllm_plugin.CPU_BF16_ENV, "stock")
    register()
    assert installed == expected
