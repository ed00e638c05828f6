"""What LoRA costs on CPU: the base alone, LoRA idle, and 1, 4 and 16 adapters mixed, with vLLM's wrapper
and ours.

    python -m benchmarks.lora_overhead [--json] [--model 0.5b|tiny|both] [--rounds N] [--quick] [--nf4]
    [--save]

Three engines of one base live side by side (LoRA off; LoRA on with 16 slots of rank 16 and vLLM's wrapper;
the same with ours). A round asks each for each case, in turn; ratios are taken within a round. Decode: 16
sequences at once, prompts of 8 tokens, tokens per second over all of them, rows of different adapters
interleaved. Prefill: one prompt of 600 tokens, one new token.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines import Engine, EngineSpec
from benchmarks.models import SHAPES, Shape, ensure_adapters, ensure_base
from benchmarks.report import Measurement, as_line, as_table, save, summarize

ADAPTERS = 16
RANK = 16
ROWS = 16
PROMPT_TOKENS = 8
PREFILL_TOKENS = 600
TINY_MORE_TOKENS = 8  # a step of the tiny model takes a few milliseconds: more of them, for steadier figures


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

    @property
    def counted_tokens(self) -> int:
        """Tokens the rate is about: those generated, or for a prefill those read."""
        return self.prompt_tokens if self.new_tokens == 1 else len(self.rows) * self.new_tokens


# name, above, below, target: the first bars are those of the first release
RATIOS = (
    ("idle_ratio", "ours_idle_tok_s", "base_tok_s", None),
    ("stock_idle_ratio", "stock_idle_tok_s", "base_tok_s", None),
    ("mixed1_ratio", "ours_mixed1_tok_s", "base_tok_s", None),
    ("mixed4_ratio", "ours_mixed4_tok_s", "base_tok_s", None),
    ("mixed16_ratio", "ours_mixed16_tok_s", "base_tok_s", None),
    ("stock_mixed4_ratio", "stock_mixed4_tok_s", "base_tok_s", None),
    ("one_vs_stock", "ours_mixed1_tok_s", "stock_mixed1_tok_s", None),
    ("mixed4_vs_stock", "ours_mixed4_tok_s", "stock_mixed4_tok_s", 1.8),
    ("mixed16_vs_stock", "ours_mixed16_tok_s", "stock_mixed16_tok_s", None),
    ("prefill_vs_base", "ours_prefill_tok_s", "base_prefill_tok_s", None),
    ("prefill_stock_vs_base", "stock_prefill_tok_s", "base_prefill_tok_s", None),
)


def make_cases(new_tokens: int) -> list[Case]:
    """Return all cases, engines alternating."""

    def decode(name: str, engine: str, rows: Sequence[int | None]) -> Case:
        return Case(f"{name}_tok_s", engine, tuple(rows), PROMPT_TOKENS, new_tokens)

    base: list[int | None] = [None] * ROWS
    cases = [decode("base", "base", base)]
    for engine in ("ours", "stock"):
        cases.append(decode(f"{engine}_idle", engine, base))
    for count in (1, 4, 16):
        rows = [row % count for row in range(ROWS)]
        cases.extend(decode(f"{engine}_mixed{count}", engine, rows) for engine in ("ours", "stock"))
    for engine, row in (("base", None), ("ours", 0), ("stock", 0)):
        cases.append(Case(f"{engine}_prefill_tok_s", engine, (row,), PREFILL_TOKENS, 1))
    return cases


def run_rounds(engines: dict[str, Engine], cases: list[Case], rounds: int) -> dict[str, list[float]]:
    """Return tokens per second by case, one value per round, after one round that is not counted."""
    rates: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for case in cases:
            request = {"rows": case.rows, "prompt_tokens": case.prompt_tokens}
            # The warm-up round touches every path, but need not go on for long.
            request["new_tokens"] = min(case.new_tokens, 2) if number == 0 else case.new_tokens
            seconds = engines[case.engine].ask(request)["seconds"]
            if number:
                rates[case.name].append(case.counted_tokens / seconds)
            print(f"round {number}/{rounds} {case.name}: {seconds:.2f} s", file=sys.stderr)
    return rates


def measure(
    shape: Shape, workdir: Path, *, rounds: int, new_tokens: int, threads: int, nf4: bool
) -> list[Measurement]:
    """Start the three engines, run the rounds and return all rates and ratios."""
    base = str(ensure_base(shape, workdir))
    adapters = tuple(map(str, ensure_adapters(shape, workdir, count=ADAPTERS, rank=RANK)))
    quantization = "bitsandbytes" if nf4 else None
    specs = {
        "base": EngineSpec(base, quantization=quantization),
        "ours": EngineSpec(base, adapters, "grouped", RANK, quantization),
        "stock": EngineSpec(base, adapters, "stock", RANK, quantization),
    }
    engines: dict[str, Engine] = {}
    try:
        for name, spec in specs.items():
            engines[name] = Engine(spec, threads=threads)
            print(f"{name}: {engines[name].started}", file=sys.stderr)
        if shape.name == "tiny":
            new_tokens *= TINY_MORE_TOKENS
        rates = run_rounds(engines, make_cases(new_tokens), rounds)
    finally:
        for engine in engines.values():
            engine.close()
    prefix = ("tiny_" if shape.name == "tiny" else "") + ("nf4_" if nf4 else "")
    return summarize_rates(rates, prefix)


def summarize_rates(rates: dict[str, list[float]], prefix: str) -> list[Measurement]:
    """Return the rates and, within rounds, their ratios; only the 0.5B shape in bf16 has bars to meet."""
    measurements = [summarize(prefix + name, values, "tok/s") for name, values in rates.items()]
    for name, above, below, target in RATIOS:
        ratios = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
        measurements.append(summarize(prefix + name, ratios, "ratio", None if prefix else target))
    return measurements


def main() -> None:
    """Parse the command line, measure, print."""
    options = _parser().parse_args()
    rounds, new_tokens = (2, 6) if options.quick else (options.rounds, 32)
    settings = {"rounds": rounds, "new_tokens": new_tokens, "threads": options.threads, "nf4": options.nf4}
    measurements: list[Measurement] = []
    for shape in SHAPES.values():
        if options.model not in (shape.name, "both"):
            continue
        found = measure(shape, options.workdir, **settings)
        measurements += found
        if options.json:
            print("\n".join(map(as_line, found)), flush=True)
    if not options.json:
        print(as_table(measurements))
    if options.save:
        save("lora_overhead" + ("_nf4" if options.nf4 else ""), settings, measurements)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.lora_overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON lines on stdout and nothing else")
    parser.add_argument("--model", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 6 tokens: a look, not figures")
    parser.add_argument("--nf4", action="store_true", help="the base in NF4; names begin with nf4_")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of each engine")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/lora_overhead.json")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()) / "loraplex-benchmarks")
    return parser


if __name__ == "__main__":
    main()
