"""A command that dies at any store call loses nothing, and running it again completes it."""

from pathlib import Path

import pytest

from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Store, open_store
from tests.registry import crashes
from tests.registry.crashes import MEND, SCENARIOS, Scenario
from tests.registry.lab import NOW, Lab


def in_memory() -> Store:
    return MemoryStore(clock=lambda: NOW.timestamp())


@pytest.mark.parametrize("scenario", [*SCENARIOS, MEND], ids=lambda scenario: scenario.name)
def test_whatever_dies_anywhere_is_completed_by_the_same_command(scenario: Scenario, lab: Lab) -> None:
    assert crashes.run(lab, in_memory, scenario) >= 6


def test_a_directory_keeps_the_same_promises(lab: Lab, tmp_path: Path) -> None:
    numbers = iter(range(10_000))

    def new_store() -> Store:
        store = open_store((tmp_path / f"store-{next(numbers)}").as_uri())
        store.prepare()
        return store

    assert crashes.run(lab, new_store, SCENARIOS[3]) >= 8
