"""The NF4 kernels against float64, 10,000 random weights and batches."""

from collections.abc import Callable

import pytest

from loraplex_server.vllm_plugin.cpu.nf4 import supported
from tests.vllm_plugin.conftest import nf4_here  # noqa: F401
from tests.vllm_plugin.nf4_cases import run_nf4_cases

pytestmark = [pytest.mark.reliability, pytest.mark.usefixtures("nf4_here")]
CASES = 10_000


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_nf4_kernels_stay_within_the_error_bound(seed: int, figure: Callable[..., None], int8: bool) -> None:
    if int8 and not supported(int8=True):
        pytest.skip("this processor has no AVX-512-VNNI")
    name = "NF4 in int8" if int8 else "NF4"
    worst = round(run_nf4_cases(seed, CASES, int8=int8), 3)
    figure(f"largest error of {CASES} cases, {name}", worst, "<= 1 of the bound", worst <= 1)
