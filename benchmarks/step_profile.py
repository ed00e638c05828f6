"""Where each millisecond of one decode step goes, beside what the machine's memory and arithmetic allow.

    python -m benchmarks.step_profile [--json] [--base bf16|nf4] [--wrapper native|grouped] [--save]

16 sequences decode at once on the 0.5B shape: with LoRA off, with LoRA on and no adapter in the batch, and with 16
adapters (rank 16, all linear layers). torch.profiler runs in the engine's own process. A step lasts from its beginning
to the next one's, and its time is divided by what ran: every operator's own time, without that of those it called, in
one of the kinds of `KINDS`; what no operator accounts for is Python, scheduling and waiting. Steps of all rounds are
put together, and the mean is that of the middle half by duration. `*_unprofiled_ms` is a step without profiler, the
mean of 32 steps.

The limits: weights are read once a step, at the rate at which this machine reads memory (a sum over 1 GiB);
multiplications at the rate of a large bf16 product. Both are measured here, before the engines start.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import options
from benchmarks.engines import Engine, EngineSpec
from benchmarks.models import SHAPES, Shape, ensure_adapters, ensure_base, size_bytes
from benchmarks.report import Measurement, as_line, as_table, save, summarize

ROWS = 16
PROMPT_TOKENS = 8
SHORT, LONG = 8, 40  # new tokens: their difference in time is that of 32 steps
STEP = re.compile(rf"execute_context_0\(0\)_generation_{ROWS}\({ROWS}\)")
PYTHON = "python"
OTHER = "other operators"
# Kind -> what its operators, or the part of the step around them, are called; the first that fits counts.
KINDS = {
    "lora": r"loraplex::add_lora",
    "logits": r"in .*postprocess",
    "sampling": r"in .*(sample|bookkeep)",
    "linear": r"onednn_mm|bf16_linear|::(mm|addmm|linear|bmm|baddbmm)$|gemm|gemv|4bit|nf4",
    "attention": r"attention|attn|kv_cache|slot_mapping|scheduler_metadata",
    "norm, rotary, activation": r"CompiledFxGraph|rms_norm|silu|rotary|embedding",
    OTHER: r"^\w+::",
}
READ_BYTES = 2**30
PRODUCT = 2048  # rows, columns and depth of the large product
REPEATS = 5


def step_times(trace: dict[str, Any]) -> list[Counter[str]]:
    """Divide each whole decode step of a trace by kind, in milliseconds; they add up to the step's duration."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    begins = sorted((event for event in events if STEP.search(event["name"])), key=lambda event: event["ts"])
    steps = []
    for begin, following in pairwise(begins):
        start, end = begin["ts"], following["ts"]
        inside = [event for event in events if event["tid"] == begin["tid"] and start <= event["ts"] < end]
        times = self_times(sorted(inside, key=lambda event: (event["ts"], -event["dur"])))
        times[PYTHON] += (end - start) / 1000 - times.total()
        steps.append(times)
    return steps


def self_times(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Add up the events' own milliseconds by kind, given in order of their begin, outer ones first."""
    times: Counter[str] = Counter()
    open_events: list[tuple[float, str, str]] = []  # end, name within what, kind
    for event in events:
        while open_events and open_events[-1][0] <= event["ts"]:
            open_events.pop()
        within = open_events[-1][1] if open_events else ""
        path = f"{within}/{event['name']}"
        kind = kind_of(event["name"], within)
        times[kind] += event["dur"] / 1000
        if open_events:
            times[open_events[-1][2]] -= event["dur"] / 1000
        open_events.append((event["ts"] + event["dur"], path, kind))
    return times


def kind_of(name: str, within: str) -> str:
    """Return the kind of an operator called `name` that was called within others, "/a/b"."""
    for kind, pattern in KINDS.items():
        if pattern.startswith("in "):
            if re.search(pattern.removeprefix("in "), within) and "::" in name:
                return kind
        elif re.search(pattern, name):
            return kind
    return PYTHON


def middle_half(steps: Sequence[Counter[str]]) -> list[Counter[str]]:
    """Return the steps without the quickest and the slowest quarter."""
    ordered = sorted(steps, key=lambda step: step.total())
    quarter = len(ordered) // 4
    return ordered[quarter : len(ordered) - quarter]


def profile(engine: Engine, rows: Sequence[int | None], traces: Path) -> list[Counter[str]]:
    """Run one round under the profiler and return its steps."""
    engine.ask({"profile": True})
    engine.ask({"rows": rows, "prompt_tokens": PROMPT_TOKENS, "new_tokens": LONG})
    engine.ask({"profile": False})
    steps = []
    for path in traces.glob("*.json.gz"):
        with gzip.open(path) as file:
            steps += step_times(json.load(file))
        path.unlink()
    return steps


def unprofiled_ms(engine: Engine, rows: Sequence[int | None]) -> float:
    """Return the milliseconds of a step without the profiler."""
    short, long = (
        engine.ask({"rows": rows, "prompt_tokens": PROMPT_TOKENS, "new_tokens": new})["seconds"]
        for new in (SHORT, LONG)
    )
    return 1000 * float(long - short) / (LONG - SHORT)


def measure(
    shape: Shape, workdir: Path, *, rounds: int, threads: int, wrapper: str, nf4: bool
) -> list[Measurement]:
    """Measure the machine, then profile the three cases in turn, round by round."""
    base = str(ensure_base(shape, workdir))
    adapters = ensure_adapters(shape, workdir, count=ROWS, rank=16)
    found = limits(shape, size_bytes(adapters), threads=threads, nf4=nf4)
    with tempfile.TemporaryDirectory() as traces:
        off = EngineSpec(base, quantization="bitsandbytes" if nf4 else None, trace_directory=traces)
        off = replace(off, compile=True, wrapper=wrapper)
        on = replace(off, compile=wrapper == "native", adapters=tuple(map(str, adapters)))
        engines: dict[str, Engine] = {}
        try:
            engines |= {name: Engine(spec, threads=threads) for name, spec in (("off", off), ("on", on))}
            nobody: list[int | None] = [None] * ROWS
            everybody: list[int | None] = list(range(ROWS))
            cases = {"off": ("off", nobody), "idle": ("on", nobody), "mixed16": ("on", everybody)}
            for engine, rows in cases.values():  # warm
                engines[engine].ask({"rows": rows, "prompt_tokens": PROMPT_TOKENS, "new_tokens": SHORT})
            steps: dict[str, list[Counter[str]]] = {name: [] for name in cases}
            plain: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(rounds):
                for name, (engine, rows) in cases.items():
                    plain[name].append(unprofiled_ms(engines[engine], rows))
                    steps[name] += profile(engines[engine], rows, Path(traces))
        finally:
            for one in engines.values():
                one.close()
    for name in cases:
        found.append(summarize(f"{name}_unprofiled_ms", plain[name], "ms"))
        kept = middle_half(steps[name])
        found.append(summarize(f"{name}_step_ms", [step.total() for step in kept], "ms"))
        for kind in (*KINDS, PYTHON):
            value = round(fmean(step[kind] for step in kept), 3)
            found.append(Measurement(f"{name}: {kind}", value, "ms", None, len(kept), None))
    return found


def limits(shape: Shape, adapters_bytes: int, *, threads: int, nf4: bool) -> list[Measurement]:
    """Return the machine's rates, and the least milliseconds of a step by each."""
    torch.set_num_threads(threads)
    buffer = torch.zeros(READ_BYTES // 4)
    read_s = _quickest(lambda: buffer.sum())
    left, right = (torch.randn(PRODUCT, PRODUCT, dtype=torch.bfloat16) for _ in range(2))
    product_s = _quickest(lambda: left @ right)
    bytes_s, flop_s = READ_BYTES / read_s, 2 * PRODUCT**3 / product_s
    layers = shape.layers * sum(width * out for width, out in shape.linears().values())
    logits = shape.hidden * shape.vocabulary
    # NF4: half a byte a weight, and an fp32 scale for 64 of them; logits stay in bf16.
    base_bytes = layers * (0.5 + 4 / 64 if nf4 else 2) + logits * 2
    lora_flop = 2 * adapters_bytes / 2  # a row uses one adapter; 16 rows use all 16 once, two bytes a weight
    values = (
        ("machine_read", bytes_s / 1e9, "GB/s"),
        ("machine_bf16_product", flop_s / 1e9, "GFLOP/s"),
        ("base_weights", base_bytes / 1e6, "MB"),
        ("base_read_limit", 1e3 * base_bytes / bytes_s, "ms"),
        ("base_flops", 2 * ROWS * (layers + logits) / 1e9, "GFLOP"),
        ("base_product_limit", 1e3 * 2 * ROWS * (layers + logits) / flop_s, "ms"),
        ("adapters16_weights", adapters_bytes / 1e6, "MB"),
        ("adapters16_read_limit", 1e3 * adapters_bytes / bytes_s, "ms"),
        ("adapters16_product_limit", 1e3 * lora_flop / flop_s, "ms"),
    )
    return [Measurement(name, round(value, 2), unit, None, 1, None) for name, value, unit in values]


def _quickest(work: Callable[[], object]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(seconds() for _ in range(REPEATS))


def as_step_table(measurements: Sequence[Measurement]) -> str:
    """Return the table of docs/performance.md: a line per kind, a column per case, and the limits below."""
    values = {one.name: one for one in measurements}
    cases = ("off", "idle", "mixed16")
    lines = ["| ms of a step | LoRA off | LoRA on, no adapter | 16 adapters |", "|---|---|---|---|"]
    for kind in (*KINDS, PYTHON):
        lines.append(
            f"| {kind} | " + " | ".join(f"{values[f'{case}: {kind}'].value:.1f}" for case in cases) + " |"
        )
    for label, name in (("all, profiled", "step_ms"), ("all, without profiler", "unprofiled_ms")):
        lines.append(
            f"| {label} | " + " | ".join(f"{values[f'{case}_{name}'].value:.1f}" for case in cases) + " |"
        )
    rest = [one for one in measurements if one.name.startswith(("machine_", "base_", "adapters16_"))]
    return "\n".join(lines) + "\n\n" + as_table(rest)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = options.parser("step_profile", __doc__, rounds=3)
    parser.add_argument("--base", choices=["bf16", "nf4"], default="bf16")
    options.add_wrapper(parser)
    given = parser.parse_args()
    rounds = 1 if given.quick else given.rounds
    settings = {"rounds": rounds, "threads": given.threads, "wrapper": given.wrapper}
    nf4 = given.base == "nf4"
    found = measure(SHAPES["0.5b"], given.workdir, nf4=nf4, **settings)
    print("\n".join(map(as_line, found)) if given.json else as_step_table(found))
    if given.save:
        save("step_profile" + ("_nf4" if nf4 else ""), settings, found)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
