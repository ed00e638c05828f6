"""The long campaigns: `make reliability K=registry`. Each reports its figures; a table is printed at the end.

A campaign is the long form of a test of `make test`: both call one function with another size. Figures go to
`benchmarks/results/reliability_<area>.json` when a whole area ran.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from benchmarks import report

# Campaigns use the stores, keys and bases of the registry's tests.
from tests.registry.conftest import *  # noqa: F403

FIGURES = pytest.StashKey[list["Figure"]]()


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    test: str
    name: str
    value: int | float | str
    target: str
    ok: bool
    seconds: float


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Reports a figure: `figure(name, value, target, ok)`; the test fails at its end when one is not ok."""
    started, mine = time.monotonic(), []

    def tell(name: str, value: int | float | str, target: str, ok: bool) -> None:
        mine.append(Figure(request.node.name, name, value, target, ok, round(time.monotonic() - started, 1)))

    yield tell
    request.config.stash.setdefault(FIGURES, []).extend(mine)
    missed = [f"{one.name}: {one.value}, wanted {one.target}" for one in mine if not one.ok]
    assert mine, "a campaign reports at least one figure"
    assert not missed, "; ".join(missed)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed, printed; `--seed N` repeats a run."""
    given = request.config.getoption("--seed")
    number = random.SystemRandom().randrange(1 << 32) if given is None else int(given)
    print(f"seed {number}")
    return number


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table and keep it."""
    figures = config.stash.get(FIGURES, [])
    if not figures:
        return
    terminalreporter.section("figures")
    width = max(len(one.name) for one in figures)
    for one in figures:
        verdict = "met" if one.ok else "MISSED"
        terminalreporter.line(
            f"{one.name:<{width}}  {one.value!s:>14}  wanted {one.target:<24} {verdict:<6} {one.seconds:8.1f} s"
        )
    area = config.getoption("--save-figures")
    if area:
        path = report.save_figures(f"reliability_{area}", [vars(one) for one in figures])
        terminalreporter.line(f"kept in {path.relative_to(config.rootpath)}")
