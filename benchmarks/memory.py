"""What resident adapters cost in memory: 16 in use, 100 kept loaded, and one process per tenant instead.

    python -m benchmarks.memory [--json] [--model 0.5b|tiny] [--wrapper native|grouped] [--save]

The adapters are in bf16 and touch all linear layers. All processes of an engine are added up from /proc: `rss`
counts pages shared between them once per process, `peak` adds each process's highest RSS, `pss` counts shared
pages once. Three questions:

- `rss_growth_vs_bound`: an engine with 16 adapters against one with LoRA off. `lora16` is vLLM's default, which
  also reserves slots for embedding and logits adapters; `lora16_linear` wraps the linear layers alone. Each answers
  a batch of all its adapters before it is measured. The bound is 1.2 times the adapters' files and 300 MB; what
  is held against it is the larger growth of peak RSS and PSS, because a peak while the base is loading may hide
  what comes after it.
- `cpu100_bytes_ratio`: within one engine, the growth of RSS while 100 adapters of rank 32 are loaded, over their
  files' bytes. It has 16 slots and room for 100; before the first look it has served the base, loaded one more adapter
  and let it generate. The 100 are as many directories of hard links to the files of 16 adapters: an adapter is read and
  kept per name, whatever its bytes are. Growth is read after every adapter has generated, 16 at a time.
- `processes16_computed_bytes`: a process per tenant, as one runs merged models: two engines with LoRA off are alive
  together, and 16 are computed as the first and 15 times what the second added to the PSS of both (so that what
  processes share is counted once). Beside it `lora16_pss_bytes`: one process with 16 adapters.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import options
from benchmarks.engines import Engine, EngineSpec
from benchmarks.models import SHAPES, Shape, ensure_adapters, ensure_base, linked_copies, size_bytes
from benchmarks.report import Measurement, as_line, as_table, save

ADAPTERS = 16
RANK = 16
MANY = 100
MANY_RANK = 32  # 17.6 million parameters, 35 MB
BOUND_FACTOR = 1.2
BOUND_EXTRA_BYTES = 300 * 10**6
MANY_BOUND = 1.1
NOBODY = [None] * ADAPTERS


def memory_in_use(engine: Engine, rows: Sequence[int | None]) -> dict[str, int]:
    """Return the engine's memory in bytes after it has answered `rows`, at a decode and at a longer prefill."""
    engine.ask({"rows": rows, "prompt_tokens": 8, "new_tokens": 8})
    engine.ask({"rows": rows, "prompt_tokens": 60, "new_tokens": 2})
    return engine.memory_bytes()


def sixteen_in_use(
    shape: Shape, off: EngineSpec, adapters: Sequence[Path], threads: int
) -> list[Measurement]:
    """Return the engines' memory, the adapters' size, and the growth in units of the bound."""
    on = replace(off, adapters=tuple(map(str, adapters)))
    linear = tuple(sorted(module.rpartition(".")[2] for module in shape.linears()))
    specs = {"base": off, "lora16": on, "lora16_linear": replace(on, target_modules=linear)}
    found = [_bytes("adapters", size_bytes(adapters))]
    bound = BOUND_FACTOR * size_bytes(adapters) + BOUND_EXTRA_BYTES
    without: dict[str, int] = {}
    for name, spec in specs.items():
        engine = Engine(spec, threads=threads)
        try:
            used = memory_in_use(engine, list(range(ADAPTERS)) if spec.adapters else NOBODY)
        finally:
            engine.close()
        without = without or used
        found += [_bytes(f"{name}_{kind}", size) for kind, size in used.items()]
        if name != "base":
            growth = max(used[kind] - without[kind] for kind in ("peak_rss", "pss"))
            suffix = name.removeprefix("lora16")
            found.append(_bytes(f"rss_growth{suffix}", growth))
            found.append(_ratio(f"rss_growth{suffix}_vs_bound", growth / bound, 1.0))
    return found


def hundred_loaded(off: EngineSpec, adapters: Sequence[Path], threads: int) -> list[Measurement]:
    """Return the growth of one engine's RSS while it loads 100 adapters, and its ratio to their bytes."""
    spec = replace(off, slots=ADAPTERS, cpu_adapters=MANY + 1, rank=MANY_RANK)
    with tempfile.TemporaryDirectory(dir=adapters[0].parent) as directory:
        copies = linked_copies(adapters, Path(directory), MANY + 1)
        engine = Engine(spec, threads=threads)
        try:
            memory_in_use(engine, NOBODY)
            engine.ask({"load": [str(copies[0])]})
            before = memory_in_use(engine, [0, *NOBODY[1:]])
            engine.ask({"load": [str(copy) for copy in copies[1:]]})
            for first in range(1, MANY + 1, ADAPTERS):
                rows = list(range(first, min(first + ADAPTERS, MANY + 1)))
                engine.ask({"rows": rows, "prompt_tokens": 8, "new_tokens": 2})
            after = memory_in_use(engine, NOBODY)
        finally:
            engine.close()
        size = size_bytes(copies[1:])
    growth = {kind: after[kind] - before[kind] for kind in ("rss", "pss")}
    return [
        _bytes("cpu100_adapters", size),
        *(_bytes(f"cpu100_{kind}_growth", value) for kind, value in growth.items()),
        _ratio("cpu100_bytes_ratio", growth["rss"] / size, MANY_BOUND),
    ]


def process_per_tenant(off: EngineSpec, threads: int) -> list[Measurement]:
    """Return the memory of one and of two engines with LoRA off, and what 16 would take by that."""
    engines: list[Engine] = []
    totals = []
    try:
        for _ in range(2):
            engines.append(Engine(off, threads=threads))
            memory_in_use(engines[-1], NOBODY)
            totals.append(sum(engine.memory_bytes()["pss"] for engine in engines))
    finally:
        for engine in engines:
            engine.close()
    one, two = totals
    return [
        _bytes("process1_pss", one),
        _bytes("processes2_pss", two),
        _bytes(f"processes{ADAPTERS}_computed", one + (ADAPTERS - 1) * (two - one)),
    ]


def measure(shape: Shape, workdir: Path, *, threads: int, wrapper: str) -> list[Measurement]:
    """Answer all three questions, an engine (or two) at a time."""
    off = EngineSpec(str(ensure_base(shape, workdir)), wrapper=wrapper, rank=RANK)
    adapters = ensure_adapters(shape, workdir, count=ADAPTERS, rank=RANK)
    larger = ensure_adapters(shape, workdir, count=ADAPTERS, rank=MANY_RANK)
    found = [
        *hundred_loaded(off, larger, threads),
        *sixteen_in_use(shape, off, adapters, threads),
        *process_per_tenant(off, threads),
    ]
    if shape.name == "tiny":  # the bounds are about the other shape
        return [replace(one, name=f"tiny_{one.name}", target=None) for one in found]
    return found


def _bytes(name: str, size: int) -> Measurement:
    return Measurement(f"{name}_bytes", size, "bytes", None, 1, None)


def _ratio(name: str, value: float, target: float) -> Measurement:
    return Measurement(name, round(value, 4), "ratio", target, 1, None)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = options.parser("memory", __doc__)
    options.add_model(parser)
    options.add_wrapper(parser)
    given = parser.parse_args()
    settings = {"threads": given.threads, "wrapper": given.wrapper}
    measurements = measure(SHAPES[given.model], given.workdir, **settings)
    print("\n".join(map(as_line, measurements)) if given.json else as_table(measurements))
    if given.save:
        save("memory", {"model": given.model, **settings}, measurements)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
