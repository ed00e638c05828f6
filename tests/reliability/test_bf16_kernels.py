"""The bf16 kernels against float64, 10,000 random weights and batches."""

from collections.abc import Callable

import pytest

from tests.vllm_plugin.bf16_cases import run_bf16_cases
from tests.vllm_plugin.conftest import bf16_here  # noqa: F401

pytestmark = [pytest.mark.reliability, pytest.mark.usefixtures("bf16_here")]
CASES = 10_000


def test_bf16_kernels_stay_within_the_error_bound(seed: int, figure: Callable[..., None]) -> None:
    worst = round(run_bf16_cases(seed, CASES), 3)
    figure(f"largest error of {CASES} cases, bf16", worst, "<= 1 of the bound", worst <= 1)
