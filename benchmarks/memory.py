"""What 16 resident adapters cost in memory: the engine with them against the same engine with LoRA off.

    python -m benchmarks.memory [--json] [--model 0.5b|tiny] [--save]

All processes of an engine are added up from /proc: `rss` counts pages shared between them once per process,
`peak` adds each process's highest RSS, `pss` counts shared pages once. Each engine answers a batch of all
its adapters before it is measured. The bound is 1.2 times the size of the adapters' files and 300 MB; what
is held against it is the larger growth of peak RSS and PSS, because a peak while the base is loading may
hide what comes after it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.engines import Engine, EngineSpec
from benchmarks.models import SHAPES, Shape, ensure_adapters, ensure_base, size_bytes
from benchmarks.report import Measurement, as_line, as_table, save

ADAPTERS = 16
RANK = 16
BOUND_FACTOR = 1.2
BOUND_EXTRA_BYTES = 300 * 10**6


def memory_in_use(spec: EngineSpec, *, threads: int) -> dict[str, int]:
    """Start an engine, have every adapter (or the base) answer in one batch, and return its memory in bytes."""
    engine = Engine(spec, threads=threads)
    try:
        rows = list(range(len(spec.adapters))) or [None] * ADAPTERS
        engine.ask({"rows": rows, "prompt_tokens": 8, "new_tokens": 8})
        engine.ask({"rows": rows, "prompt_tokens": 60, "new_tokens": 2})
        return engine.memory_bytes()
    finally:
        engine.close()


def measure(shape: Shape, workdir: Path, *, threads: int) -> list[Measurement]:
    """Return both engines' memory, the adapters' size, and the growth in units of the bound."""
    base = str(ensure_base(shape, workdir))
    adapters = ensure_adapters(shape, workdir, count=ADAPTERS, rank=RANK)
    size = size_bytes(adapters)
    without = memory_in_use(EngineSpec(base), threads=threads)
    with_adapters = memory_in_use(EngineSpec(base, tuple(map(str, adapters))), threads=threads)
    growth = {kind: with_adapters[kind] - without[kind] for kind in without}
    worst = max(growth["peak_rss"], growth["pss"])
    bound = BOUND_FACTOR * size + BOUND_EXTRA_BYTES
    figures = {
        "base_rss_bytes": without["rss"],
        "base_peak_rss_bytes": without["peak_rss"],
        "base_pss_bytes": without["pss"],
        "lora16_rss_bytes": with_adapters["rss"],
        "lora16_peak_rss_bytes": with_adapters["peak_rss"],
        "lora16_pss_bytes": with_adapters["pss"],
        "rss_growth_bytes": worst,
        "adapters_bytes": size,
    }
    prefix = "tiny_" if shape.name == "tiny" else ""
    found = [Measurement(prefix + name, value, "bytes", None, 1, None) for name, value in figures.items()]
    ratio = round(worst / bound, 4)
    return [*found, Measurement(prefix + "rss_growth_vs_bound", ratio, "ratio", 1.0, 1, None)]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser("benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON lines on stdout and nothing else")
    parser.add_argument("--model", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of each engine")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/memory.json")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()) / "loraplex-benchmarks")
    options = parser.parse_args()
    measurements = measure(SHAPES[options.model], options.workdir, threads=options.threads)
    print("\n".join(map(as_line, measurements)) if options.json else as_table(measurements))
    if options.save:
        save("memory", {"model": options.model, "threads": options.threads}, measurements)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
