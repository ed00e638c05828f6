"""Races of 32 writers, 200 rounds of each kind on each backend, and counters: nothing is lost, nobody wins twice."""

import pytest

from loraplex_registry.storage.store import Store
from tests.registry import races

pytestmark = pytest.mark.reliability

WRITERS = 32
ROUNDS = 200


def _place(store: Store) -> str:
    return store.url.partition(":")[0]


@pytest.mark.parametrize("kind", races.KINDS)
def test_registry_races_of_threads(kind: str, store: Store, figure) -> None:  # type: ignore[no-untyped-def]
    tally = races.in_threads(store, writers=WRITERS, rounds=ROUNDS, kind=kind)
    _report(figure, f"{kind} races of 32 threads on {_place(store)}, one winner", tally)


@pytest.mark.parametrize("kind", races.KINDS)
def test_registry_races_of_processes(kind: str, local: Store, figure) -> None:  # type: ignore[no-untyped-def]
    tally = races.in_processes(local.url, processes=4, threads=8, rounds=ROUNDS, kind=kind)
    _report(figure, f"{kind} races of 4 processes of 8 threads on file, one winner", tally)


def test_registry_counter_of_threads(store: Store, figure) -> None:  # type: ignore[no-untyped-def]
    value = races.count(store, writers=8, each=50)
    figure(f"increments by 8 threads on {_place(store)}", value, "= 400", value == 400)


def test_registry_counter_of_processes(local: Store, figure) -> None:  # type: ignore[no-untyped-def]
    value = races.count_in_processes(local.url, processes=8, each=200)
    figure("increments by 8 processes on file", value, "= 1600", value == 1600)


def _report(figure, name: str, tally: races.Tally) -> None:  # type: ignore[no-untyped-def]
    print(tally.winners, tally.wrong[:5])
    figure(
        name,
        f"{tally.good} of {tally.rounds}",
        f"{ROUNDS} of {ROUNDS}",
        (tally.good, tally.rounds) == (ROUNDS,) * 2,
    )
