"""When the thread that makes adapters may work: between the engine's steps, and for a small part of their time.

    with PACE.making():            # on the thread that makes an adapter
        ...
        PACE.turn()                # often: returns at once between steps, and waits while there is one
    with PACE.step():              # on the engine's thread, around each step

Promises: a step waits for an adapter only while one is being made, and then from the end of the last step no longer
than `share` of how long that took, and at least `least_s`; an engine without requests waits for nothing, and adapters
are made at full speed beside it. A turn waits `patience_s` at most: an adapter comes in however long a step is.

Why not by the scheduler: a thread of low priority gets next to nothing of cores that both work on a step, and then what
it does takes from a step what the scheduler thinks fit, with all threads of the step waiting for the one it sits on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Final

SHARE: Final = 0.04
"""Of the time of a step, for making adapters after it."""

LEAST_S: Final = 0.001
"""For it even after the shortest step, in seconds."""

PATIENCE_S: Final = 0.25
"""For so long a turn waits for a step to end, in seconds."""


class Pace:
    """See the module; one for a process."""

    def __init__(
        self, *, share: float = SHARE, least_s: float = LEAST_S, patience_s: float = PATIENCE_S
    ) -> None:
        self._share = share
        self._least_s = least_s
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._making = 0
        self._stepping = False
        self._ended = 0.0  # the last step, by the monotonic clock
        self._step_s = 0.0

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """An adapter is being made on this thread."""
        with self._changed:
            self._making += 1
        try:
            yield
        finally:
            with self._changed:
                self._making -= 1
                self._changed.notify_all()

    def turn(self) -> None:
        """Return when this thread may go on."""
        if not self._stepping:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._stepping, self._patience_s)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step of the engine, on this thread."""
        if self._making:
            with self._changed:
                left_s = self._ended + max(self._share * self._step_s, self._least_s) - time.monotonic()
                if left_s > 0:
                    self._changed.wait_for(lambda: not self._making, left_s)
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
                    self._changed.notify_all()


PACE: Final = Pace()
"""Of this process."""
