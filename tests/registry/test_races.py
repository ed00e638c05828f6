"""Of 32 writers exactly one wins, on every backend, in threads and in processes; counters lose nothing.

The long form, 200 rounds each, is tests/reliability/test_registry_races.py.
"""

from pathlib import Path

import pytest

from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Store, open_store
from tests.registry import odd_stores, races

ROUNDS = 5


@pytest.mark.parametrize("kind", races.KINDS)
def test_of_32_writers_exactly_one_wins_every_round(kind: str, store: Store) -> None:
    tally = races.in_threads(store, writers=32, rounds=ROUNDS, kind=kind)
    assert tally.wrong == []
    assert (tally.good, tally.rounds) == (ROUNDS, ROUNDS)


@pytest.mark.parametrize("kind", races.KINDS)
def test_of_4_processes_of_8_writers_exactly_one_wins_every_round(kind: str, local: Store) -> None:
    tally = races.in_processes(local.url, processes=4, threads=8, rounds=ROUNDS, kind=kind)
    assert tally.wrong == []
    assert (tally.good, tally.rounds) == (ROUNDS, ROUNDS)


def test_no_increment_of_a_counter_is_lost(store: Store) -> None:
    assert races.count(store, writers=8, each=5) == 40


def test_no_increment_of_processes_is_lost(local: Store) -> None:
    assert races.count_in_processes(local.url, processes=4, each=25) == 100


def test_a_directory_opened_twice_is_one_store(tmp_path: Path) -> None:
    """Two handles share no lock object, so only the lock on disk can keep them apart."""
    one, two = open_store(str(tmp_path / "r")), open_store(str(tmp_path / "r"))
    one.prepare()
    etag = one.create("t/a.json", b"0")
    assert races.count(two, writers=2, each=3) == 6
    assert one.get("t/a.json", limit_bytes=1).etag == etag


@pytest.mark.parametrize(
    ("kind", "store"),
    [
        ("create", odd_stores.TwoCreate()),
        ("swap", odd_stores.TwoSwap()),
        ("create", odd_stores.IgnoresBoth()),
    ],
    ids=["two create", "two swap", "ignores both"],
)
def test_the_race_finds_a_store_with_two_winners(kind: str, store: MemoryStore) -> None:
    assert races.in_threads(store, writers=32, rounds=ROUNDS, kind=kind).wrong
