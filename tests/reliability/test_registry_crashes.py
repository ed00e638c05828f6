"""Every command dies at every store call, on every kind of store."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Store, open_store
from tests.registry import crashes
from tests.registry.crashes import MEND, SCENARIOS
from tests.registry.lab import NOW, Lab

pytestmark = pytest.mark.reliability


@pytest.mark.parametrize("kind", ["memory", "local", "s3"])
def test_whatever_dies_anywhere_is_completed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, figure: Callable[..., None]
) -> None:
    lab = Lab.build(tmp_path)
    numbers = itertools.count()

    def new_store() -> Store:
        if kind == "memory":
            return MemoryStore(clock=lambda: NOW.timestamp())
        name = f"crash-{next(numbers)}"
        if kind == "s3":
            return open_store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}/{name}")
        store = open_store((tmp_path / name).as_uri())
        store.prepare()
        return store

    if kind == "s3":
        request.getfixturevalue("s3")
    deaths = sum(crashes.run(lab, new_store, scenario) for scenario in (*SCENARIOS, MEND))
    figure(f"deaths at a store call, {kind}", deaths, ">= 100", deaths >= 100)
