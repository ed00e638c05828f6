"""The judge of canaries: its statistics against exact values, and its two kinds of mistake."""

import random
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_server.rollout.judge import (
    SAMPLES_MAX,
    Limits,
    Sample,
    Window,
    median_high,
    median_low,
    verdict,
    wilson_low,
)

LIMITS = Limits()


def window(
    count: int, *, failed: int = 0, first_s: float = 0.1, token_s: float = 0.01, seed: int = 0
) -> Window:
    """Calls whose times vary by a factor of up to two around the given ones."""
    chance, made = random.Random(seed), Window()
    for number in range(count):
        if number < failed:
            made.add(Sample(0.0, True))
        else:
            noise = 2 ** chance.uniform(-0.5, 0.5)
            made.add(Sample(0.0, False, first_s * noise, token_s * noise))
    return made


def test_the_interval_of_a_rate_is_wilsons() -> None:
    # 10 of 100 with z = 1.6449: (0.1 + 0.013528 - 1.6449 * sqrt(0.0009 + 0.00006764)) / 1.027057
    assert wilson_low(10, 100) == pytest.approx(0.0607, abs=2e-4)
    assert wilson_low(0, 50) == 0.0
    assert 0.8 < wilson_low(20, 20) < 0.9


@given(st.integers(1, SAMPLES_MAX))
def test_the_ends_of_a_median_leave_at_most_five_in_hundred_outside(count: int) -> None:
    ordered = [float(number) for number in range(count)]
    low = int(median_low(ordered))
    outside = sum(comb(count, heads) for heads in range(low + 1)) / 2**count
    assert outside <= 0.05 or low == 0
    assert median_high(ordered) == count - 1 - low
    further = sum(comb(count, heads) for heads in range(low + 2)) / 2**count
    assert further > 0.05


def test_a_canary_as_good_as_the_stable_version_stays() -> None:
    assert verdict(window(500, failed=5), window(100, failed=1, seed=1), LIMITS) == ""


def test_nothing_is_said_of_too_few_calls() -> None:
    assert verdict(window(500), window(19, failed=19), LIMITS) == ""


def test_a_canary_that_fails_more_often_goes() -> None:
    assert "10 of 50 calls failed" in verdict(window(500), window(50, failed=10), LIMITS)


def test_a_failing_stable_version_excuses_a_failing_canary() -> None:
    assert verdict(window(100, failed=30), window(50, failed=15), LIMITS) == ""


def test_a_canary_that_is_slow_to_begin_goes() -> None:
    assert "first token" in verdict(window(100), window(50, first_s=0.3, seed=1), LIMITS)


def test_a_canary_that_is_slow_to_go_on_goes() -> None:
    assert "per token" in verdict(window(100), window(50, token_s=0.03, seed=1), LIMITS)


def test_latency_is_not_compared_with_a_stable_version_nobody_calls() -> None:
    assert verdict(window(5), window(50, first_s=9.0), LIMITS) == ""


def test_chance_alone_hardly_ever_rolls_a_good_canary_back() -> None:
    chance = random.Random(7)
    rolled_back = 0
    for seed in range(300):
        stable_failed, canary_failed = (sum(chance.random() < 0.02 for _ in range(n)) for n in (400, 40))
        stable = window(400, failed=stable_failed, seed=2 * seed)
        canary = window(40, failed=canary_failed, seed=2 * seed + 1)
        rolled_back += bool(verdict(stable, canary, LIMITS))
    assert rolled_back <= 3


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=50), st.floats(0, 100))
def test_a_window_forgets_what_ended_before_a_moment(
    calls: list[tuple[float, bool]], before_s: float
) -> None:
    calls.sort()
    found = Window()
    for at_s, failed in calls:
        found.add(Sample(at_s, failed))
    found.forget(before_s)
    kept = [failed for at_s, failed in calls if at_s >= before_s]
    assert [sample.failed for sample in found.samples] == kept
    assert found.failed == sum(kept)
