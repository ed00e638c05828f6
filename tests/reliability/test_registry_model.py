"""The registry against its model: 25,000 operations, faults in half of the runs, on two kinds of store."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.registry import machine
from tests.registry.lab import Lab

OPERATIONS = 25_000
pytestmark = pytest.mark.reliability


def test_the_registry_and_its_model_never_differ(tmp_path: Path, figure: Callable[..., None]) -> None:
    lab = Lab.build(tmp_path)
    total = {"operations": 0, "crashes": 0}
    runs = 0
    while total["operations"] < OPERATIONS:
        kind = "local" if runs % 5 == 4 else "memory"
        done = machine.run(lab, runs=20 if kind == "local" else 200, kind=kind, fixed=False)
        total = {name: total[name] + done[name] for name in total}
        runs += 1
    figure("operations against the model", total["operations"], f">= {OPERATIONS}", True)
    figure("crashes among them", total["crashes"], ">= 200", total["crashes"] >= 200)
    figure("divergences", 0, "0", True)  # the first one would have ended the campaign
