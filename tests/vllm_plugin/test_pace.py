"""Making adapters between the steps of an engine, with real threads."""

from __future__ import annotations

import threading
import time

import pytest

from loraplex_server.vllm_plugin.cpu.pace import Pace


class Maker(threading.Thread):
    """Makes an adapter of so many short pieces, and notes whether a step ran when a piece began."""

    def __init__(self, pace: Pace, pieces: int, piece_s: float = 0.0005) -> None:
        super().__init__(daemon=True)
        self._pace, self._pieces, self._piece_s = pace, pieces, piece_s
        self.within_a_step = 0
        self.stepping = threading.Event()

    def run(self) -> None:
        with self._pace.making():
            for _ in range(self._pieces):
                self._pace.turn()
                self.within_a_step += self.stepping.is_set()
                time.sleep(self._piece_s)


def step(pace: Pace, maker: Maker, seconds: float) -> float:
    """Run a step; how long it waited before it began."""
    asked = time.monotonic()
    with pace.step():
        waited = time.monotonic() - asked
        maker.stepping.set()
        time.sleep(seconds)
        maker.stepping.clear()
    return waited


def test_pieces_are_made_between_steps_and_steps_wait_for_a_share_of_their_time_only() -> None:
    pace = Pace(share=0.5, least_s=0.001, patience_s=10)
    maker = Maker(pace, pieces=60)
    step(pace, maker, 0.01)
    maker.start()
    waits = []
    for _ in range(200):
        waits.append(step(pace, maker, 0.01))
        if not maker.is_alive():
            break
    maker.join(5)
    assert not maker.is_alive()
    assert maker.within_a_step <= len(waits)  # one that was let go just before the step began
    assert sorted(waits)[len(waits) // 2] < 0.02  # half of a step's 10 ms, and the clock of a busy machine


def test_a_step_waits_for_nobody_when_nothing_is_made() -> None:
    pace = Pace(share=1000, least_s=1000, rest_s=1000)
    maker = Maker(pace, pieces=0)
    for _ in range(3):
        assert step(pace, maker, 0) < 1


def test_a_step_after_a_rest_does_not_wait_for_an_adapter_that_is_being_made() -> None:
    pace = Pace(share=0, least_s=0.05, rest_s=0.05, patience_s=10)
    maker = Maker(pace, pieces=10_000)
    step(pace, maker, 0)
    time.sleep(0.1)
    maker.start()
    while not pace._making:
        time.sleep(0.001)
    assert step(pace, maker, 0) < 0.04


def test_a_step_goes_on_when_the_adapter_is_there() -> None:
    pace = Pace(share=1000, least_s=1000, rest_s=1000, patience_s=10)
    maker = Maker(pace, pieces=5)
    step(pace, maker, 0)
    maker.start()
    assert step(pace, maker, 0) < 5
    maker.join(5)


@pytest.mark.parametrize(("waiting", "expected_s"), [(0, 0.02), (3, 0.08), (1000, 0.2)])
def test_a_step_waits_longer_while_more_adapters_wait_but_not_without_bound(
    waiting: int, expected_s: float
) -> None:
    pace = Pace(share=0.02, share_max=0.2, least_s=0, rest_s=1000)
    maker = Maker(pace, pieces=0)
    step(pace, maker, 1.0)
    with pace.making(lambda: waiting):
        assert expected_s <= step(pace, maker, 0) < expected_s + 0.05


def test_a_turn_does_not_wait_for_ever() -> None:
    pace = Pace(patience_s=0.01)
    with pace.step():
        started = time.monotonic()
        pace.turn()
        assert time.monotonic() - started >= 0.01


def test_in_the_short_time_between_two_steps_nothing_is_made_unless_the_engine_waits() -> None:
    pace = Pace(rest_s=0.2, patience_s=10)
    step(pace, Maker(pace, 0), 0)
    started = time.monotonic()
    pace.turn()
    assert time.monotonic() - started >= 0.19


def test_a_step_that_fails_is_over() -> None:
    pace = Pace(patience_s=10)
    with pytest.raises(RuntimeError, match="the model"), pace.step():
        raise RuntimeError("the model failed")
    started = time.monotonic()
    pace.turn()
    assert time.monotonic() - started < 5
