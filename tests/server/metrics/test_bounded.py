"""Series for ever so many names: few labels, and sums that are exact."""

import random
import time
from collections import Counter
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.metrics.bounded import OTHER, Bounded, Handle, Layout, Series

BOUNDS = (0.25, 0.5, 1.0)
LAYOUT = Layout(counters=2, bounds=(BOUNDS,))


def numbers(series: Series) -> list[float]:
    return [*series.counters, *series.buckets[0], *series.sums]


def totals(bounded: Bounded) -> list[float]:
    return [sum(column) for column in zip(*map(numbers, bounded.copy().values()), strict=True)]


class Truth:
    """What was observed, counted plainly. Values are multiples of 1/1024, so that sums are exact in any order."""

    def __init__(self) -> None:
        self.numbers = [0.0] * 7
        self.by_name: Counter[str] = Counter()

    def call(self, bounded: Bounded, name: str, value: float) -> Handle:
        handle = bounded.hit(name)
        self.observe(handle, name, value)
        return handle

    def observe(self, handle: Handle, name: str, value: float) -> None:
        handle.series.counters[1] += 3
        handle.series.observe(0, BOUNDS, value, times=2)
        place = sum(value > bound for bound in BOUNDS)
        for index, more in ((1, 3), (2 + place, 2), (6, 2 * value)):
            self.numbers[index] += more
        self.by_name[name] += 3


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), names_max=st.integers(1, 100), skew=st.sampled_from([0.0, 0.8, 1.3]))
def test_sums_are_the_truth_while_ten_thousand_names_come_and_go(
    seed: int, names_max: int, skew: float
) -> None:
    chance, truth = random.Random(seed), Truth()
    bounded = Bounded(LAYOUT, names_max=names_max, fixed=("base",), halve_after=2000)
    names = [f"tenant{number}/adapter" for number in range(12_000)]
    weights = [1 / (rank + 1) ** skew for rank in range(len(names))]
    running: list[tuple[Handle, str]] = []
    others = [0.0] * 7
    stream = [*names, *chance.choices(names, weights, k=6000)] if skew else chance.sample(names, len(names))
    for number, name in enumerate(stream):
        value = chance.randrange(2048) / 1024
        running.append((truth.call(bounded, name, value), name))
        handle, of = running.pop(chance.randrange(len(running))) if len(running) > 50 else running[0]
        truth.observe(handle, of, value)  # a call that may have lost its label since it began
        if number % 1000 == 0:
            copy = bounded.copy()
            assert totals(bounded) == truth.numbers
            assert len(copy) <= names_max + 2
            assert all(now >= before for now, before in zip(numbers(copy[OTHER]), others, strict=True))
            assert all(
                series.counters[1] <= truth.by_name[known] for known, series in copy.items() if known != OTHER
            )
            others = numbers(copy[OTHER])
    assert len(truth.by_name) >= 10_000
    assert totals(bounded) == truth.numbers


def test_a_call_that_runs_on_after_its_name_lost_its_label_counts_for_other() -> None:
    bounded, truth = Bounded(LAYOUT, names_max=1), Truth()
    handle = truth.call(bounded, "first", 1.0)
    for _ in range(3):
        truth.call(bounded, "second", 0.5)
    assert set(bounded.copy()) == {OTHER, "second"}
    truth.observe(handle, "first", 2.0)
    assert bounded.copy()[OTHER].counters[1] == 9, (
        "both calls of the first, and one before the second was kept"
    )
    assert totals(bounded) == truth.numbers


def test_a_tenant_that_is_called_other_or_like_a_fixed_label_makes_no_second_series() -> None:
    bounded, truth = Bounded(LAYOUT, names_max=4, fixed=("base",)), Truth()
    for name in (OTHER, "base", "acme", OTHER):
        truth.call(bounded, name, 1.0)
    assert sorted(bounded.copy()) == ["acme", "base", OTHER]
    assert totals(bounded) == truth.numbers


def test_copies_from_another_thread_never_miss_or_double_what_is_moving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_over = Series.take_over

    def slowly(self: Series, other: Series) -> None:
        time.sleep(0.01)
        take_over(self, other)
        time.sleep(0.01)

    monkeypatch.setattr(Series, "take_over", slowly)
    bounded, seen, stop = Bounded(LAYOUT, names_max=1, halve_after=10), [0], []

    def look() -> None:
        while not stop:
            seen.append(sum(series.counters[0] for series in bounded.copy().values()))
        stop.append("the end")

    thread = Thread(target=look)
    thread.start()
    try:
        for number in range(60):
            bounded.hit(f"name{number // 6}").series.counters[0] += 1
            time.sleep(0.001)
    finally:
        stop.append("told")
        thread.join()
    assert stop == ["told", "the end"], "the other thread met an error"
    assert seen == sorted(seen), "a sum went back"
    assert sum(series.counters[0] for series in bounded.copy().values()) == 60
