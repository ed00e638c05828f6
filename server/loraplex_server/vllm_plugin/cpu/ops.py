"""The kernels as operators of torch, which torch.compile keeps in its graph without looking into them.

    loraplex::add_lora(Tensor(a!) y, Tensor x, int module) -> ()
    loraplex::add_lora_logits(Tensor(a!) y, Tensor x, int module) -> ()
    loraplex::add_lora_embedding(Tensor(a!) y, Tensor ids, int module) -> ()

    with_lora(module, y, x, linear)         # for the operators of linear layers that are given LoRA along

`define()` makes them, once per process. They work on the table given to `use()`, one per process as vLLM has one
model per worker, and on the rows last announced to that table: so a compiled graph is right for every batch. With no
adapter in the batch they return at once. x and y may have more than two dimensions, as long as their rows lie evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from loraplex_server.vllm_plugin.cpu.kernels import SAMPLES, TOKENS, KernelError, Table

NAMESPACE: Final = "loraplex"
_LIBRARY: list[
    torch.library.Library
] = []  # kept for the life of the process: an operator goes with its library
_TABLE: list[Table] = []  # the one in use


def use(table: Table | None) -> None:
    """Make the operators work on `table`; None: they raise."""
    _TABLE[:] = [] if table is None else [table]


def table_in_use() -> Table:
    """Return the table that the operators work on.

    Raises:
        KernelError: none was given.

    """
    if not _TABLE:
        raise KernelError("no table is in use: the LoRA operators have nothing to work on")
    return _TABLE[0]


def define() -> None:
    """Make the operators; calling it again is harmless."""
    if _LIBRARY:
        return
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, body in (
        ("add_lora(Tensor(a!) y, Tensor x, int module) -> ()", _add_lora),
        ("add_lora_logits(Tensor(a!) y, Tensor x, int module) -> ()", _add_lora_logits),
        ("add_lora_embedding(Tensor(a!) y, Tensor ids, int module) -> ()", _add_lora_embedding),
    ):
        library.define(name)
        short = name.partition("(")[0]
        library.impl(short, body, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{short}", _nothing, lib=library)
    _LIBRARY.append(library)


def _nothing(_y: torch.Tensor, _x: torch.Tensor, _module: int) -> None:
    """What the operators return, for tracing: nothing, and no new tensor."""


def with_lora(
    module: int,
    y: torch.Tensor,
    x: torch.Tensor,
    linear: Callable[[int | None], None],
    *,
    kernels: bool = True,
) -> None:
    """Compute a linear layer and add what the rows' adapters add to it.

    Args:
        module: the layer's number in the table in use.
        y: (rows, outputs), which `linear` writes.
        x: (rows, inputs).
        linear: computes the layer, given what its kernel is to have go along (`Table.beside`).
        kernels: whether it has a kernel that can have something go along.

    """
    table = table_in_use()
    beside, left = table.beside(module, y, x) if kernels else (None, TOKENS)
    linear(beside)
    if left is not None:
        table.add(module, left, y, x)


def _add_lora(y: torch.Tensor, x: torch.Tensor, module: int) -> None:
    table = table_in_use()
    if not table.idle[TOKENS]:
        table.add(module, TOKENS, _flat(y), _flat(x))


def _add_lora_logits(y: torch.Tensor, x: torch.Tensor, module: int) -> None:
    table = table_in_use()
    if not table.idle[SAMPLES]:
        table.add(module, SAMPLES, _flat(y), _flat(x))


def _add_lora_embedding(y: torch.Tensor, ids: torch.Tensor, module: int) -> None:
    table = table_in_use()
    if not table.idle[TOKENS]:
        table.add_embedding(module, _flat(y), ids.reshape(-1))


def _flat(rows: torch.Tensor) -> torch.Tensor:
    """View as (rows, features); a view that would be a copy is an error, as y must be changed in place."""
    return rows if rows.dim() == 2 else rows.view(-1, rows.shape[-1])
