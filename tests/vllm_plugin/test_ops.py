"""The operators: the same in eager mode and inside a compiled graph, once per place, in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraplex_server.vllm_plugin.cpu import ops
from loraplex_server.vllm_plugin.cpu.kernels import (
    SAMPLES,
    TOKENS,
    Binding,
    Geometry,
    KernelError,
    Piece,
    Table,
    pack_b,
    packed_b_bytes,
)

HIDDEN, OUT, RANK, VOCABULARY = 24, 40, 4, 9
DTYPE = torch.bfloat16


@pytest.fixture
def table(loaded):
    """Three modules, a linear one, logits and an embedding, with an adapter in slot 0; the operators use it."""
    torch.manual_seed(0)
    modules = [
        Geometry(HIDDEN, (0,), (OUT,)),
        Geometry(HIDDEN, (0,), (OUT,)),
        Geometry(VOCABULARY, (0,), (HIDDEN,)),
    ]
    pieces, keep = [], []
    for number, module in enumerate(modules):
        out = module.out_features[0]
        shape = (VOCABULARY, RANK) if number == 2 else (RANK, HIDDEN)
        a, packed = (
            torch.randn(*shape).to(DTYPE),
            torch.empty(packed_b_bytes(out, RANK, DTYPE), dtype=torch.uint8),
        )
        pack_b(loaded, packed, torch.randn(out, RANK).to(DTYPE))
        pieces.append(Piece(number, 0, RANK, a.data_ptr(), packed.data_ptr()))
        keep += [a, packed]
    made = Table(loaded, modules, 2, DTYPE)
    made.bind(0, Binding.of(pieces, keep))
    ops.define()
    ops.use(made)
    yield made
    ops.use(None)


def announce(table, slots):
    for kind in (TOKENS, SAMPLES):
        table.rows(kind, np.array(slots, dtype=np.int32))


class Model(torch.nn.Module):
    """Embedding, linear layer and logits as vLLM's LoRA layers do them: base result, then the operator on it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN, dtype=DTYPE)
        self.linear = torch.nn.Linear(HIDDEN, OUT, dtype=DTYPE)
        self.back = torch.nn.Linear(OUT, HIDDEN, dtype=DTYPE)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        torch.ops.loraplex.add_lora_embedding(x, ids, 2)
        x = torch.nn.functional.silu(x)
        y = self.linear(x)
        torch.ops.loraplex.add_lora(y, x, 0)
        z = self.back(torch.nn.functional.silu(y)) + x
        logits = self.linear(z)
        torch.ops.loraplex.add_lora_logits(logits, z, 1)
        return logits


def test_a_compiled_graph_gives_what_eager_gives_for_every_batch_and_calls_each_operator_once(table):
    """One fullgraph compilation with dynamic shapes; then other sizes, other mappings, and no adapter at all."""
    model = Model()
    code: list[str] = []
    from torch._inductor.utils import run_and_get_code

    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for number, slots in enumerate(([0, -1, 0], [0] * 5, [-1] * 7, [-1, 0])):
            announce(table, slots)
            ids = torch.arange(len(slots)) % VOCABULARY
            wanted = model(ids)
            if number:
                got = compiled(ids)
            else:
                got, code = run_and_get_code(compiled, ids)
            torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
            announce(table, [-1] * len(slots))
            assert torch.equal(wanted, model(ids)) == (max(slots) < 0)
    (text,) = code
    for name in ("add_lora.default(", "add_lora_logits.default(", "add_lora_embedding.default("):
        assert text.count(f"torch.ops.loraplex.{name}") == 1
    assert "copy_(" not in text, "an output is copied around an operator that changes it in place"
    assert "clone" not in text


def test_rows_of_more_dimensions_are_rows(table):
    announce(table, [0, -1, 0, 0])
    x, y = torch.randn(2, 2, HIDDEN).to(DTYPE), torch.zeros(2, 2, OUT, dtype=DTYPE)
    flat = torch.zeros(4, OUT, dtype=DTYPE)
    torch.ops.loraplex.add_lora(y, x, 0)
    torch.ops.loraplex.add_lora(flat, x.view(4, HIDDEN), 0)
    assert torch.equal(y.view(4, OUT), flat)
    assert flat.any(dim=1).tolist() == [True, False, True, True]


def test_without_a_table_the_operators_refuse(table):
    ops.use(None)
    with pytest.raises(KernelError, match="no table"):
        torch.ops.loraplex.add_lora(torch.zeros(1, OUT), torch.zeros(1, HIDDEN), 0)


def test_torch_finds_the_operators_well_formed(table):
    """Schema, fake tensors and tracing, by torch's own check."""
    announce(table, [0, -1])
    x, y = torch.randn(2, HIDDEN).to(DTYPE), torch.zeros(2, OUT, dtype=DTYPE)
    for name in ("add_lora", "add_lora_logits"):
        torch.library.opcheck(getattr(torch.ops.loraplex, name).default, (y, x, 0))
    z = torch.zeros(2, HIDDEN, dtype=DTYPE)
    torch.library.opcheck(torch.ops.loraplex.add_lora_embedding.default, (z, torch.tensor([1, 2]), 2))
