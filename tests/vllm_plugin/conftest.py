"""The kernels, built once per machine; tests that run them are skipped, with the reason, where nothing builds them."""

import ctypes

import pytest

from loraplex_server.vllm_plugin.cpu import bf16, nf4
from loraplex_server.vllm_plugin.cpu.build import BuildError
from loraplex_server.vllm_plugin.cpu.kernels import load


@pytest.fixture(scope="session")
def loaded() -> ctypes.CDLL:
    try:
        return load()
    except BuildError as error:
        pytest.skip(f"no kernels here: {error}")


@pytest.fixture(scope="session")
def nf4_here() -> None:
    try:
        if not nf4.supported():
            pytest.skip("this processor has no AVX-512-BF16")
    except BuildError as error:
        pytest.skip(f"no kernels here: {error}")


@pytest.fixture(scope="session")
def bf16_here() -> None:
    try:
        if not bf16.supported():
            pytest.skip("this processor has no AVX-512-BF16")
    except BuildError as error:
        pytest.skip(f"no kernels here: {error}")
