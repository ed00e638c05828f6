"""The LoRA kernels (`lora.cpp`) as typed Python: a library, tables of slots, and packed weights.

    library = load()                                    # builds at first use; BuildError where it cannot
    table = Table(library, modules, n_slots, dtype)     # modules: where each one's slices lie in y
    table.bind(slot, Binding.of(pieces, keep=memory))   # pointers only: about 10 us for a whole adapter
    table.rows(TOKENS, slots_of_rows)                   # once per step; -1 is the base model
    table.add(module, TOKENS, y, x)                     # per module: y[row] += B (A x[row])

Weights: A is (rank, in_features), of an embedding (vocabulary, rank); B is packed by `pack_b` with the adapter's
scale in it. Both have the table's type, bf16 or fp32. Nothing is copied: a `Binding` holds what keeps the memory
alive, and the table holds the bindings of its slots.

Sums are accumulated in fp32; the low-rank value is rounded to the table's type once, y once per slice. Every index
and size is checked before memory is touched and raises `KernelError`; what cannot be checked is that a pointer of a
`Piece` points to as much memory as its rank and the module's geometry say. A table belongs to one thread at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_server.vllm_plugin.cpu import build, many_rows
from loraplex_server.vllm_plugin.cpu.build import FLOAT, INT, LONG, POINTER, Signature

TOKENS: Final = 0  # rows are the tokens of the step
SAMPLES: Final = 1  # rows are the positions whose logits are computed
_REST: Final = 2  # tokens but for those of groups that `many_rows` serves
_LEFT: Final = 3  # tokens that `Table.beside` left
TYPES: Final = {torch.bfloat16: 0, torch.float32: 1}
SOURCES: Final = tuple(
    Path(__file__).with_name(name)
    for name in ("lora.cpp", "lora_plan.h", "lora_table.h", "lora_isa.h", "lora_kernels.inc", "beside.h")
)

_MESSAGES: Final = {
    -1: "a null pointer, a size that cannot be, or geometry changed while adapters are bound",
    -2: "no such module",
    -3: "no such slot",
    -4: "a row wants a slot in which there is no adapter",
    -5: "the rows are not those announced for this step",
    -6: "the type is not that of the table",
    -7: "no such slice",
    -8: "the rank is out of range",
    -9: "rows of x or y are shorter than the module's",
    -10: "out of memory",
    -11: "an id outside the vocabulary",
}
_SIGNATURES: Final[Mapping[str, Signature]] = {
    "lp_isa": (ctypes.c_char_p, ()),
    "lp_table_new": (POINTER, (INT, INT, INT)),
    "lp_table_free": (None, (POINTER,)),
    "lp_module": (INT, (POINTER, INT, INT, LONG, POINTER, POINTER)),
    "lp_bind": (INT, (POINTER, INT, INT, POINTER, POINTER, POINTER, POINTER, POINTER)),
    "lp_unbind": (INT, (POINTER, INT)),
    "lp_rows": (INT, (POINTER, INT, POINTER, LONG)),
    "lp_add": (INT, (POINTER, INT, INT, POINTER, LONG, POINTER, LONG, LONG, INT)),
    "lp_any_beside": (INT, (POINTER,)),
    "lp_add_beside": (INT, (POINTER, INT, POINTER, LONG, POINTER, LONG, LONG, INT, POINTER, POINTER)),
    "lp_add_embedding": (INT, (POINTER, INT, POINTER, LONG, POINTER, LONG, INT)),
    "lp_packed_b_bytes": (LONG, (LONG, LONG, INT)),
    "lp_pack_b": (INT, (POINTER, POINTER, LONG, LONG, LONG, FLOAT, INT)),
}


class KernelError(ValueError):
    """A kernel refused its arguments; nothing was written."""


def load() -> ctypes.CDLL:
    """Build the kernels if need be and load them.

    Raises:
        BuildError: there is no compiler, or it failed.

    """
    return build.load(SOURCES, _SIGNATURES)


def isa(loaded: ctypes.CDLL) -> str:
    """Return the instruction set in use: avx512bf16, avx512, avx2 or generic."""
    return str(loaded.lp_isa().decode())


@dataclass(frozen=True)
class Geometry:
    """One wrapped module: slice s adds to columns `columns[s]` .. `columns[s] + out_features[s]` of y."""

    in_features: int  # of an embedding: its vocabulary
    columns: tuple[int, ...]  # ascending, not overlapping
    out_features: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns that y must have."""
        return self.columns[-1] + self.out_features[-1]

    @staticmethod
    def side_by_side(in_features: int, out_features: Sequence[int]) -> Geometry:
        """Return the geometry of packed projections that lie one behind the other."""
        ends = np.cumsum([0, *out_features])
        return Geometry(in_features, tuple(map(int, ends[:-1])), tuple(out_features))


@dataclass(frozen=True)
class Piece:
    """An adapter's weights for one slice of one module, as addresses."""

    module: int
    slice: int
    rank: int
    a: int
    b: int


@dataclass(frozen=True, eq=False)
class Binding:
    """A whole adapter, ready to be put into a slot by one call; made off the step."""

    module: NDArray[np.int32]
    slice: NDArray[np.int32]
    rank: NDArray[np.int32]
    a: NDArray[np.uint64]
    b: NDArray[np.uint64]
    keep: Any  # owns the memory that a and b point into

    @staticmethod
    def of(pieces: Iterable[Piece], keep: Any) -> Binding:
        """Lay out `pieces` for the kernels; `keep` owns their memory."""
        rows = list(pieces)
        return Binding(
            module=np.array([one.module for one in rows], dtype=np.int32),
            slice=np.array([one.slice for one in rows], dtype=np.int32),
            rank=np.array([one.rank for one in rows], dtype=np.int32),
            a=np.array([one.a for one in rows], dtype=np.uint64),
            b=np.array([one.b for one in rows], dtype=np.uint64),
            keep=keep,
        )


class Table:
    """Slots of adapters for the modules of one model. See the module's promise."""

    def __init__(
        self,
        loaded: ctypes.CDLL,
        modules: Sequence[Geometry],
        n_slots: int,
        dtype: torch.dtype,
        many_from: int | None = None,
    ) -> None:
        """Make a table with empty slots.

        Args:
            loaded: the kernels.
            modules: the wrapped modules; their place is their number.
            n_slots: how many adapters one batch may have.
            dtype: of weights and activations.
            many_from: rows of one adapter from which torch's products serve them (`many_rows`); 0 for never, None
                for what suits this processor.

        Raises:
            KernelError: a type without kernels, sizes out of range.

        """
        if dtype not in TYPES:
            raise KernelError(f"weights of {dtype} have no kernels")
        self.modules = tuple(modules)
        self.n_slots = n_slots
        self.dtype = dtype
        self._type = TYPES[dtype]
        self._library = loaded
        self._table = loaded.lp_table_new(len(self.modules), n_slots, self._type)
        if not self._table:
            raise KernelError(f"no table for {len(self.modules)} modules and {n_slots} slots")
        self._bound: dict[int, Binding] = {}
        self._many_from = many_rows.MANY_ROWS * many_rows.useful(dtype) if many_from is None else many_from
        self._many: list[many_rows.Group] = []
        self._n_tokens = 0
        self._along = False  # some rows of the step would go along with a linear layer
        self._beside, self._left = ctypes.c_void_p(), ctypes.c_int()
        self._beside_at, self._left_at = ctypes.byref(self._beside), ctypes.byref(self._left)
        self.idle = [True, True]  # per kind: no row wants an adapter
        for number, module in enumerate(self.modules):
            self._describe(number, module)

    def _describe(self, number: int, module: Geometry) -> None:
        columns = np.array(module.columns, dtype=np.int64)
        outs = np.array(module.out_features, dtype=np.int64)
        if columns.shape != outs.shape:
            raise KernelError(f"module {number}: {len(columns)} columns, {len(outs)} widths")
        _check(
            self._library.lp_module(
                self._table, number, len(outs), module.in_features, columns.ctypes.data, outs.ctypes.data
            )
        )

    def bind(self, slot: int, binding: Binding) -> None:
        """Put an adapter into `slot`, in place of what is there.

        Raises:
            KernelError: a module, slice or rank out of range; the slot stays as it was.

        """
        b = binding
        _check(
            self._library.lp_bind(
                self._table, slot, len(b.module), b.module.ctypes.data, b.slice.ctypes.data, b.rank.ctypes.data,
                b.a.ctypes.data, b.b.ctypes.data,
            )
        )  # fmt: skip
        self._bound[slot] = binding

    def unbind(self, slot: int) -> None:
        """Empty `slot`; its adapter's memory is let go."""
        _check(self._library.lp_unbind(self._table, slot))
        self._bound.pop(slot, None)

    def rows(self, kind: int, slots: NDArray[np.int32]) -> None:
        """Announce the slot of each row (-1: base model) for the coming calls of `kind`.

        Raises:
            KernelError: a slot out of range or empty; the kind then has no rows.

        """
        slots = np.ascontiguousarray(slots, dtype=np.int32)
        self.idle[kind] = True
        _check(self._library.lp_rows(self._table, kind, slots.ctypes.data, len(slots)))
        if kind == TOKENS:
            self._along = bool(self._library.lp_any_beside(self._table))
        if kind == TOKENS and self._many_from:
            self._n_tokens = len(slots)
            rest, self._many = many_rows.split(slots, self._many_from)
            _check(self._library.lp_rows(self._table, _REST, rest.ctypes.data, len(rest)))
        self.idle[kind] = not bool((slots >= 0).any())

    def add(self, module: int, kind: int, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add each row's update to `y` (rows, at least the module's width), given `x` (rows, in_features).

        Both have the table's type and unit stride along a row. Of tokens there may be more rows than announced
        (left alone); of samples any number where all announced rows want one adapter, else exactly as many.

        Raises:
            KernelError: shapes or types that do not fit; y is unchanged.

        """
        if kind != _LEFT and self.idle[kind]:
            return
        rows = self._fitting(module, y, x)
        if self._many and kind == TOKENS:
            self._add_many(module, y, x)
            kind = _REST
        error = self._library.lp_add(self._table, module, kind, *rows)
        if error:
            _check(error)

    def beside(self, module: int, y: torch.Tensor, x: torch.Tensor) -> tuple[int | None, int | None]:
        """Have the linear layer that is about to write `y` add each token's update to it, as `add` would afterwards.

        Returns:
            What the layer's kernel is to be given, valid until the next call here, None for nothing; and the kind to
            call `add` with for what is better added afterwards, None for nothing. A layer that cannot be given
            anything is right with `add` for TOKENS.

        Raises:
            KernelError: as of `add`.

        """
        if self.idle[TOKENS]:
            return None, None
        if self._many or not self._along:
            return None, TOKENS
        error = self._library.lp_add_beside(
            self._table, module, *self._fitting(module, y, x), self._beside_at, self._left_at
        )
        if error:
            _check(error)
        beside = self._beside.value
        return beside, (TOKENS if beside is None else _LEFT) if self._left.value else None

    def _fitting(self, module: int, y: torch.Tensor, x: torch.Tensor) -> tuple[int, ...]:
        """Return where y and x lie, as the kernels are told."""
        geometry = self.modules[module]
        n_rows, width = y.shape
        if x.shape != (n_rows, geometry.in_features) or width < geometry.width:
            raise KernelError(
                f"module {module}: x {tuple(x.shape)}, y {tuple(y.shape)} do not fit {geometry}"
            )
        (y_stride, y_unit), (x_stride, x_unit) = y.stride(), x.stride()
        if x.dtype != self.dtype or y.dtype != self.dtype or x_unit != 1 or y_unit != 1:
            raise KernelError(f"module {module}: x and y must be {self.dtype} with unit stride along a row")
        return y.data_ptr(), y_stride, x.data_ptr(), x_stride, n_rows, self._type

    def _add_many(self, module: int, y: torch.Tensor, x: torch.Tensor) -> None:
        """Serve the groups of many rows by torch's products."""
        if len(y) < self._n_tokens or any(slot not in self._bound for slot, _ in self._many):
            _check(-5 if len(y) < self._n_tokens else -4)
        geometry = self.modules[module]
        for slot, rows in self._many:
            bound = self._bound[slot]
            for place in np.flatnonzero((bound.module == module) & (bound.rank > 0)):
                part, rank = int(bound.slice[place]), int(bound.rank[place])
                out, column = geometry.out_features[part], geometry.columns[part]
                a = many_rows.at(int(bound.a[place]), rank * geometry.in_features, self.dtype)
                b = many_rows.at(int(bound.b[place]), (rank + rank % 2) * out, self.dtype)
                many_rows.add(
                    y[:, column : column + out],
                    x,
                    rows,
                    a.view(rank, geometry.in_features),
                    many_rows.unpacked_b(b, out, rank),
                )

    def add_embedding(self, module: int, y: torch.Tensor, ids: torch.Tensor) -> None:
        """Add each row's update to the embeddings `y` (rows, at least the width) of `ids` (rows,), int64.

        Raises:
            KernelError: shapes, types or ids that do not fit; y is unchanged.

        """
        if self.idle[TOKENS]:
            return
        geometry = self.modules[module]
        if ids.shape != y.shape[:1] or y.dim() != 2 or y.shape[1] < geometry.width:
            raise KernelError(
                f"module {module}: ids {tuple(ids.shape)}, y {tuple(y.shape)} do not fit {geometry}"
            )
        if y.dtype != self.dtype or y.stride(1) != 1:
            raise KernelError(f"module {module}: y must be {self.dtype} with unit stride along a row")
        ids = ids.to(torch.int64).contiguous()
        _check(
            self._library.lp_add_embedding(
                self._table, module, y.data_ptr(), y.stride(0), ids.data_ptr(), len(ids), self._type
            )
        )

    def close(self) -> None:
        """Let go of the table and of every adapter's memory; the table cannot be used any more."""
        table, self._table = self._table, None
        self._library.lp_table_free(table)
        self._bound.clear()
        self.idle = [True, True]

    def __del__(self) -> None:
        if getattr(self, "_table", None):
            self.close()


def packed_b_bytes(out_features: int, rank: int, dtype: torch.dtype) -> int:
    """Return the size of B (out_features, rank) when packed: the rank is rounded up to even in bf16."""
    words = (rank + 1) // 2 if dtype == torch.bfloat16 else rank
    return words * out_features * 4


def pack_b(loaded: ctypes.CDLL, target: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
    """Scale B (out_features, rank) and write it in the kernels' order into `target`.

    Args:
        loaded: the kernels.
        target: contiguous memory of `packed_b_bytes` bytes, of any type.
        b: bf16 or fp32 with unit stride along the rank; scaled in fp32 and rounded to its own type once.
        scale: the adapter's factor, alpha / rank as a rule.

    Raises:
        KernelError: sizes or types that do not fit.

    """
    if b.dtype not in TYPES or b.dim() != 2 or b.stride(1) != 1:
        raise KernelError(f"B must be bf16 or fp32 with unit stride, not {b.dtype}, {tuple(b.shape)}")
    out_features, rank = b.shape
    wanted = packed_b_bytes(out_features, rank, b.dtype)
    if not target.is_contiguous() or target.numel() * target.element_size() != wanted:
        raise KernelError(f"packed B takes {wanted} contiguous bytes")
    _check(
        loaded.lp_pack_b(
            target.data_ptr(), b.data_ptr(), out_features, rank, b.stride(0), scale, TYPES[b.dtype]
        )
    )


def _check(error: int) -> None:
    if error:
        raise KernelError(_MESSAGES.get(error, f"error {error}"))
