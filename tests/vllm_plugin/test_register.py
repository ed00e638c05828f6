"""The hook into vLLM: installed where it belongs, loud when vLLM has moved it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from vllm.lora.punica_wrapper import punica_cpu, punica_selector
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.platforms.cpu import CpuPlatform

from loraplex_server import vllm_plugin
from loraplex_server.vllm_plugin import GROUPED_WRAPPER, STOCK_WRAPPER, PluginHookError, install, register
from loraplex_server.vllm_plugin.punica import GroupedPunicaWrapper


@pytest.fixture
def platform():
    """A fresh CPU platform class, so that the process's own is left alone."""

    class Platform(CpuPlatform):
        get_punica_wrapper = classmethod(lambda cls: STOCK_WRAPPER)

    return Platform


def test_this_vllm_still_has_the_hook_the_plugin_uses():
    """Guards an upgrade: the platform names the wrapper, and the selector asks the platform."""
    assert f'"{STOCK_WRAPPER}"' in inspect.getsource(inspect.getmodule(CpuPlatform))
    assert "current_platform.get_punica_wrapper()" in inspect.getsource(punica_selector.get_punica_wrapper)


def test_this_vllm_still_calls_the_wrapper_as_it_is_written():
    """Guards an upgrade: each method of vLLM's CPU wrapper exists in ours and takes the same arguments."""
    for name, theirs in inspect.getmembers(punica_cpu.PunicaWrapperCPU, inspect.isfunction):
        if name.startswith("_") and name != "__init__":
            continue
        ours = inspect.signature(getattr(GroupedPunicaWrapper, name)).parameters
        for parameter in inspect.signature(theirs).parameters.values():
            taken = parameter.name in ours or any(one.kind is one.VAR_KEYWORD for one in ours.values())
            assert taken, f"{name}() of this vLLM takes {parameter.name}"
    assert not getattr(GroupedPunicaWrapper, "__abstractmethods__", None)
    assert issubclass(GroupedPunicaWrapper, PunicaWrapperBase)


def test_installing_twice_names_our_wrapper_once(platform):
    install(platform)
    install(platform)
    assert platform.get_punica_wrapper() == GROUPED_WRAPPER


def test_the_named_wrapper_is_what_vllms_selector_makes(platform, monkeypatch):
    install(platform)
    monkeypatch.setattr(punica_selector, "current_platform", platform())
    made = punica_selector.get_punica_wrapper(16, max_batches=4, device="cpu", lora_config=None)
    assert type(made) is GroupedPunicaWrapper


def test_a_vllm_without_the_hook_stops_the_start():
    with pytest.raises(PluginHookError, match="no get_punica_wrapper"):
        install(type("Moved", (), {}))


def test_a_wrapper_we_do_not_know_is_not_replaced(platform):
    platform.get_punica_wrapper = classmethod(lambda cls: "other.Wrapper")
    with pytest.raises(PluginHookError, match=r"other\.Wrapper"):
        install(platform)
    assert platform.get_punica_wrapper() == "other.Wrapper"


def test_an_unknown_choice_stops_the_start(monkeypatch):
    monkeypatch.setenv(vllm_plugin.CPU_LORA_ENV, "Stock")
    with pytest.raises(PluginHookError, match="Stock"):
        register()


@pytest.mark.parametrize(("choice", "is_cpu"), [("stock", True), ("grouped", False)])
def test_stock_and_other_platforms_are_left_alone(platform, monkeypatch, choice, is_cpu):
    platform.is_cpu = lambda self: is_cpu
    monkeypatch.setattr("vllm.platforms._current_platform", platform())
    monkeypatch.setenv(vllm_plugin.CPU_LORA_ENV, choice)
    register()
    assert platform.get_punica_wrapper() == STOCK_WRAPPER


def test_the_entry_point_is_found_by_vllm():
    from importlib.metadata import entry_points

    (found,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "loraplex")
    assert found.load() is register


def test_importing_the_plugin_imports_neither_torch_nor_vllm():
    show = "print([name for name in ('torch', 'vllm') if name in sys.modules])"
    script = f"import sys, loraplex_server.vllm_plugin; {show}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
