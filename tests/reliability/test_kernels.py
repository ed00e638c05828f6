"""The CPU LoRA kernels against float64, 10,000 random batches over every instruction set of this machine."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraplex_server.vllm_plugin.cpu.build import CACHE_ENV
from loraplex_server.vllm_plugin.cpu.kernels import load
from tests.vllm_plugin.conftest import loaded  # noqa: F401
from tests.vllm_plugin.kernel_cases import ISAS, UNIT, instruction_set, run_cases

pytestmark = pytest.mark.reliability
CASES = 10_000


def test_kernels_stay_within_the_error_bound(
    loaded: ctypes.CDLL,  # noqa: F811
    seed: int,
    figure: Callable[..., None],
) -> None:
    here = []
    for name in ISAS:
        with instruction_set(loaded, name) as present:
            here += [name] * present
    runs = [(dtype, name) for dtype in UNIT for name in here]
    each = -(-CASES // len(runs))
    for dtype, name in runs:
        worst = round(run_cases(loaded, dtype, name, seed, each), 3)
        figure(
            f"largest error of {each} cases, {name}, {str(dtype).removeprefix('torch.')}",
            worst,
            "<= 1 of the bound",
            worst <= 1,
        )


def test_kernels_are_built_in_an_empty_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "new"))
    built = load()
    assert torch.get_num_threads() >= 1
    assert [one.suffix for one in (tmp_path / "new").iterdir()] == [".so"]
    found = built.lp_isa().decode()
    figure("kernels built in an empty cache", found, "an instruction set", found in ISAS)
