"""A linear layer that adds LoRA itself gives what the layer and LoRA after it give, to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.request import LoRARequest

from loraplex_server.vllm_plugin.cpu import bf16, bf16_layers, nf4, ops
from loraplex_server.vllm_plugin.cpu.kernels import (
    TOKENS,
    Binding,
    Geometry,
    KernelError,
    Piece,
    Table,
    packed_b_bytes,
)
from loraplex_server.vllm_plugin.cpu.kernels import pack_b as pack_b_into
from loraplex_server.vllm_plugin.cpu.layers import ModuleLora
from loraplex_server.vllm_plugin.cpu.panels import TAKE_LORA
from tests.vllm_plugin.native_model import worker_manager, write_models
from tests.vllm_plugin.nf4_cases import random_weight

pytestmark = pytest.mark.usefixtures("bf16_here")
CASES = 150
SLOTS = 4
DTYPE = torch.bfloat16
# Slices that begin at whole multiples of 64 columns, which go along with the layer, and some that do not.
WIDTHS = ((64,), (192, 64, 64), (896, 128, 128), (320, 320), (64, 40), (45,), (40, 64), (128, 65, 64))


@dataclass(frozen=True)
class Layer:
    """One kind of base layer: alone, and with the LoRA of module 0."""

    plain: Callable[[torch.Tensor], torch.Tensor]
    with_lora: Callable[[torch.Tensor], torch.Tensor]


def make_layer(kind: str, rng: np.random.Generator, ins: int, outs: int) -> Layer:
    bias = torch.from_numpy(rng.standard_normal(outs, dtype=np.float32)).to(DTYPE)
    given = bias if rng.random() < 0.5 else None
    if kind == "bf16":
        weight = torch.from_numpy(rng.standard_normal((outs, ins), dtype=np.float32)).to(DTYPE)
        taken: tuple[Any, ...] = (bf16.pack(weight), given, outs)
        names = ("bf16_linear", "bf16_linear_lora")
    else:
        packed = nf4.pack([random_weight(rng, outs, ins, 64)], int8=kind == "int8")
        taken = (packed.memory, given, packed.out_features, packed.group, packed.int8)
        names = ("nf4_linear", "nf4_linear_lora")
    plain, with_lora = (getattr(torch.ops.loraplex, name) for name in names)
    return Layer(lambda x: plain(x, *taken), lambda x: with_lora(x, *taken, 0))


def make_table(loaded: Any, rng: np.random.Generator, ins: int, outs: tuple[int, ...]) -> Table:
    """Return a table of one module, with an adapter in all slots but the last."""
    table = Table(loaded, [Geometry.side_by_side(ins, outs)], SLOTS, DTYPE)
    for slot in range(SLOTS - 1):
        pieces, keep = [], []
        for part, out in enumerate(outs):
            if rng.random() < 0.2:
                continue
            rank = int(rng.integers(1, 40))
            a = torch.from_numpy(rng.standard_normal((rank, ins), dtype=np.float32)).to(DTYPE)
            b = torch.from_numpy(rng.standard_normal((out, rank), dtype=np.float32)).to(DTYPE)
            packed = torch.empty(packed_b_bytes(out, rank, DTYPE), dtype=torch.uint8)
            pack_b_into(loaded, packed, b, 0.5)
            pieces.append(Piece(0, part, rank, a.data_ptr(), packed.data_ptr()))
            keep += [a, packed]
        table.bind(slot, Binding.of(pieces, keep))
    return table


@pytest.fixture
def in_use(loaded: Any) -> Any:
    """Make the operators work on a table; none afterwards."""
    bf16.load(), nf4.load(), ops.define()
    yield ops.use
    ops.use(None)


def separate(layer: Layer, table: Table, x: torch.Tensor) -> torch.Tensor:
    y = layer.plain(x)
    table.add(0, TOKENS, y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]))
    return y


def slots_of(rng: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return rows of the base and of three adapters: one after the other, in any order, or all of one."""
    slots = rng.integers(-1, SLOTS - 1, count)
    how = rng.random()
    return (np.sort(slots) if how < 0.4 else slots if how < 0.8 else np.full(count, 1)).astype(np.int32)


def kinds() -> list[str]:
    return ["bf16", "nf4", "int8"]


@pytest.mark.parametrize("kind", kinds())
def test_along_with_the_layer_or_after_it_is_the_same_to_the_bit(loaded, in_use, kind):
    if kind == "int8" and not nf4.supported(int8=True):
        pytest.skip("this processor has no AVX-512-VNNI")
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    along = 0
    for number in range(CASES):
        rng = np.random.default_rng([seed, number])
        outs = WIDTHS[int(rng.integers(len(WIDTHS)))]
        ins = 64 * int(rng.choice((1, 2, 3, 14, 20)))
        layer, table = make_layer(kind, rng, ins, sum(outs)), make_table(loaded, rng, ins, outs)
        in_use(table)
        count = int(rng.choice((1, 16, 17, 18, 33, 65, 200, 300))) if number % 30 else 1300
        slots = slots_of(rng, count)
        table.rows(TOKENS, slots)
        # More rows than announced are padding.
        x = torch.from_numpy(rng.standard_normal((count + number % 2, ins), dtype=np.float32)).to(DTYPE)
        y = layer.plain(x)
        along += table.beside(0, y, x)[0] is not None
        found, expected = layer.with_lora(x), separate(layer, table, x)
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), (seed, number)
        untouched = slots < 0
        assert torch.equal(found[:count][untouched], y[:count][untouched]), (seed, number)
    assert CASES // 5 < along < CASES, "both ways are to be gone"


def test_a_layer_over_rows_in_more_than_two_dimensions_takes_them_one_after_the_other(loaded, in_use):
    rng = np.random.default_rng(1)
    layer, table = make_layer("bf16", rng, 128, 128), make_table(loaded, rng, 128, (128,))
    in_use(table)
    table.rows(TOKENS, slots_of(rng, 40))
    x = torch.randn(2, 20, 128).to(DTYPE)
    assert torch.equal(layer.with_lora(x), layer.with_lora(x.view(40, 128)).view(2, 20, 128))


@pytest.fixture(scope="module")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's own layers, wrapped by the native manager, over a base on our kernels."""
    from vllm.model_executor.layers import utils

    stock = utils.dispatch_cpu_unquantized_gemm
    bf16_layers.install(utils)
    directory = tmp_path_factory.mktemp("bf16")
    write_models(directory)
    with worker_manager(directory, dtype="bfloat16") as manager:
        yield manager, directory
    utils.dispatch_cpu_unquantized_gemm = stock


def test_vllms_layers_over_our_kernels_add_lora_once(bf16_model, in_use):
    manager, directory = bf16_model
    in_use(manager._adapter_manager.table)
    names = {1: "four", 2: "sixteen"}
    rows = [1] * 70 + [0, 2, 1, 2]
    wanted = {LoRARequest(name, number, str(directory / name)) for number, name in names.items()}
    manager.set_active_adapters(wanted, LoRAMapping(tuple(rows), tuple(rows)))
    linear = 0
    for number, module in enumerate(manager._adapter_manager.modules.values()):
        if not isinstance(module, BaseLinearLayerWithLoRA):
            continue
        assert module.punica_wrapper.by_base
        linear += 1
        x = torch.randn(len(rows), module.input_size).to(DTYPE)
        packed, outs = module.base_layer.weight.data, sum(module.output_slices)
        expected = torch.ops.loraplex.bf16_linear(x, packed, module.base_layer.bias, outs)
        manager._adapter_manager.table.add(number, TOKENS, expected, x)
        assert torch.equal(module(x)[0], expected)
    assert linear > 1


@pytest.mark.parametrize("n_rows", [5, 90])
def test_the_number_of_threads_does_not_matter(loaded, in_use, n_rows):
    rng = np.random.default_rng(2)
    layer, table = make_layer("bf16", rng, 896, 1152), make_table(loaded, rng, 896, (896, 128, 128))
    in_use(table)
    table.rows(TOKENS, slots_of(rng, n_rows))
    x, threads = torch.randn(n_rows, 896).to(DTYPE), torch.get_num_threads()
    try:
        results = [(torch.set_num_threads(n), layer.with_lora(x))[1] for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_rows_result_is_the_same_whatever_rows_are_beside_it(loaded, in_use):
    rng = np.random.default_rng(3)
    layer, table = make_layer("bf16", rng, 896, 128), make_table(loaded, rng, 896, (128,))
    in_use(table)
    x, slots = torch.randn(700, 896).to(DTYPE), slots_of(rng, 700)
    table.rows(TOKENS, slots)
    together = layer.with_lora(x)
    for count in (1, 3, 16, 17, 40, 650):
        table.rows(TOKENS, slots[:count])
        assert torch.equal(layer.with_lora(x[:count]), together[:count]), count


def test_products_by_torch_have_lora_added_afterwards(loaded, in_use, monkeypatch):
    """The way of an NF4 base on processors with AMX, on this one."""
    monkeypatch.setattr(nf4, "_amx", lambda: True)
    rng = np.random.default_rng(4)
    layer, table = make_layer("nf4", rng, 128, 128), make_table(loaded, rng, 128, (128,))
    in_use(table)
    table.rows(TOKENS, slots_of(rng, 200))
    x = torch.randn(200, 128).to(DTYPE)
    assert torch.equal(layer.with_lora(x), separate(layer, table, x))


def test_rows_that_no_adapter_wants_need_no_table_of_their_size(loaded, in_use):
    rng = np.random.default_rng(5)
    layer, table = make_layer("bf16", rng, 64, 64), make_table(loaded, rng, 64, (64,))
    in_use(table)
    x = torch.randn(30, 64).to(DTYPE)
    assert torch.equal(layer.with_lora(x), layer.plain(x))
    table.rows(TOKENS, np.full(3, -1, dtype=np.int32))
    assert torch.equal(layer.with_lora(x), layer.plain(x))


@pytest.mark.parametrize("n_rows", [8, 40])
def test_rows_that_were_not_announced_or_do_not_fit_are_refused(loaded, in_use, n_rows):
    rng = np.random.default_rng(6)
    layer, table = make_layer("bf16", rng, 64, 64), make_table(loaded, rng, 128, (64,))
    in_use(table)
    table.rows(TOKENS, np.zeros(n_rows, dtype=np.int32))
    with pytest.raises(KernelError, match="do not fit"):
        layer.with_lora(torch.randn(n_rows, 64).to(DTYPE))
    wide = make_layer("bf16", rng, 128, 64)
    with pytest.raises(KernelError, match="announced"):
        wide.with_lora(torch.randn(n_rows - 1, 128).to(DTYPE))
    table.unbind(0)
    with pytest.raises(KernelError, match="no adapter"):
        wide.with_lora(torch.randn(n_rows, 128).to(DTYPE))


def test_in_a_compiled_graph_it_is_the_same_for_every_batch(loaded, in_use):
    rng = np.random.default_rng(7)
    layer, table = make_layer("bf16", rng, 64, 64), make_table(loaded, rng, 64, (64,))
    in_use(table)
    compiled = torch.compile(
        lambda x: layer.with_lora(x).relu(), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n_rows in (2, 20, 50):
        table.rows(TOKENS, slots_of(rng, n_rows))
        x = torch.randn(n_rows, 64).to(DTYPE)
        assert torch.equal(compiled(x), layer.with_lora(x).relu())


def test_the_operators_keep_to_their_schemas(loaded, in_use):
    rng = np.random.default_rng(8)
    table = make_table(loaded, rng, 64, (64,))
    in_use(table)
    table.rows(TOKENS, np.zeros(20, dtype=np.int32))
    x = torch.randn(20, 64).to(DTYPE)
    weight = bf16.pack(torch.randn(64, 64).to(DTYPE))
    torch.library.opcheck(torch.ops.loraplex.bf16_linear_lora.default, (x, weight, None, 64, 0))
    packed = nf4.pack([random_weight(rng, 64, 64, 64)])
    taken = (x, packed.memory, None, packed.out_features, packed.group, packed.int8, 0)
    torch.library.opcheck(torch.ops.loraplex.nf4_linear_lora.default, taken)


def test_what_the_base_adds_is_not_added_again(loaded, in_use):
    rng = np.random.default_rng(9)
    table = make_table(loaded, rng, 64, (64,))
    in_use(table)
    table.rows(TOKENS, np.zeros(20, dtype=np.int32))
    base, told = torch.nn.Module(), []
    setattr(base, TAKE_LORA, told.append)
    y, x = torch.zeros(20, 64).to(DTYPE), torch.ones(20, 64).to(DTYPE)
    ModuleLora(table, 0, base).add_lora_linear(y, x)
    assert told == [0]
    assert not y.any()
    ModuleLora(table, 0, torch.nn.Module()).add_lora_linear(y, x)
    assert y.any()
