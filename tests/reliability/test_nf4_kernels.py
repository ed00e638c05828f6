"""The NF4 kernels against float64, 10,000 random weights and batches."""

from collections.abc import Callable

import pytest

from tests.vllm_plugin.conftest import nf4_here  # noqa: F401
from tests.vllm_plugin.nf4_cases import run_nf4_cases

pytestmark = [pytest.mark.reliability, pytest.mark.usefixtures("nf4_here")]
CASES = 10_000


def test_nf4_kernels_stay_within_the_error_bound(seed: int, figure: Callable[..., None]) -> None:
    worst = round(run_nf4_cases(seed, CASES), 3)
    figure("largest error, NF4", worst, "<= 1 of the bound", worst <= 1)
    figure("NF4 cases", CASES, f">= {CASES}", True)
