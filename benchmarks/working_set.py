"""Throughput when more adapters are in use than the engine has slots: half as many up to eight times as many.

    python -m benchmarks.working_set [--json] [--rounds N] [--quick] [--no-stock] [--eager] [--save]

16 calls at a time, each with the next adapter in turn, so that no adapter comes again before all others did: the worst
order for a cache. `wsN_ratio` is tokens per second with N times as many adapters as slots over as many as slots. Ours
is the server's residency over its engine object; stock is the same engine object with vLLM's own wrapper: its calls
name adapters, and it loads what it has to, into 16 slots, or 4 (`stock4_wsN_ratio`: N times 4 adapters over 4). Every
adapter was loaded once before it counts.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks import options
from benchmarks.frontend_servers import ensure_servable
from benchmarks.models import SHAPES, ensure_adapters
from benchmarks.report import Measurement, as_line, as_table, save, summarize
from benchmarks.served_engine import ServedEngine, ServedSpec

SLOTS = 16  # a set of 1 is as many adapters
FEW_SLOTS = 4
ROWS = 16
FILES = 16  # adapters beyond these are the same files under other names: other blocks of memory
RANK = 16
TIMES = (0.5, 1, 2, 4, 8)
STOCK_TIMES = (1, 4)  # it takes minutes


@dataclass(frozen=True)
class Kind:
    """One engine: vLLM's wrapper or ours, its slots (0: as the server chooses), and the sets it is asked for."""

    wrapper: str
    slots: int
    times: tuple[float, ...]

    def adapters(self, times: float) -> int:
        """Return how many adapters are in a set."""
        return int((self.slots or SLOTS) * times)


KINDS = {
    "": Kind("native", 0, TIMES),
    "stock_": Kind("stock", SLOTS, STOCK_TIMES),
    "stock4_": Kind("stock", FEW_SLOTS, STOCK_TIMES),
}


def measure(
    workdir: Path, *, rounds: int, calls: int, tokens: int, threads: int, stock: bool, eager: bool
) -> list[Measurement]:
    """Start the engines, run the sizes in turn, and return the figures."""
    base = str(ensure_servable(SHAPES["0.5b"], workdir))
    adapters = tuple(map(str, ensure_adapters(SHAPES["0.5b"], workdir, count=FILES, rank=RANK)))
    engines: dict[str, ServedEngine] = {}
    try:
        for name, kind in KINDS.items() if stock else [("", KINDS[""])]:
            spec = ServedSpec(
                base,
                str(workdir),
                adapters,
                kind.wrapper,
                rows=ROWS,
                rank=RANK,
                slots=kind.slots,
                eager=eager,
            )
            engines[name] = ServedEngine(spec, threads=threads)
            print(f"{name or 'ours'}: {engines[name].started}", file=sys.stderr)
        return _turns(engines, rounds=rounds, calls=calls, tokens=tokens)
    finally:
        for engine in engines.values():
            engine.close()


def _turns(engines: dict[str, ServedEngine], *, rounds: int, calls: int, tokens: int) -> list[Measurement]:
    rates: dict[tuple[str, float], list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, engine in engines.items():
            for times in KINDS[name].times:
                adapters = KINDS[name].adapters(times)
                asked = {"do": "turns", "adapters": adapters, "through_server": not name}
                # At least once each, or it would be a smaller set.
                counted = {"calls": max(calls, adapters), "tokens": tokens}
                asked |= counted if number else {"calls": adapters, "tokens": 1}
                rate = engine.ask(asked)["tok_s"]
                print(f"round {number}/{rounds} {name}ws{times:g}: {rate:.1f} tok/s", file=sys.stderr)
                if number:
                    rates[name, times].append(rate)
    found = []
    for (name, times), values in rates.items():
        found.append(summarize(f"{name}ws{times:g}_tok_s", values, "tok/s"))
        if times != 1:
            ratios = [one / all_in for one, all_in in zip(values, rates[name, 1], strict=True)]
            target = 0.80 if times == 4 and not name else None
            found.append(summarize(f"{name}ws{times:g}_ratio", ratios, "ratio", target))
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    given = _parser().parse_args()
    settings = {
        "rounds": 1 if given.quick else given.rounds,
        "calls": 32 if given.quick else 64,
        "tokens": 6 if given.quick else 24,
        "threads": given.threads,
        "stock": given.stock,
        "eager": given.eager,
    }
    found = measure(given.workdir, **settings)
    print("\n".join(map(as_line, found)) if given.json else as_table(found))
    if given.save:
        save("working_set", settings, found)


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("working_set", __doc__, rounds=3)
    parser.add_argument("--no-stock", dest="stock", action="store_false", help="ours alone")
    parser.add_argument(
        "--eager", action="store_true", help="without torch.compile (stock never has it here)"
    )
    return parser


if __name__ == "__main__":
    main()
