"""Every planted bug is noticed by the test it names."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.registry import mutants

pytestmark = pytest.mark.reliability


def test_every_planted_bug_is_noticed(tmp_path: Path, figure: Callable[..., None]) -> None:
    tree = mutants.copy_tree(tmp_path)
    unclean = [tests for tests in {one.test for one in mutants.MUTANTS} if not mutants.is_clean(tree, tests)]
    figure("test files that fail without a bug", len(unclean), "0", not unclean)
    missed = [mutant.name for mutant in mutants.MUTANTS if not mutants.is_noticed(mutant, tree)]
    noticed = len(mutants.MUTANTS) - len(missed)
    figure("planted bugs noticed", f"{noticed} of {len(mutants.MUTANTS)}", "all", not missed)
    assert not missed, missed
