"""What 16 resident adapters cost in memory: the engine with them against the same engine with LoRA off.

    python -m benchmarks.memory [--json] [--model 0.5b|tiny] [--save]

The adapters are in bf16 and touch all linear layers. `lora16` is vLLM's default, which also reserves slots for
embedding and logits adapters (16 x rank x vocabulary twice); `lora16_linear` wraps the linear layers alone
(``lora_target_modules``).

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
from dataclasses import replace
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
    """Return the engines' memory, the adapters' size, and the growth in units of the bound."""
    base = str(ensure_base(shape, workdir))
    adapters = ensure_adapters(shape, workdir, count=ADAPTERS, rank=RANK)
    directories = tuple(map(str, adapters))
    linear = tuple(sorted(module.rpartition(".")[2] for module in shape.linears()))
    specs = {
        "base": EngineSpec(base),
        "lora16": EngineSpec(base, directories),
        "lora16_linear": EngineSpec(base, directories, target_modules=linear),
    }
    found = [Measurement("adapters_bytes", size_bytes(adapters), "bytes", None, 1, None)]
    bound = BOUND_FACTOR * size_bytes(adapters) + BOUND_EXTRA_BYTES
    without: dict[str, int] = {}
    for name, spec in specs.items():
        used = memory_in_use(spec, threads=threads)
        without = without or used
        found += [
            Measurement(f"{name}_{kind}_bytes", size, "bytes", None, 1, None) for kind, size in used.items()
        ]
        if name != "base":
            growth = max(used[kind] - without[kind] for kind in ("peak_rss", "pss"))
            suffix = name.removeprefix("lora16")
            found.append(Measurement(f"rss_growth{suffix}_bytes", growth, "bytes", None, 1, None))
            ratio = round(growth / bound, 4)
            found.append(Measurement(f"rss_growth{suffix}_vs_bound", ratio, "ratio", 1.0, 1, None))
    prefix = "tiny_" if shape.name == "tiny" else ""
    return [replace(one, name=prefix + one.name) for one in found]


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
