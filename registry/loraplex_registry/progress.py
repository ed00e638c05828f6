"""A progress bar of bytes, bytes per second and time left, on a terminal; nothing at all anywhere else."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, TextIO

REDRAW_S: Final = 0.1
"""Seconds between two drawings at least."""

_WIDTH = 10  # so that the longest line fits into 80 columns
_CLEAR = "\r\x1b[K"


class ProgressBar:
    """Call it as a `Progress`, from any thread. Draws on one line of `stream`; `close` clears it.

    Draws only when `stream` is a terminal that can move its cursor. The rate is that of the whole phase, so that the
    time left does not jump about.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        enabled: bool = True,
        environment: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        environment = os.environ if environment is None else environment
        self._stream = stream
        self._clock = clock
        self._enabled = enabled and stream.isatty() and environment.get("TERM", "") != "dumb"
        self._lock = threading.Lock()  # guards all below
        self._phase = ""
        self._began_s = 0.0
        self._drawn_s: float | None = None
        self._done_bytes = 0

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """Draw the state of a phase. A phase never runs backwards: threads may report out of order."""
        if not self._enabled:
            return
        with self._lock:
            now = self._clock()
            if phase != self._phase:
                self._phase, self._began_s, self._drawn_s, self._done_bytes = phase, now, None, 0
            self._done_bytes = max(self._done_bytes, min(done_bytes, total_bytes))
            complete = self._done_bytes >= total_bytes
            if self._drawn_s is None or now - self._drawn_s >= REDRAW_S or complete:
                self._drawn_s = now
                self._draw(total_bytes, now - self._began_s)

    def close(self) -> None:
        """Clear the line if anything was drawn."""
        with self._lock:
            if self._drawn_s is not None:
                self._stream.write(_CLEAR)
                self._stream.flush()
            self._phase, self._drawn_s = "", None

    def _draw(self, total_bytes: int, elapsed_s: float) -> None:
        columns = shutil.get_terminal_size().columns
        line = progress_line(self._phase, self._done_bytes, total_bytes, elapsed_s)
        self._stream.write("\r" + line[: max(columns - 1, 1)] + "\x1b[K")
        self._stream.flush()


def progress_line(phase: str, done_bytes: int, total_bytes: int, elapsed_s: float) -> str:
    """Return `upload ███ 43%  6.9 of 16.0 MiB  12.3 MiB/s  0:03 left`, the last two once they can be told."""
    percent = 100 * done_bytes // max(total_bytes, 1)
    filled = "█" * (_WIDTH * percent // 100)
    line = f"{phase:>10} {filled:<{_WIDTH}} {percent:3d}%  {readable(done_bytes)} of {readable(total_bytes)}"
    if elapsed_s < 0.001 or not done_bytes:
        return line
    rate = done_bytes / elapsed_s
    return f"{line}  {readable(int(rate))}/s  {duration((total_bytes - done_bytes) / rate)} left"


def duration(seconds: float) -> str:
    """Return a time for people: `0:03`, `12:40`, `3:05:00`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def readable(size_bytes: int) -> str:
    """Return a size for people: `512 B`, `3.4 KiB`, `16.0 MiB`, `2.0 GiB`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
