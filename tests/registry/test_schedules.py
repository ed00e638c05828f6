"""Publishers, taggers, deleters, collectors and readers in every order a scheduler can think of."""

from pathlib import Path

from tests.registry import schedules
from tests.registry.lab import Lab


def test_no_order_of_calls_breaks_an_invariant(tmp_path: Path) -> None:
    assert schedules.run(Lab.build(tmp_path), schedules=100) > 2000


def test_a_seed_tells_the_whole_story(tmp_path: Path) -> None:
    """A schedule that failed can be run again."""
    lab = Lab.build(tmp_path)
    assert schedules.run(lab, schedules=3, first_seed=7) == schedules.run(lab, schedules=3, first_seed=7)
