"""Command-line options that the benchmarks of engines share, by the same names with the same meanings."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.models import SHAPES


def parser(name: str, doc: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return the parser of ``python -m benchmarks.NAME``: ``--json``, ``--threads``, ``--save``, ``--workdir``.

    Args:
        name: the benchmark's.
        doc: its module's text; the first line describes it.
        rounds: default of ``--rounds``, with which comes ``--quick``; None: it has neither.

    """
    made = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0])
    made.add_argument("--json", action="store_true", help="JSON lines on stdout and nothing else")
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds (default {rounds})")
        made.add_argument("--quick", action="store_true", help="few short rounds: a look, not figures")
    made.add_argument("--threads", type=int, default=2, help="OpenMP threads of each engine (default 2)")
    made.add_argument("--save", action="store_true", help=f"write benchmarks/results/{name}.json")
    workdir = Path(tempfile.gettempdir()) / "loraplex-benchmarks"
    made.add_argument("--workdir", type=Path, default=workdir, help="for models")
    return made


def add_model(made: argparse.ArgumentParser) -> None:
    """Add ``--model``: the shape of the base."""
    made.add_argument("--model", choices=list(SHAPES), default="0.5b", help="shape of the base")


def add_wrapper(made: argparse.ArgumentParser) -> None:
    """Add ``--wrapper``: which of our two paths."""
    made.add_argument("--wrapper", choices=["native", "grouped"], default="native", help="our path on CPU")
