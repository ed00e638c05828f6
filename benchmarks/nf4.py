"""The NF4 base on CPU: our kernels, vLLM's bitsandbytes plugin as it is, and the base in bf16.

    python -m benchmarks.nf4 [--json] [--part layers|quality|engines|all] [--rounds N] [--quick] [--save]

Layers: all linear layers of the 0.5B shape, once through for 1, 16 and 600 rows, five ways in turn in one process;
weights are all distinct, so that a step finds none of them in a cache. `int8` is ours with products in eight bits,
`bf16` our kernels for an unquantized base, `onednn` what vLLM runs one with, and both what NF4 weights unpacked once
for all would be: the memory of each is told beside its speed. The machine's limits are measured in the same run:
reading memory, and the largest product of matrices that oneDNN does.
Quality: see `nf4_quality`.
Engines: the whole engine, four alive at once, one at a time running: 16 sequences and one, and a prompt of 600.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import options
from benchmarks.engines import Engine, EngineSpec
from benchmarks.models import SHAPES, Shape, ensure_base
from benchmarks.nf4_quality import measure_quality
from benchmarks.report import Measurement, as_line, as_table, save, summarize
from loraplex_server.vllm_plugin.cpu import bf16
from loraplex_server.vllm_plugin.cpu.nf4 import Quantized, linear, pack

ROWS = (1, 16, 600)
WAYS = ("ours", "int8", "stock", "bf16", "onednn")
LONG_ROUNDS = 5  # of passes with 600 rows, which take seconds
LIMIT_BYTES = 1 << 30
LIMIT_PRODUCT = (1024, 4096, 4096)  # rows, columns and depth that show what arithmetic the machine can do
LIMIT_TRIES = 5  # each time, and the limits are measured before and after every number of rows
PROMPTS = (5, 17, 40, 97, 200, 333)  # lengths of prompts whose answers are compared between engines
DECODE_TOKENS, PREFILL_TOKENS = 24, 600


@dataclass(frozen=True)
class Layer:
    """One linear layer of the model, in its forms by way."""

    in_features: int
    out_features: int
    run: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    weight_bytes: Mapping[str, int]
    exact: torch.Tensor  # the weight that NF4 stands for, bf16


def make_layer(outs: Sequence[int], in_features: int) -> Layer:
    """Quantize random weights (projections that vLLM merges are one layer) and prepare them for each way."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from vllm import _custom_ops as ops

    parts = [
        quantize_4bit(torch.randn(out, in_features).mul_(0.02).bfloat16(), quant_type="nf4") for out in outs
    ]
    exact = torch.cat([dequantize_4bit(codes, state) for codes, state in parts])
    projections = [
        Quantized(codes, state.absmax, tuple(state.shape), state.blocksize) for codes, state in parts
    ]
    packed, in_bytes = pack(projections), pack(projections, int8=True)
    handler, panels = ops.create_onednn_mm(exact.t(), 32), bf16.pack(exact)
    total = sum(outs)

    def stock(x: torch.Tensor) -> torch.Tensor:  # as the plugin's `_apply_bnb_4bit`
        out, at = torch.empty(len(x), total, dtype=torch.bfloat16), 0
        for (codes, state), width in zip(parts, outs, strict=True):
            out[:, at : at + width] = matmul_4bit(x, codes.t(), state)
            at += width
        return out

    stock_bytes = sum(codes.numel() + 4 * state.absmax.numel() for codes, state in parts)
    return Layer(
        in_features,
        total,
        {
            "ours": lambda x: linear(x, packed.memory, None, total, packed.group, packed.int8),
            "int8": lambda x: linear(x, in_bytes.memory, None, total, in_bytes.group, in_bytes.int8),
            "stock": stock,
            "bf16": lambda x: bf16.linear(x, panels, None, total),
            "onednn": lambda x: ops.onednn_mm(handler, x, None),
        },
        {
            "ours": packed.memory.numel(),
            "int8": in_bytes.memory.numel(),
            "stock": stock_bytes,
            "bf16": 2 * panels.numel(),
            "onednn": 2 * exact.numel(),
        },
        exact,
    )


def make_layers(shape: Shape) -> list[Layer]:
    """Return the linear layers of the model as vLLM has them: q, k, v merged, gate and up merged."""
    kv = shape.kv_heads * shape.head
    merged = [
        ((shape.hidden, kv, kv), shape.hidden),
        ((shape.hidden,), shape.hidden),
        ((shape.mlp, shape.mlp), shape.hidden),
        ((shape.hidden,), shape.mlp),
    ]
    return [make_layer(outs, in_features) for _ in range(shape.layers) for outs, in_features in merged]


def measure_layers(shape: Shape, rounds: int) -> list[Measurement]:
    """Time passes over all layers, and hold them against the machine's limits."""
    torch.manual_seed(0)
    layers = make_layers(shape)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    sizes = {way: sum(layer.weight_bytes[way] for layer in layers) for way in WAYS}
    found = [
        Measurement(f"weights_{way}_mib", round(sizes[way] / 2**20, 1), "MiB", None, 1, None) for way in WAYS
    ]
    found += measure_errors(layers)
    limits = Limits()
    for n_rows in ROWS:
        limits.ask()
        inputs = {
            width: torch.randn(n_rows, width).bfloat16() for width in {one.in_features for one in layers}
        }
        times = time_ways(layers, inputs, min(rounds, LONG_ROUNDS) if n_rows > 16 else rounds)
        for way in WAYS:
            found.append(summarize(f"layers{n_rows}_{way}_ms", [1e3 * one for one in times[way]], "ms"))
        for other in WAYS[1:]:
            ratios = [a / b for a, b in zip(times[other], times["ours"], strict=True)]
            found.append(summarize(f"layers{n_rows}_vs_{other}", ratios, "x faster"))
        for way in WAYS:
            found.append(
                summarize(
                    f"layers{n_rows}_{way}_gb_s", [sizes[way] / 1e9 / one for one in times[way]], "GB/s"
                )
            )
            gmac = [weights * n_rows / 1e9 / one for one in times[way]]
            found.append(summarize(f"layers{n_rows}_{way}_gmac_s", gmac, "GMAC/s"))
    limits.ask()
    found.append(summarize("limit_read_gb_s", [limits.read_gb_s], "GB/s"))
    return [*found, summarize("limit_gmac_s", [limits.gmac_s], "GMAC/s")]


@torch.inference_mode()
def time_ways(
    layers: Sequence[Layer], inputs: Mapping[int, torch.Tensor], rounds: int
) -> dict[str, list[float]]:
    """Return seconds of a pass over all layers, by way, one value per round, after one that is not counted."""
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for way in WAYS:
            start = time.perf_counter()
            for layer in layers:
                layer.run[way](inputs[layer.in_features])
            if number:
                times[way].append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def measure_errors(layers: Sequence[Layer]) -> list[Measurement]:
    """Return the largest difference to float64 over one layer of each kind, 16 rows of standard normal inputs."""
    worst = dict.fromkeys(WAYS, 0.0)
    for layer in layers[:4]:
        x = torch.randn(16, layer.in_features).bfloat16()
        exact = x.double() @ layer.exact.double().t()
        for way in WAYS:
            worst[way] = max(worst[way], float((layer.run[way](x) - exact).abs().max()))
    return [Measurement(f"largest_error_{way}", round(worst[way], 6), "", None, 1, None) for way in WAYS]


class Limits:
    """The most that the machine read from memory and multiplied in bf16 while this was asked now and then."""

    def __init__(self) -> None:
        from vllm import _custom_ops as ops

        n_rows, columns, depth = LIMIT_PRODUCT
        self._memory = torch.ones(LIMIT_BYTES // 8, dtype=torch.int64)
        self._x = torch.randn(n_rows, depth).bfloat16()
        self._multiply = ops.onednn_mm
        self._handler = ops.create_onednn_mm(torch.randn(columns, depth).bfloat16().t(), 32)
        self.read_gb_s = self.gmac_s = 0.0

    @torch.inference_mode()
    def ask(self) -> None:
        """Try again."""
        for _ in range(LIMIT_TRIES):
            start = time.perf_counter()
            self._memory.sum()
            self.read_gb_s = max(self.read_gb_s, LIMIT_BYTES / 1e9 / (time.perf_counter() - start))
            start = time.perf_counter()
            self._multiply(self._handler, self._x, None)
            self.gmac_s = max(self.gmac_s, math.prod(LIMIT_PRODUCT) / 1e9 / (time.perf_counter() - start))


def measure_engines(shape: Shape, workdir: Path, rounds: int, threads: int) -> list[Measurement]:
    """Time whole engines, and compare what they answer and the memory they take."""
    unquantized = EngineSpec(
        str(ensure_base(shape, workdir)), compile=True, wrapper="grouped"
    )  # LoRA is off: any
    nf4 = replace(unquantized, quantization="bitsandbytes")
    specs = {
        "ours": nf4,
        "int8": replace(nf4, linear="int8"),
        "stock": replace(nf4, linear="stock"),
        "bf16": unquantized,
    }
    engines: dict[str, Engine] = {}
    try:
        for name, spec in specs.items():
            engines[name] = Engine(spec, threads=threads)
            print(f"{name}: {engines[name].started}", file=sys.stderr)
        found = [
            Measurement(
                f"engine_{name}_rss_mib", round(engine.memory_bytes()["rss"] / 2**20), "MiB", None, 1, None
            )
            for name, engine in engines.items()
        ]
        return found + compare_answers(engines) + time_engines(engines, rounds)
    finally:
        for engine in engines.values():
            engine.close()


def compare_answers(engines: Mapping[str, Engine]) -> list[Measurement]:
    """Return the share of greedy tokens that ours and stock have in common before they first differ.

    With random weights the best two tokens often lie closer than one rounding, so the yardstick is told with it: stock
    alone against the first row of stock with 16 rows of the same prompt.
    """
    answers: dict[str, list[list[int]]] = defaultdict(list)
    for length in PROMPTS:
        asked = (("ours", "ours", 1), ("int8", "int8", 1), ("stock", "stock", 1), ("stock16", "stock", 16))
        for name, engine, n_rows in asked:
            request = {"rows": [None] * n_rows, "prompt_tokens": length, "new_tokens": DECODE_TOKENS}
            answers[name].append(engines[engine].ask(request)["tokens"][0])
    return [
        Measurement(f"engine_equal_tokens_{name}", round(common(answers[name], answers["stock"]), 4), "share", None,
                    len(PROMPTS), None)
        for name in ("ours", "int8", "stock16")
    ]  # fmt: skip


def common(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens before the first difference of each answer."""
    same = 0
    for one, other in zip(some, others, strict=True):
        differs = [number for number, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        same += min([*differs, len(one)])
    return same / sum(map(len, some))


def time_engines(engines: Mapping[str, Engine], rounds: int) -> list[Measurement]:
    """Return tokens per second by engine and case, and ours against the others, taken within rounds."""
    cases = {
        "decode16": (16, 8, DECODE_TOKENS),
        "decode1": (1, 8, DECODE_TOKENS),
        "prefill600": (1, PREFILL_TOKENS, 1),
    }
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for case, (n_rows, prompt, new) in cases.items():
            for name, engine in engines.items():
                request = {"rows": [None] * n_rows, "prompt_tokens": prompt, "new_tokens": new}
                seconds = engine.ask(request)["seconds"]
                print(f"round {number}/{rounds} {name} {case}: {seconds:.2f} s", file=sys.stderr)
                if number:
                    rates[case, name].append((n_rows * new if new > 1 else prompt) / seconds)
    found = [summarize(f"engine_{case}_{name}_tok_s", rates[case, name], "tok/s") for case, name in rates]
    for case in cases:
        for other in ("stock", "bf16", "int8"):
            ratios = [a / b for a, b in zip(rates[case, "ours"], rates[case, other], strict=True)]
            found.append(summarize(f"engine_{case}_vs_{other}", ratios, "ratio"))
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = options.parser("nf4", __doc__, rounds=7)
    parser.add_argument("--part", choices=["layers", "quality", "engines", "all"], default="all")
    options.add_model(parser)
    given = parser.parse_args()
    shape, rounds = SHAPES[given.model], 2 if given.quick else given.rounds
    torch.set_num_threads(given.threads)
    found: list[Measurement] = []
    parts: dict[str, Callable[[], list[Measurement]]] = {
        "layers": lambda: measure_layers(shape, rounds),
        "quality": lambda: measure_quality(given.workdir),
        "engines": lambda: measure_engines(shape, given.workdir, rounds, given.threads),
    }
    for part, measure in parts.items():
        if given.part in (part, "all"):
            figures = measure()
            found += figures
            if given.json:
                print("\n".join(map(as_line, figures)), flush=True)
    if not given.json:
        print(as_table(found))
    if given.save:
        settings: dict[str, Any] = {
            "rounds": rounds, "threads": given.threads, "model": given.model, "part": given.part
        }  # fmt: skip
        save("nf4", settings, found)


if __name__ == "__main__":
    main()
