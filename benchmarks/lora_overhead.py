"""What serving adapters costs over serving the base alone, beside vLLM's own LoRA.

    python -m benchmarks.lora_overhead [--json] [--base bf16|nf4|both] [--model 0.5b|tiny] [--rounds N] [--quick]
    [--wrapper native|grouped] [--save]

Five engines of one base are alive at once: `base` (LoRA off, compiled: what our ratios are held against), `ours`
(LoRA on, our path, compiled), and vLLM as it is, without our kernels: `vllm` (LoRA off, compiled) and `stock`
(LoRA on, vLLM's own wrapper, for which vLLM switches compilation off), whose ratios are held against `vllm`. These
have the same threads, chosen by us; `shipped` is `stock` with the threads and processes that vLLM chooses itself. A
round asks each for each case, in turn; ratios are taken within a round. An engine that was asleep makes two tokens
first that do not count. Decode: 16 sequences at once, prompts of 8 tokens, tokens per second over all of them, prompts
included, rows of different adapters interleaved. Prefill: one prompt of 600 tokens, one new token. Then vLLM with LoRA
off is started once more, compiled and not, beside each other.

The whole is then done again on the base in NF4 (names begin with ``nf4_``); a ratio's target there is the bf16
ratio of the same run, less 0.03.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import options
from benchmarks.engines import Engine, EngineSpec
from benchmarks.models import SHAPES, Shape, ensure_adapters, ensure_base
from benchmarks.report import Measurement, as_line, as_table, save, summarize

ROWS = 16
ALL_LINEAR = 16  # adapters of rank 16 on all linear modules, numbers 0-15
ON_QV = 8  # adapters of rank 8 on q and v, the numbers after those
PROMPT_TOKENS = 8
NEW_TOKENS = 32
PREFILL_TOKENS = 600
TINY_MORE_TOKENS = 8  # a step of the tiny model takes a few milliseconds: more of them, for steadier figures
STOCK_ROUNDS = 5  # vLLM's own LoRA takes three times as long
FEW_ROUNDS = 3  # of what no bar is held against
NF4_MARGIN = 0.03


@dataclass(frozen=True)
class Case:
    """One thing measured of one engine; `rows` holds an adapter number, or None for the base, per
    sequence.
    """

    name: str
    engine: str
    rows: tuple[int | None, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int | None = None  # at most so many of the run's; None: all

    @property
    def counted_tokens(self) -> int:
        """Tokens the rate is about: those generated, or for a prefill those read."""
        return self.prompt_tokens if self.new_tokens == 1 else len(self.rows) * self.new_tokens

    def due(self, number: int) -> bool:
        """Tell whether this case is part of round `number`; 0 warms up, and a long single one is spared that."""
        return self.rounds is None or (number <= self.rounds and (number, self.rounds) != (0, 1))


# name, above, below, target
RATIOS = (
    ("idle_ratio", "ours_idle", "base", 0.97),
    ("mixed8_qv_r8_ratio", "ours_mixed8_qv_r8", "base", 0.94),
    ("one_r16_all_ratio", "ours_one_r16_all", "base", 0.92),
    ("mixed16_r16_all_ratio", "ours_mixed16_r16_all", "base", 0.82),
    ("mixed16_vs_stock", "ours_mixed16_r16_all", "stock_mixed16_r16_all", 3.2),
    ("mixed16_vs_shipped", "ours_mixed16_r16_all", "shipped_mixed16_r16_all", None),
    ("prefill_ratio", "ours_prefill", "base_prefill", 0.92),
    ("prefill_vs_vllm_off", "ours_prefill", "vllm_prefill", None),
    ("mixed16_vs_vllm_off", "ours_mixed16_r16_all", "vllm", None),
    ("base_vs_vllm_off", "base", "vllm", None),
    ("base_prefill_vs_vllm_off", "base_prefill", "vllm_prefill", None),
    ("vllm_off_compiled_vs_eager", "compiled", "eager", None),
    ("stock_idle_ratio", "stock_idle", "vllm", None),
    ("stock_mixed8_qv_r8_ratio", "stock_mixed8_qv_r8", "vllm", None),
    ("stock_one_r16_all_ratio", "stock_one_r16_all", "vllm", None),
    ("stock_mixed16_r16_all_ratio", "stock_mixed16_r16_all", "vllm", None),
    ("stock_prefill_ratio", "stock_prefill", "vllm_prefill", None),
)


def make_cases(new_tokens: int) -> list[Case]:
    """Return the cases of a round, in turn. One named twice is asked twice, and its rate is that of both."""
    nobody = (None,) * ROWS
    mixed8 = tuple(ALL_LINEAR + row % ON_QV for row in range(ROWS))
    mixed16 = tuple(row % ALL_LINEAR for row in range(ROWS))

    def decode(name: str, rows: tuple[int | None, ...], rounds: int | None = None) -> Case:
        return Case(name, name.partition("_")[0], rows, PROMPT_TOKENS, new_tokens, rounds)

    def prefill(engine: str, row: int | None, rounds: int | None = None) -> Case:
        return Case(f"{engine}_prefill", engine, (row,), PREFILL_TOKENS, 1, rounds)

    return [
        decode("base", nobody),
        decode("ours_idle", nobody),
        decode("ours_mixed8_qv_r8", mixed8),
        prefill("base", None),
        prefill("ours", 0),
        decode("base", nobody),
        decode("ours_one_r16_all", (0,) * ROWS),
        decode("ours_mixed16_r16_all", mixed16),
        prefill("ours", 0),
        prefill("base", None),
        decode("base", nobody),
        decode("stock_mixed16_r16_all", mixed16, STOCK_ROUNDS),
        decode("vllm", nobody, STOCK_ROUNDS),
        prefill("vllm", None),
        decode("shipped_mixed16_r16_all", mixed16, FEW_ROUNDS),
        decode("stock_idle", nobody, FEW_ROUNDS),
        decode("stock_mixed8_qv_r8", mixed8, 1),
        decode("stock_one_r16_all", (0,) * ROWS, 1),
        prefill("stock", 0, 1),
    ]


def make_compile_cases(new_tokens: int) -> list[Case]:
    """Return the cases of a round of vLLM alone, compiled and not."""
    return [
        Case(name, name, (None,) * ROWS, PROMPT_TOKENS, new_tokens, FEW_ROUNDS)
        for name in ("compiled", "eager")
    ]


def run_rounds(engines: Mapping[str, Engine], cases: Sequence[Case], rounds: int) -> dict[str, list[float]]:
    """Return tokens per second by case, one value per round, after one round that is not counted."""
    rates: dict[str, list[float]] = defaultdict(list)
    awake = ""
    for number in range(rounds + 1):
        seconds: dict[str, list[float]] = defaultdict(list)
        for case in cases:
            if not case.due(number):
                continue
            if case.engine != awake:
                engines[case.engine].ask({"rows": case.rows, "prompt_tokens": PROMPT_TOKENS, "new_tokens": 2})
                awake = case.engine
            request = {"rows": case.rows, "prompt_tokens": case.prompt_tokens}
            # The warm-up round touches every path, but need not go on for long.
            request["new_tokens"] = min(case.new_tokens, 2) if number == 0 else case.new_tokens
            seconds[case.name].append(engines[case.engine].ask(request)["seconds"])
            print(f"round {number}/{rounds} {case.name}: {seconds[case.name][-1]:.2f} s", file=sys.stderr)
        if number:
            for case in {case.name: case for case in cases if case.due(number)}.values():
                rates[case.name].append(case.counted_tokens / fmean(seconds[case.name]))
    return rates


def measure(
    shape: Shape, workdir: Path, *, rounds: int, new_tokens: int, threads: int, wrapper: str, nf4: bool
) -> tuple[list[Measurement], dict[str, Any]]:
    """Start the engines, run the rounds, and return all rates and ratios, and what the engines said of themselves."""
    base = str(ensure_base(shape, workdir))
    adapters = [
        *ensure_adapters(shape, workdir, count=ALL_LINEAR, rank=16),
        *ensure_adapters(shape, workdir, count=ON_QV, rank=8, modules=("q_proj", "v_proj")),
    ]
    off = EngineSpec(base, quantization="bitsandbytes" if nf4 else None)
    on = replace(off, adapters=tuple(map(str, adapters)))
    specs = {
        "base": replace(off, compile=True, wrapper=wrapper),
        "vllm": replace(off, compile=True, wrapper="stock", linear="stock"),
        # Asked to compile with the pure-torch wrapper, vLLM would neither compile nor use its own fused kernels.
        "ours": replace(on, compile=wrapper == "native", wrapper=wrapper),
        "stock": replace(on, wrapper="stock", linear="stock"),
        "shipped": replace(on, wrapper="stock", linear="stock", shipped=True),
    }
    if shape.name == "tiny":
        new_tokens *= TINY_MORE_TOKENS
    rates, started = _with_engines(specs, make_cases(new_tokens), rounds, threads)
    alone = {"compiled": specs["vllm"], "eager": replace(specs["vllm"], compile=False)}
    more, _ = _with_engines(alone, make_compile_cases(new_tokens), min(rounds, FEW_ROUNDS), threads)
    return summarize_rates(rates | more), started


def _with_engines(
    specs: Mapping[str, EngineSpec], cases: Sequence[Case], rounds: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Start the engines, run the rounds, and return the rates, and what the engines said of themselves."""
    engines: dict[str, Engine] = {}
    try:
        for name, spec in specs.items():
            engines[name] = Engine(spec, threads=threads)
            print(f"{name}: {engines[name].started}", file=sys.stderr)
        rates = run_rounds(engines, cases, rounds)
    finally:
        for engine in engines.values():
            engine.close()
    return rates, {name: engine.started for name, engine in engines.items()}


def summarize_rates(rates: Mapping[str, Sequence[float]]) -> list[Measurement]:
    """Return the ratios, taken within rounds, and the rates they are made of."""
    found = []
    for name, above, below, target in RATIOS:
        # One measured in the first rounds alone is held against those rounds of the other.
        ratios = [a / b for a, b in zip(rates[above], rates[below], strict=False)]
        found.append(summarize(name, ratios, "ratio", target))
    return found + [summarize(f"{name}_tok_s", values, "tok/s") for name, values in rates.items()]


def as_nf4(measurements: Sequence[Measurement], bf16: Sequence[Measurement]) -> list[Measurement]:
    """Name the figures of the NF4 base, and hold its ratios against those measured on bf16, where they were."""
    reached = {one.name: one.value for one in bf16}

    def target(one: Measurement) -> float | None:
        held = one.target is not None and one.name in reached
        return round(reached[one.name] - NF4_MARGIN, 4) if held else None

    return [replace(one, name=f"nf4_{one.name}", target=target(one)) for one in measurements]


def main() -> None:
    """Parse the command line, measure, print."""
    given = _parser().parse_args()
    settings: dict[str, Any] = {
        "rounds": 2 if given.quick else given.rounds,
        "new_tokens": 6 if given.quick else NEW_TOKENS,
        "threads": given.threads,
        "wrapper": given.wrapper,
    }
    shape = SHAPES[given.model]
    measurements: list[Measurement] = []
    engines: dict[str, Any] = {}
    for kind in ("bf16", "nf4") if given.base == "both" else (given.base,):
        found, engines[kind] = measure(shape, given.workdir, nf4=kind == "nf4", **settings)
        if kind == "nf4":
            found = as_nf4(found, measurements)
        if shape.name == "tiny":  # the bars are about the other shape
            found = [replace(one, name=f"tiny_{one.name}", target=None) for one in found]
        measurements += found
        if given.json:
            print("\n".join(map(as_line, found)), flush=True)
    if not given.json:
        print(as_table(measurements))
    if given.save:
        save("lora_overhead", settings | {"base": given.base, "engines": engines}, measurements)


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("lora_overhead", __doc__, rounds=10)
    parser.add_argument("--base", choices=["bf16", "nf4", "both"], default="both")
    options.add_model(parser)
    options.add_wrapper(parser)
    return parser


if __name__ == "__main__":
    main()
