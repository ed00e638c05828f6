"""SIGKILL of the real command at random moments loses nothing that was acknowledged."""

from pathlib import Path

from tests.registry import kills

SEED = 20260601


def test_a_killed_command_loses_nothing_and_is_completed_by_the_same_command(tmp_path: Path) -> None:
    done = kills.run(tmp_path, kills=6, seed=SEED)
    assert done.kills >= 6
    assert done.pushed
