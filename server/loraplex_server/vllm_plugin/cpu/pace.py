"""When the threads that make adapters may work: before a step of the engine, for a small part of its time.

    with PACE.making(waiting):     # while an adapter is made, and so many wait
        ...
        PACE.turn()                # often, on each of its threads: returns when it may go on
    with PACE.step():              # on the engine's thread, around each step

Promises: a step waits for an adapter only while one is being made, and then for no more than `share` of the time that
the last step took, as often as there are adapters on their way, `share_max` together, or for `least_s`; an engine that
has rested for `rest_s` waits for nothing, and adapters are made at full speed beside it. A turn waits `patience_s` at
most: an adapter comes in however long a step is.

Why not by the scheduler: a thread of low priority gets next to nothing of cores that both work on a step; and what it
gets, at a moment of the scheduler's choice, all threads of the step wait for. Between steps the engine's thread is busy
in Python, which another thread would only slow down: so adapters are made while that thread waits for them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

SHARE: Final = 0.07
"""Of the time of a step, for making adapters before the next."""

SHARE_MAX: Final = 0.25
"""The same with any number of adapters on their way: a queue of them must not grow because steps are slow."""

LEAST_S: Final = 0.001
"""For it even after the shortest step, in seconds."""

REST_S: Final = 0.004
"""An engine that has not begun a step for so long, in seconds, has nothing to do."""

PATIENCE_S: Final = 0.25
"""For so long a turn waits, in seconds."""


class Pace:
    """See the module; one for a process."""

    def __init__(
        self,
        *,
        share: float = SHARE,
        share_max: float = SHARE_MAX,
        least_s: float = LEAST_S,
        rest_s: float = REST_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._share = share
        self._share_max = max(share, share_max)
        self._least_s = least_s
        self._rest_s = rest_s
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._making = 0
        self._backlog: Callable[[], int] = lambda: 0
        self._waiting = False  # a step is, for adapters
        self._stepping = False
        self._ended = 0.0  # the last step, by the monotonic clock
        self._step_s = 0.0

    @contextlib.contextmanager
    def making(self, waiting: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """An adapter is being made, and `waiting()` more are to be made after it."""
        with self._changed:
            self._making += 1
            self._backlog = waiting
        try:
            yield
        finally:
            with self._changed:
                self._making -= 1
                self._changed.notify_all()

    def turn(self) -> None:
        """Return when this thread may go on."""
        if self._waiting or self._resting():
            return
        until = time.monotonic() + self._patience_s
        with self._changed:
            while not (self._waiting or self._resting()) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left if self._stepping else min(left, self._rest_s))

    def _resting(self) -> bool:
        return not self._stepping and time.monotonic() - self._ended >= self._rest_s

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step of the engine, on this thread."""
        if self._making and not self._resting():
            with self._changed:
                self._waiting = True
                self._changed.notify_all()
                try:
                    share = min(self._share * (1 + self._backlog()), self._share_max)
                    self._changed.wait_for(lambda: not self._making, max(share * self._step_s, self._least_s))
                finally:
                    self._waiting = False
        self._stepping = True
        began = time.monotonic()
        try:
            yield
        finally:
            self._ended = time.monotonic()
            self._step_s = self._ended - began
            self._stepping = False
            if self._making:
                with self._changed:
                    self._changed.notify_all()  # who waits asks again, and does not sleep through a rest


PACE: Final = Pace()
"""Of this process."""
