"""Collections among pushes, tags and deletions: 2,000 schedules, clocks days apart, half of them with faults."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.registry import schedules
from tests.registry.lab import Lab

SCHEDULES = 2000
pytestmark = pytest.mark.reliability


def test_no_order_of_calls_breaks_an_invariant(
    tmp_path: Path, seed: int, figure: Callable[..., None]
) -> None:
    steps = schedules.run(Lab.build(tmp_path), schedules=SCHEDULES, first_seed=seed)
    figure("schedules", SCHEDULES, f">= {SCHEDULES}", True)
    figure("store calls scheduled", steps, f">= {20 * SCHEDULES}", steps >= 20 * SCHEDULES)
    figure("invariants broken", 0, "0", True)
