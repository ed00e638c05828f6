"""What bringing adapters in costs those who are being served: beside the engine's steps, and as vLLM does it.

    python -m benchmarks.swap_stall [--json] [--rounds N] [--quick] [--no-stock] [--eager] [--save]

The server's engine object, 16 decoding streams over 4 adapters, and one short call more every 0.6 s: in one window its
adapter is there, in the next it is a cold one of 17.6 million parameters (34 MB, file in the page cache) that is
brought in for it and goes afterwards. Windows of some five seconds alternate. `itl_p99_ratio` is the 99th percentile of
the time between two tokens of a stream, a cold window over the warm one beside it; `itl_p99_pooled_ratio` the same of
all cold windows together over all warm ones; `cold_minus_warm_ttft_ms` the time to the first token on an otherwise
idle engine, cold less warm, loading included.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks import options
from benchmarks.frontend_servers import ensure_servable
from benchmarks.models import SHAPES, ensure_adapters
from benchmarks.report import Measurement, as_line, as_table, save, summarize
from benchmarks.served_engine import ServedEngine, ServedSpec, percentile

STREAMS = 16
KEPT = 4  # adapters of the streams
ADAPTERS = 16  # files in all: the others are brought in by turns
RANK = 32  # on every linear layer: 17.6 million parameters
EVERY_S = 0.6  # 100 loads a minute
SLOTS = 8
STOCK_ROUNDS = 3  # its steps take five times as long, and no bar is held against it


def measure(
    workdir: Path, *, rounds: int, tokens: int, loads: int, threads: int, stock: bool, eager: bool
) -> list[Measurement]:
    """Start the engines, run the windows in turn, and return the figures."""
    base = str(ensure_servable(SHAPES["0.5b"], workdir))
    adapters = tuple(map(str, ensure_adapters(SHAPES["0.5b"], workdir, count=ADAPTERS, rank=RANK)))
    engines: dict[str, ServedEngine] = {}
    try:
        for name, wrapper in (("", "native"), ("stock_", "stock"))[: 1 + stock]:
            spec = ServedSpec(
                base, str(workdir), adapters, wrapper, rows=STREAMS + 1, rank=RANK, slots=SLOTS, eager=eager
            )
            engines[name] = ServedEngine(spec, threads=threads)
            print(f"{name or 'ours'}: {engines[name].started}", file=sys.stderr)
            engines[name].ask({"do": "keep", "count": KEPT})
        return _windows(engines, rounds=rounds, tokens=tokens, loads=loads)
    finally:
        for engine in engines.values():
            engine.close()


def _windows(engines: dict[str, ServedEngine], *, rounds: int, tokens: int, loads: int) -> list[Measurement]:
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    gaps_s: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, engine in engines.items():
            if name and number > STOCK_ROUNDS:
                continue
            p99 = {}
            for kind in ("warm", "cold") if number % 2 else ("cold", "warm"):
                asked = {"do": "streams", "tokens": tokens if number else 20, "every_s": EVERY_S}
                found = engine.ask(asked | {"cold": kind == "cold"})
                gaps, first = found["gaps_s"], found["ttft_s"]
                p99[kind] = percentile(gaps, 99)
                print(
                    f"round {number}/{rounds} {name}{kind}: p50 {percentile(gaps, 50) * 1e3:.0f} p99 "
                    f"{p99[kind] * 1e3:.0f} max {max(gaps) * 1e3:.0f} ms, {found['seconds']:.1f} s, "
                    f"{len(first)} calls, first token {percentile([*first, *first], 50) * 1e3:.0f} ms",
                    file=sys.stderr,
                )
                if number:
                    gaps_s[name, kind] += gaps
                    values[name, f"itl_p99_{kind}_ms"].append(p99[kind] * 1e3)
                    values[name, f"itl_p50_{kind}_ms"].append(percentile(gaps, 50) * 1e3)
                    values[name, f"busy_ttft_{kind}_ms"] += [each * 1e3 for each in first]
            if number:
                values[name, "itl_p99_ratio"].append(p99["cold"] / p99["warm"])
            found = engine.ask({"do": "ttft", "count": loads if number else 1})
            if number:
                pairs = zip(found["cold_s"], found["warm_s"], strict=True)
                values[name, "cold_minus_warm_ttft_ms"] += [(cold - warm) * 1e3 for cold, warm in pairs]
                values[name, "warm_ttft_ms"] += [warm * 1e3 for warm in found["warm_s"]]
    for name in engines:
        pooled = {kind: percentile(gaps_s[name, kind], 99) for kind in ("warm", "cold")}
        values[name, "itl_p99_pooled_ratio"].append(pooled["cold"] / pooled["warm"])
    targets = {"itl_p99_ratio": 1.10, "cold_minus_warm_ttft_ms": 40.0}
    return [
        summarize(
            name + figure,
            found,
            "ratio" if figure.endswith("ratio") else "ms",
            None if name else targets.get(figure),
        )
        for (name, figure), found in values.items()
    ]


def main() -> None:
    """Parse the command line, measure, print."""
    given = _parser().parse_args()
    settings = {
        "rounds": 1 if given.quick else given.rounds,
        "tokens": 40 if given.quick else given.tokens,
        "loads": 4,
        "threads": given.threads,
        "stock": given.stock,
        "eager": given.eager,
    }
    found = measure(given.workdir, **settings)
    print("\n".join(map(as_line, found)) if given.json else as_table(found))
    if given.save:
        save("swap_stall", settings, found)


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("swap_stall", __doc__, rounds=12)
    parser.add_argument("--tokens", type=int, default=60, help="of each stream of a window (default 60)")
    parser.add_argument("--no-stock", dest="stock", action="store_false", help="ours alone")
    parser.add_argument(
        "--eager", action="store_true", help="without torch.compile (stock never has it here)"
    )
    return parser


if __name__ == "__main__":
    main()
