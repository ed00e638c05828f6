"""Bars and tables for people who watch."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

_WIDTH = 24
_LINES = 5  # on something that is no terminal


class Bar:
    """A progress bar: one line redrawn on a terminal, a few lines elsewhere."""

    def __init__(self, label: str, *, stream: TextIO = sys.stdout) -> None:
        self._label = label
        self._stream = stream
        self._started = time.monotonic()
        self._shown = -1

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done; the last call has done == total."""
        ended = done >= total
        text = f"{self._label} {done}/{total} {note} {time.monotonic() - self._started:.0f} s"
        if self._stream.isatty():
            bar = "█" * (_WIDTH * done // total)
            self._stream.write(f"\r{bar:<{_WIDTH}} {text}\x1b[K" + ("\n" if ended else ""))
        elif ended or _LINES * done // total > self._shown:
            self._shown = _LINES * done // total
            self._stream.write(text + "\n")
        self._stream.flush()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows under a head; every column but the first is aligned to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
