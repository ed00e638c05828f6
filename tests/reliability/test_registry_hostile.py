"""200,000 generated headers and settings, and every hand-made directory, under watch."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex_registry.validation.base import BaseModel
from tests.registry import builders, hostile

pytestmark = pytest.mark.reliability

GENERATED = 200_000


@pytest.fixture(autouse=True)
def _wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verdict within a second, by the clock on the wall."""
    monkeypatch.setattr(hostile, "CLOCK", time.perf_counter)


def test_registry_hostile_directories(tmp_path: Path, base: BaseModel, figure: Callable[..., None]) -> None:
    hostile.warm_up(tmp_path, base)
    before, refused = hostile.reset_peak(), 0
    for number, spoil in enumerate(hostile.CASES.values()):
        directory = builders.make_adapter(tmp_path / str(number))
        spoil(directory)
        refused += hostile.judge(directory, base) != "accepted"
    growth = (hostile.peak_bytes() - before) / (1 << 20)
    figure("hostile directories refused", refused, f"all {len(hostile.CASES)}", refused == len(hostile.CASES))
    figure("hostile directories: growth, MiB", round(growth, 1), "< 64", growth < 64)


def test_registry_hostile_generated(
    tmp_path: Path, base: BaseModel, seed: int, figure: Callable[..., None]
) -> None:
    found = hostile.generated_campaign(tmp_path, base, cases=GENERATED, seed=seed)
    growth = found.pop("growth") / (1 << 20)
    print(dict(found))
    judged = sum(found.values())
    figure("generated headers and settings judged", judged, f">= {GENERATED}", judged >= GENERATED)
    figure("generated: growth, MiB", round(growth, 1), "< 64", growth < 64)
