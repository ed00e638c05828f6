"""The CPU LoRA kernels alone: a decode step and a prefill of the 0.5B shape, beside what memory and arithmetic allow.

    python -m benchmarks.kernels [--json] [--rounds N] [--save]

All LoRA calls of one model step (24 layers: packed q/k/v, output, packed gate and up, down), rank 16 on all linear
layers, 16 rows over 1, 4 or 16 adapters; nothing else of the model but, where the name says so, its own products.
Activations stay in the caches as they do in a model; weights do not: every step takes other adapters than the last,
16 of them together being larger than any cache. A round measures each case once, in turn, so ratios are within a
round.

    read_gb_s                     how fast the threads read 512 MB: the bound of a decode step
    stepN_ms, stepN_gb_s          kernels, N adapters: time, and weights read per second
    stepN_of_bandwidth            the same as a part of read_gb_s
    groupedN_ms, stockN_ms        the pure-torch wrapper, vLLM's own
    linear_ms                     the base's own products of the step (torch, bf16)
    stepN_added_ms                what the kernels add when each follows its base product, as in a model
    prefill_linear_ms             the base's products for 600 rows
    prefill_ms, prefill_part      the kernels for 600 rows of one adapter; as a part of prefill_linear_ms
    prefill_grouped_ms            the pure-torch wrapper
    idle_call_us, busy_call_us    an operator call with no adapter in the batch, and with one that does not touch it
    bind_us                       putting an adapter of 168 pieces into a slot
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import options
from benchmarks.models import INIT_STD, SHAPES, Shape
from benchmarks.report import Measurement, as_line, as_table, save, summarize
from loraplex_server.vllm_plugin.cpu import ops
from loraplex_server.vllm_plugin.cpu.kernels import (
    TOKENS,
    Binding,
    Geometry,
    Piece,
    Table,
    isa,
    load,
    pack_b,
    packed_b_bytes,
)

ADAPTERS = 16
RANK = 16
ROWS = 16
PREFILL_ROWS = 600
COUNTS = (1, 4, 16)
DTYPE = torch.bfloat16
READ_BYTES = 512 * 10**6
CALLS = 200  # per measurement of one call


def geometries(shape: Shape) -> list[Geometry]:
    """Return the wrapped modules of one layer, packed as vLLM packs them."""
    kv = shape.kv_heads * shape.head
    return [
        Geometry.side_by_side(shape.hidden, (shape.hidden, kv, kv)),
        Geometry.side_by_side(shape.hidden, (shape.hidden,)),
        Geometry.side_by_side(shape.hidden, (shape.mlp, shape.mlp)),
        Geometry.side_by_side(shape.mlp, (shape.hidden,)),
    ]


def random(*shape: int) -> torch.Tensor:
    """Return weights, or activations, in bf16."""
    return torch.empty(shape, dtype=DTYPE).normal_(std=INIT_STD)


@dataclass
class Stage:
    """The model's products, the adapters in both forms, and activations; the wrapped modules of all layers in turn."""

    modules: list[Geometry]
    base: list[torch.Tensor]
    table: Table
    bindings: list[Binding]
    # per module and slice, (slots, 1, ...) as vLLM stacks them
    a: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    b: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    @staticmethod
    def build(loaded: ctypes.CDLL, shape: Shape) -> Stage:
        """Make all weights; about 1.3 GB for the 0.5B shape."""
        modules = geometries(shape) * shape.layers
        stage = Stage(
            modules,
            [random(one.width, one.in_features) for one in modules],
            Table(loaded, modules, ADAPTERS, DTYPE),
            [],
        )
        for module in modules:
            stage.a.append(tuple(random(ADAPTERS, 1, RANK, module.in_features) for _ in module.out_features))
            stage.b.append(tuple(random(ADAPTERS, 1, out, RANK) for out in module.out_features))
        for slot in range(ADAPTERS):
            stage.bindings.append(stage._binding(loaded, slot))
            stage.table.bind(slot, stage.bindings[-1])
        return stage

    def _binding(self, loaded: ctypes.CDLL, slot: int) -> Binding:
        """Lay one adapter out in a block of its own, in the order of the modules, in large pages as the server does."""
        region = mmap.mmap(-1, self.adapter_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(region, dtype=torch.uint8)
        pieces, at = [], 0
        for number, module in enumerate(self.modules):
            for part, out in enumerate(module.out_features):
                low = block[at : at + RANK * module.in_features * 2]
                low.view(DTYPE).copy_(self.a[number][part][slot, 0].reshape(-1))
                packed = block[at + len(low) :][: packed_b_bytes(out, RANK, DTYPE)]
                pack_b(loaded, packed, self.b[number][part][slot, 0])
                pieces.append(Piece(number, part, RANK, low.data_ptr(), packed.data_ptr()))
                at += len(low) + len(packed)
        return Binding.of(pieces, keep=block)

    @property
    def adapter_bytes(self) -> int:
        """Size of one adapter's weights."""
        return sum(
            RANK * one.in_features * 2 + packed_b_bytes(out, RANK, DTYPE)
            for one in self.modules
            for out in one.out_features
        )


class Bench:
    """Times one thing at a time, in milliseconds."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.turn = 0
        self.flood = torch.ones(READ_BYTES // 4)
        widths = {one.in_features for one in stage.modules}
        self.x = {rows: {width: random(rows, width) for width in widths} for rows in (ROWS, PREFILL_ROWS)}
        outs = {one.width for one in stage.modules}
        self.y = {rows: {width: random(rows, width) for width in outs} for rows in (ROWS, PREFILL_ROWS)}

    def slots(self, count: int, rows: int = ROWS) -> np.ndarray:
        """Rows over `count` adapters, other ones at each call, rows of one adapter apart."""
        self.turn += count
        return ((np.arange(rows) % count + self.turn) % ADAPTERS).astype(np.int32)

    def read(self) -> float:
        """Gigabytes per second of a plain sum."""
        return READ_BYTES / timed(self.flood.sum) / 1e6

    def kernels(self, count: int, rows: int = ROWS) -> float:
        """All LoRA calls of one step."""
        self.stage.table.rows(TOKENS, self.slots(count, rows))
        return timed(lambda: self._add(rows))

    def _add(self, rows: int) -> None:
        add, x, y = torch.ops.loraplex.add_lora.default, self.x[rows], self.y[rows]
        for number, one in enumerate(self.stage.modules):
            add(y[one.width], x[one.in_features], number)

    def products(self, count: int, rows: int = ROWS) -> float:
        """The base's products of one step, each followed by its LoRA call where `count` is not 0."""
        self.stage.table.rows(TOKENS, self.slots(count, rows) if count else np.full(rows, -1, dtype=np.int32))
        return timed(lambda: self._products(rows))

    def _products(self, rows: int) -> None:
        add, x = torch.ops.loraplex.add_lora.default, self.x[rows]
        for number, (one, weight) in enumerate(zip(self.stage.modules, self.stage.base, strict=True)):
            y = torch.nn.functional.linear(x[one.in_features], weight)
            add(y, x[one.in_features], number)

    def wrapper(self, wrapper: Any, count: int, rows: int = ROWS) -> float:
        """All LoRA calls of one step through one of vLLM's wrappers."""
        announce(wrapper, self.slots(count, rows))
        return timed(lambda: self._wrapped(wrapper, rows))

    def _wrapped(self, wrapper: Any, rows: int) -> None:
        stage, x, y = self.stage, self.x[rows], self.y[rows]
        for one, a, b in zip(stage.modules, stage.a, stage.b, strict=True):
            wrapper.add_lora_linear(y[one.width], x[one.in_features], a, b, 1.0, one.out_features)

    def call_us(self, slot: int) -> float:
        """One operator call with 16 rows of `slot`, which must not touch module 0 where it is not -1."""
        self.stage.table.rows(TOKENS, np.full(ROWS, slot, dtype=np.int32))
        add, one = torch.ops.loraplex.add_lora.default, self.stage.modules[0]
        x, y = self.x[ROWS][one.in_features], self.y[ROWS][one.width]

        def calls() -> None:
            for _ in range(CALLS):
                add(y, x, 0)

        return timed(calls) * 1e3 / CALLS

    def bind_us(self) -> float:
        """Put an adapter into the slot where it is already."""
        return timed(lambda: self.stage.table.bind(0, self.stage.bindings[0])) * 1e3


def timed(work: Callable[[], object]) -> float:
    """Return milliseconds of wall time."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def wrappers() -> dict[str, Any]:
    """Return the pure-torch wrapper and vLLM's own."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from loraplex_server.vllm_plugin.punica import GroupedPunicaWrapper

    return {"grouped": GroupedPunicaWrapper(1024, 64, "cpu"), "stock": PunicaWrapperCPU(1024, 64, "cpu")}


@dataclass(frozen=True)
class _Mapping:
    """The fields of vLLM's LoRAMapping that a wrapper reads."""

    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]
    is_prefill: bool = False


def announce(wrapper: Any, slots: NDArray[np.int32]) -> None:
    """Tell a wrapper the batch; the adapter in slot n has the id n + 1."""
    ids = tuple(int(slot) + 1 for slot in slots)
    wrapper.update_metadata(_Mapping(ids, ids), list(range(1, ADAPTERS + 1)), ADAPTERS + 1, 1)


def one_round(bench: Bench, others: dict[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Yield name, value and unit of every case."""
    read = bench.read()
    yield "read_gb_s", read, "GB/s"
    linear = bench.products(0)
    yield "linear_ms", linear, "ms"
    for count in COUNTS:
        ms = bench.kernels(count)
        rate = bench.stage.adapter_bytes * count / ms / 1e6
        yield f"step{count}_ms", ms, "ms"
        yield f"step{count}_gb_s", rate, "GB/s"
        yield f"step{count}_of_bandwidth", rate / read, "ratio"
        yield f"step{count}_added_ms", bench.products(count) - linear, "ms"
        for name, wrapper in others.items():
            yield f"{name}{count}_ms", bench.wrapper(wrapper, count), "ms"
    linear = bench.products(0, PREFILL_ROWS)
    ms = bench.kernels(1, PREFILL_ROWS)
    yield "prefill_linear_ms", linear, "ms"
    yield "prefill_ms", ms, "ms"
    yield "prefill_part", ms / linear, "ratio"
    yield "prefill_grouped_ms", bench.wrapper(others["grouped"], 1, PREFILL_ROWS), "ms"
    yield "idle_call_us", bench.call_us(-1), "us"
    yield "bind_us", bench.bind_us(), "us"
    bench.stage.table.bind(1, Binding.of((), keep=None))
    yield "busy_call_us", bench.call_us(1), "us"
    bench.stage.table.bind(1, bench.stage.bindings[1])


def measure(rounds: int) -> list[Measurement]:
    """Run the rounds, after one that is not counted."""
    loaded = load()
    print(f"instruction set: {isa(loaded)}", file=sys.stderr)
    ops.define()
    bench = Bench(Stage.build(loaded, SHAPES["0.5b"]))
    ops.use(bench.stage.table)
    others = wrappers()
    values: dict[str, list[float]] = defaultdict(list)
    units: dict[str, str] = {}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, value, unit in one_round(bench, others):
                units[name] = unit
                if number:
                    values[name].append(value)
    return [summarize(f"kernels_{name}", found, units[name]) for name, found in values.items()]


def main() -> None:
    """Parse the command line, measure, print."""
    given = options.parser("kernels", __doc__, rounds=7).parse_args()
    rounds = 2 if given.quick else given.rounds
    torch.set_num_threads(given.threads)
    found = measure(rounds)
    print("\n".join(map(as_line, found)) if given.json else as_table(found), flush=True)
    if given.save:
        save("kernels", {"rounds": rounds, "threads": given.threads}, found)


if __name__ == "__main__":
    main()
