"""Random batches for the LoRA kernels, a plain float64 reference, and the error bound it is held to.

**The bound.** Let u be the unit roundoff of the weights' type (2**-8 for bf16, 2**-24 for fp32), v = 2**-24 that of
the fp32 sums, and g(n) = n v / (1 - n v), which bounds the relative error of a sum of n products in any order
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1; products of two bf16 values are exact in
fp32, in fp32 each product and sum is one fused step). Then, element by element, with absolute values in every product:

    t  = A x            |error of t|  <= ((1 + g(K)) (1 + u) - 1) |A| |x|         K = in_features; t is rounded once
    B' = s B            |error of B'| <= u |s B|                                  packed with its scale; 0 if s = 1
    y' = y + B' t       |error of y'| <= low * S + high * |y| + 2**-100           S = |s| |B| |A| |x|
         low  = (1 + g(K)) (1 + u) (1 + u_s) (1 + g(R + 1)) (1 + u) - 1           R = rank; u_s = u, or 0 if s = 1
         high = (1 + g(R + 1)) (1 + u) - 1                                        y' is rounded once

For bf16 that is about 3 u S + u |y|; for an embedding t is a stored row and (1 + g(K)) (1 + u) is 1. The last term is
for numbers below 2**-126, which the processor's bf16 products take for zero; inputs here are below 2**10.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from loraplex_server.vllm_plugin.cpu.kernels import (
    SAMPLES,
    TOKENS,
    Binding,
    Geometry,
    Piece,
    Table,
    isa,
    pack_b,
    packed_b_bytes,
)

UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
ISAS = ("avx512bf16", "avx512", "avx2", "generic")
MARGIN = 7  # values around y that nobody may touch
SLOTS = 6


@contextmanager
def instruction_set(loaded: ctypes.CDLL, name: str) -> Iterator[bool]:
    """Make tables made inside use `name`; yields whether this machine has it."""
    before = os.environ.get("LORAPLEX_CPU_ISA")
    os.environ["LORAPLEX_CPU_ISA"] = name
    try:
        yield isa(loaded) == name
    finally:
        if before is None:
            del os.environ["LORAPLEX_CPU_ISA"]
        else:
            os.environ["LORAPLEX_CPU_ISA"] = before


def relative_bounds(dtype: torch.dtype, features: int, rank: int, *, scaled: bool) -> tuple[float, float]:
    """Return `low` and `high` of the bound; `features` 0 for an embedding."""
    u, v = UNIT[dtype], 2.0**-24

    def sums(n: int) -> float:
        return 1 + n * v / (1 - n * v)

    shrunk = sums(features) * (1 + u) if features else 1.0
    high = sums(rank + 1) * (1 + u)
    return shrunk * (1 + u * scaled) * high - 1, high - 1


@dataclass(frozen=True)
class Adapter:
    """Weights of one slot: (module, slice) -> A, B and the scale packed into B."""

    weights: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, float]]


class World:
    """A table and what should be in its slots; every `check_*` is one case. The last module is an embedding."""

    def __init__(
        self, rng: np.random.Generator, loaded: ctypes.CDLL, dtype: torch.dtype, many_from: int | None = None
    ) -> None:
        self.rng, self.loaded, self.dtype = rng, loaded, dtype
        self.modules = [self._geometry() for _ in range(int(rng.integers(1, 4)))] + [self._geometry()]
        self.table = Table(loaded, self.modules, SLOTS, dtype, many_from)
        self.slots: dict[int, Adapter] = {}
        for slot in range(SLOTS - 1):
            self.bind(slot)

    def _geometry(self) -> Geometry:
        """One module with one to three slices, sometimes with columns between them that belong to none."""
        rng = self.rng
        columns, outs, at = [], [], 0
        for _ in range(int(rng.choice((1, 1, 2, 3)))):
            at += int(rng.choice((0, 0, 0, 5)))
            columns.append(at)
            outs.append(int(rng.choice((1, 16, 63, 64, 65, 128, 200))))
            at += outs[-1]
        return Geometry(int(rng.choice((1, 2, 31, 32, 33, 64, 130, 257))), tuple(columns), tuple(outs))

    @property
    def embedding(self) -> int:
        """The module number of the embedding."""
        return len(self.modules) - 1

    def bind(self, slot: int) -> None:
        """Put a new adapter into a slot: mixed ranks, some slices untouched, some scaled."""
        weights, pieces, keep = {}, [], []
        for number, module in enumerate(self.modules):
            for part, out in enumerate(module.out_features):
                if self.rng.random() < 0.25:
                    continue
                rank = (
                    int(self.rng.integers(1, 65))
                    if self.rng.random() < 0.97
                    else int(self.rng.integers(65, 513))
                )
                wide = (rank, module.in_features) if number != self.embedding else (module.in_features, rank)
                a = self.random(*wide) / module.in_features**0.5
                a, b = a.to(self.dtype), (self.random(out, rank) / rank**0.5).to(self.dtype)
                scale = float(self.rng.choice((1.0, 0.5, 2.0, 1.7)))
                packed = torch.empty(packed_b_bytes(out, rank, self.dtype), dtype=torch.uint8)
                pack_b(self.loaded, packed, b, scale)
                weights[number, part] = (a, b, scale)
                pieces.append(Piece(number, part, rank, a.data_ptr(), packed.data_ptr()))
                keep += [a, packed]
        self.table.bind(slot, Binding.of(pieces, keep))
        self.slots[slot] = Adapter(weights)

    def churn(self) -> None:
        """Bind, rebind or empty a slot, as between two steps."""
        slot = int(self.rng.integers(SLOTS))
        if self.rng.random() < 0.3 and len(self.slots) > 1:
            self.table.unbind(slot)
            self.slots.pop(slot, None)
        else:
            self.bind(slot)

    def random(self, *shape: int) -> torch.Tensor:
        """Standard normal values, float64."""
        return torch.from_numpy(self.rng.standard_normal(shape))

    def batch(self) -> np.ndarray:
        """Slot per row: decode, prefill, both, all alike; base rows among them, most slots without a row."""
        rng, bound = self.rng, list(self.slots)
        used = rng.choice(bound, size=rng.integers(1, len(bound) + 1), replace=False)
        choices = np.append(used, -1)
        kind = rng.integers(5)
        if kind == 0:
            rows = rng.choice(choices, size=rng.integers(1, 33))
        elif kind == 1:
            rows = np.repeat(rng.choice(choices, size=rng.integers(1, 4)), rng.integers(1, 70))
        elif kind == 2:
            runs = [np.repeat(rng.choice(choices), rng.integers(1, 90)) for _ in range(rng.integers(1, 3))]
            rows = np.concatenate([rng.choice(choices, size=rng.integers(0, 17)), *runs])
        elif kind == 3:
            rows = np.full(rng.integers(1, 20), rng.choice(choices))
        else:
            rows = np.full(rng.integers(1, 20), -1)
        return rows.astype(np.int32)

    def check(self) -> float:
        """One random batch over every module; returns the largest error in units of the bound."""
        kind = int(self.rng.choice((TOKENS, TOKENS, SAMPLES)))
        slots = self.batch()
        self.table.rows(kind, slots)
        worst = max(self._check_linear(number, kind, slots) for number in range(self.embedding))
        if kind == TOKENS:
            worst = max(worst, self._check_embedding(slots))
        return worst

    def _check_linear(self, number: int, kind: int, slots: np.ndarray) -> float:
        module = self.modules[number]
        x = self._strided(len(slots), module.in_features, int(self.rng.choice((0, 0, 3))))[1]
        storage, y = self._strided(len(slots), module.width, MARGIN)
        before = storage.clone()
        self.table.add(number, kind, y, x)
        delta, magnitude = self._delta(number, slots, x.double())
        return self._judge(number, slots, storage, before, delta, magnitude, embedding=False)

    def _check_embedding(self, slots: np.ndarray) -> float:
        number = self.embedding
        module = self.modules[number]
        ids = torch.from_numpy(self.rng.integers(0, module.in_features, size=len(slots)))
        ids[torch.from_numpy(slots < 0)] = -5  # nobody may look
        storage, y = self._strided(len(slots), module.width, MARGIN)
        before = storage.clone()
        self.table.add_embedding(number, y, ids)
        delta, magnitude = self._delta(number, slots, None, ids)
        return self._judge(number, slots, storage, before, delta, magnitude, embedding=True)

    def _strided(self, rows: int, width: int, margin: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random values, and a view of them with `margin` more values per row and before the first."""
        storage = self.random(rows + 2, width + margin).to(self.dtype)
        return storage, storage[1:-1, margin // 2 : margin // 2 + width]

    def _delta(
        self, number: int, slots: np.ndarray, x: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is to be added, and S of the bound times `low`, both float64."""
        module = self.modules[number]
        delta = torch.zeros(len(slots), module.width, dtype=torch.float64)
        bound = delta.clone()
        for slot in set(slots.tolist()) - {-1}:
            rows = torch.from_numpy(np.flatnonzero(slots == slot))
            for (own, part), (a, b, scale) in self.slots[slot].weights.items():
                if own != number:
                    continue
                a, b = a.double(), b.double() * scale
                low = a[ids[rows]] if x is None else x[rows] @ a.T
                large = low.abs() if x is None else x[rows].abs() @ a.abs().T
                features = 0 if x is None else module.in_features
                part_low, _ = relative_bounds(self.dtype, features, b.shape[1], scaled=scale != 1)
                columns = slice(module.columns[part], module.columns[part] + module.out_features[part])
                delta[rows, columns] = low @ b.T
                bound[rows, columns] = large @ b.abs().T * part_low
        return delta, bound

    def _judge(self, number, slots, storage, before, delta, bound, *, embedding: bool) -> float:
        """The largest error in units of the bound; everything outside the adapters' own places is bit for bit."""
        y, old = (
            one[1:-1, MARGIN // 2 : MARGIN // 2 + self.modules[number].width] for one in (storage, before)
        )
        untouched = bound == 0
        assert torch.equal(y[untouched], old[untouched]), "a value was written that no adapter wants changed"
        outside = torch.ones_like(storage, dtype=torch.bool)
        outside[1:-1, MARGIN // 2 : MARGIN // 2 + self.modules[number].width] = False
        assert torch.equal(storage[outside], before[outside]), "the memory around y was written"
        rank = max(
            (a.shape[1 if embedding else 0] for _, _, (a, _, _) in self._used(number, slots)), default=0
        )
        _, high = relative_bounds(self.dtype, 1, rank, scaled=False)
        allowed = bound + high * old.double().abs() + 2.0**-100
        return (
            float(((y.double() - (old.double() + delta)).abs() / allowed)[~untouched].amax())
            if bound.any()
            else 0.0
        )

    def _used(self, number, slots):
        for slot in set(slots.tolist()) - {-1}:
            for (own, part), weights in self.slots[slot].weights.items():
                if own == number:
                    yield slot, part, weights


def wide_world(rng: np.random.Generator, loaded: ctypes.CDLL, dtype: torch.dtype) -> World:
    """A world whose calls are large enough to be shared among threads."""
    world = World.__new__(World)
    world.rng, world.loaded, world.dtype = rng, loaded, dtype
    world.modules = [Geometry.side_by_side(896, (896, 128, 128)), Geometry.side_by_side(300, (700, 700))]
    world.modules.append(Geometry.side_by_side(50, (64,)))
    world.table = Table(loaded, world.modules, SLOTS, dtype)
    world.slots = {}
    for slot in range(SLOTS - 1):
        world.bind(slot)
    return world


def run_cases(
    loaded: ctypes.CDLL, dtype: torch.dtype, name: str, seed: int, cases: int, per_world: int = 10
) -> float:
    """Run `cases` batches with one instruction set; returns the largest error in units of the bound."""
    rng = np.random.default_rng([seed, ISAS.index(name), list(UNIT).index(dtype)])
    worst, done = 0.0, 0
    with instruction_set(loaded, name) as here:
        assert here, f"this machine has no {name}"
        while done < cases:
            world = wide_world(rng, loaded, dtype) if done % 100 == 0 else World(rng, loaded, dtype)
            for _ in range(min(per_world, cases - done)):
                worst = max(worst, world.check())
                world.churn()
                done += 1
            world.table.close()
    return worst
