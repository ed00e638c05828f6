"""A progress bar of bytes on a terminal; nothing at all anywhere else."""

from __future__ import annotations

from typing import TextIO

_WIDTH = 24


class ProgressBar:
    """Call it as a `Progress`. Redraws on one line of `stream` when a phase gains a percent; `close` ends the line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn: tuple[str, int] | None = None
        self._enabled = stream.isatty()

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        """Draw the state of a phase."""
        percent = 100 * done_bytes // max(total_bytes, 1)
        if not self._enabled or (phase, percent) == self._drawn:
            return
        self._drawn = (phase, percent)
        bar = "█" * (_WIDTH * percent // 100)
        self._stream.write(f"\r{phase:>10} {bar:<{_WIDTH}} {percent:3d}% of {readable(total_bytes)}\x1b[K")
        self._stream.flush()

    def close(self) -> None:
        """Clear the line if anything was drawn."""
        if self._drawn is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = None


def readable(size_bytes: int) -> str:
    """Return a size for people: `512 B`, `3.4 KiB`, `16.0 MiB`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
