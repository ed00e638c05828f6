"""The kernels, built once per machine; tests that run them are skipped, with the reason, where nothing builds them."""

import ctypes

import pytest

from loraplex_server.vllm_plugin.cpu.build import BuildError
from loraplex_server.vllm_plugin.cpu.kernels import load


@pytest.fixture(scope="session")
def loaded() -> ctypes.CDLL:
    try:
        return load()
    except BuildError as error:
        pytest.skip(f"no kernels here: {error}")
