"""The native manager on vLLM's own layers: right for every row; nothing copied, evicted or left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

from loraplex_server.vllm_plugin.cpu import ops
from loraplex_server.vllm_plugin.cpu.blocks import EMPTY, STAGED
from loraplex_server.vllm_plugin.cpu.hooks import BoundRequest
from loraplex_server.vllm_plugin.cpu.layers import ModuleLora, NativeEmbedding
from tests.vllm_plugin.native_model import ADAPTERS, SLOTS, worker_manager, write_models

NAMES = list(ADAPTERS)
ROWS: list[int] = [
    0,
    4,
    1,
    0,
    4,
    2,
    1,
    4,
]  # adapter ids per token, 0 is the base; ids are places in NAMES, from 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("native")
    write_models(directory)
    return directory


@pytest.fixture(scope="module")
def wrapped(directory):
    with worker_manager(directory) as manager:
        yield manager


@pytest.fixture
def manager(wrapped):
    """The manager, empty; the model is wrapped once for all tests."""
    ops.use(wrapped._adapter_manager.table)
    wrapped.booked = True
    yield wrapped
    for number in wrapped.list_adapters():
        wrapped.remove_adapter(number)


def request(directory: Path, number: int) -> LoRARequest:
    name = NAMES[number - 1]
    return LoRARequest(name, number, str(directory / name))


def step(manager, directory: Path, rows: list[int]) -> None:
    """What vLLM's model runner does before the model runs."""
    wanted = {request(directory, number) for number in rows if number}
    manager.set_active_adapters(wanted, LoRAMapping(tuple(rows), tuple(rows)))


def expected_delta(directory: Path, number: int, parts: list[str], x: torch.Tensor) -> torch.Tensor:
    """The delta of one row, from the adapter's file alone; 0 where it does not touch a part."""
    rank = ADAPTERS[NAMES[number - 1]][0]
    tensors = load_file(directory / NAMES[number - 1] / "adapter_model.safetensors")
    deltas = []
    for part, out in parts:
        a = tensors.get(f"base_model.model.{part}.lora_A.weight")
        b = tensors.get(f"base_model.model.{part}.lora_B.weight")
        scale = 2 * rank / rank
        deltas.append(
            torch.zeros(out) if a is None else scale * (x.double() @ a.double().t() @ b.double().t()).float()
        )
    return torch.cat(deltas)


def module_and_parts(manager, suffix: str):
    names = [name for name in manager._adapter_manager.modules if name.endswith(suffix)]
    module = manager._adapter_manager.modules[names[1]]
    layer = manager._adapter_manager.layers[list(manager._adapter_manager.modules).index(names[1])]
    return module, list(zip(layer.names, layer.out_features, strict=True))


@pytest.mark.parametrize("suffix", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
def test_every_row_of_a_layer_gets_its_own_adapters_delta_and_base_rows_none(manager, directory, suffix):
    module, parts = module_and_parts(manager, suffix)
    x = torch.randn(len(ROWS), module.input_size, generator=torch.Generator().manual_seed(1))
    base = module.base_layer(x)[0]
    step(manager, directory, ROWS)
    found = module(x)[0]
    for row, number in enumerate(ROWS):
        wanted = base[row] + (expected_delta(directory, number, parts, x[row]) if number else 0)
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-4)
        assert number or torch.equal(found[row], base[row])


def test_embeddings_and_logits_of_the_adapter_that_has_them_are_right_and_of_the_others_untouched(
    manager, directory
):
    tensors = load_file(directory / "sixteen" / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    model = manager._adapter_manager.model
    ids = torch.arange(7, 7 + len(ROWS))
    step(manager, directory, ROWS)
    embedded, plain = model.model.embed_tokens(ids), model.model.embed_tokens.base_layer(ids)
    hidden = torch.randn(len(ROWS), 256, generator=torch.Generator().manual_seed(2))
    logits = model.compute_logits(hidden)
    base_logits = hidden @ model.lm_head.weight[:512].t()
    for row, number in enumerate(ROWS):
        if number != 4:
            assert torch.equal(embedded[row], plain[row])
            torch.testing.assert_close(logits[row], base_logits[row], rtol=1e-4, atol=1e-4)
            continue
        delta = 2 * tensors[prefix + "B"] @ tensors[prefix + "A"][:, ids[row]]
        torch.testing.assert_close(embedded[row], plain[row] + delta, rtol=1e-4, atol=1e-4)
        delta = expected_delta(directory, number, [("lm_head", 512)], hidden[row])
        torch.testing.assert_close(logits[row], base_logits[row] + delta, rtol=1e-4, atol=1e-4)


def test_any_order_of_adapters_through_fewer_slots_is_right_at_every_step(manager, directory):
    module, parts = module_and_parts(manager, "qkv_proj")
    rng = np.random.default_rng(3)
    for _ in range(40):
        present = rng.choice([1, 2, 3, 4], size=SLOTS, replace=False)
        rows = [int(one) for one in rng.choice([0, *present], size=6)]
        x = torch.randn(len(rows), 256)
        base = module.base_layer(x)[0]
        step(manager, directory, rows)
        found = module(x)[0]
        for row, number in enumerate(rows):
            wanted = base[row] + (expected_delta(directory, number, parts, x[row]) if number else 0)
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_a_slot_stays_in_memory_until_it_is_removed(manager, directory):
    for number in (1, 2, 3, 4):  # one more than there are slots
        step(manager, directory, [number])
    blocks = {number: manager.block(number) for number in (1, 2, 3, 4)}
    step(manager, directory, [1])
    assert {number: manager.block(number) for number in blocks} == blocks
    assert manager.list_adapters() == set(blocks)
    assert sum(number is not None for number in manager._adapter_manager.lora_index_to_id) == SLOTS


def test_without_a_servers_books_the_adapter_unused_for_longest_goes(manager, directory):
    manager.booked = False
    assert manager.lora_config.max_cpu_loras == SLOTS == 3
    for number in (1, 2, 3, 1, 4):
        step(manager, directory, [number])
    assert manager.list_adapters() == {1, 3, 4}
    module, parts = module_and_parts(manager, "qkv_proj")
    for rows in ([1, 3, 4], [2, 4, 3], [4, 1, 2]):  # any of them, in whatever order vLLM asks for them
        x = torch.randn(3, 256)
        step(manager, directory, rows)
        found, base = module(x)[0], module.base_layer(x)[0]
        for row, number in enumerate(rows):
            wanted = base[row] + expected_delta(directory, number, parts, x[row])
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-4)
        assert manager.list_adapters() == set(rows)


def test_a_pinned_adapter_stays_and_one_too_many_is_refused_by_name(manager, directory):
    manager.booked = False
    for number in (1, 2, 3):
        step(manager, directory, [number])
    manager.pin_adapter(1)
    step(manager, directory, [4])
    assert manager.list_adapters() == {1, 3, 4}
    manager.pin_adapter(3)
    manager.pin_adapter(4)
    with pytest.raises(RuntimeError, match="pinned: raise max_cpu_loras"):
        manager.add_adapter(request(directory, 2))
    assert manager.list_adapters() == {1, 3, 4}


def test_without_a_servers_books_what_was_read_for_requests_that_never_ran_does_not_pile_up(
    manager, directory
):
    manager.booked = False
    block = manager.reader().read(str(directory / "four"))
    for number in range(10, 30):
        manager.stage(number, block)
        assert STAGED.get(number) is block
        assert len(STAGED.ids()) <= SLOTS
    manager.add_adapter(BoundRequest("four", 29, "/nowhere", block=block))
    assert 29 not in STAGED


def test_an_adapter_to_be_loaded_in_place_is_read_anew_whatever_is_kept_of_it(manager, directory):
    module, parts = module_and_parts(manager, "qkv_proj")
    step(manager, directory, [1])
    STAGED.put(1, manager.block(1))
    manager.add_adapter(LoRARequest("one", 1, str(directory / "four"), load_inplace=True))
    x = torch.randn(1, 256)
    wanted = module.base_layer(x)[0][0] + expected_delta(directory, 2, parts, x[0])
    torch.testing.assert_close(module(x)[0][0], wanted, rtol=1e-4, atol=1e-4)


def test_what_a_step_would_bind_may_be_asked_for_while_adapters_come_and_go(manager, directory):
    block, wrong, over = manager.reader().read(str(directory / "four")), [], threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                for number in range(1, 400):
                    if manager.block(number) not in (None, block):
                        wrong.append(number)
            except RuntimeError as error:
                wrong.append(error)
                return

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(10):
        for number in range(1, 400):
            manager.add_adapter(BoundRequest(f"a{number}", number, "/nowhere", block=block))
        for number in range(1, 400):
            manager.remove_adapter(number)
    over.set()
    asking.join()
    assert not wrong


def test_the_memory_of_an_adapter_goes_when_it_is_removed(manager, directory):
    step(manager, directory, [4, 4])
    memory = weakref.ref(manager.block(4).binding.keep)
    assert manager.remove_adapter(4)
    assert not manager.remove_adapter(4)
    gc.collect()
    assert memory() is None


def test_loading_anew_under_the_same_id_serves_the_new_weights(manager, directory):
    module, parts = module_and_parts(manager, "qkv_proj")
    x = torch.randn(1, 256)
    step(manager, directory, [1])
    first = module(x)[0]
    manager.remove_adapter(1)
    other = LoRARequest("four", 1, str(directory / "four"))
    manager.set_active_adapters({other}, LoRAMapping((1,), (1,)))
    assert not torch.allclose(module(x)[0], first)
    wanted = module.base_layer(x)[0][0] + expected_delta(directory, 2, parts, x[0])
    torch.testing.assert_close(module(x)[0][0], wanted, rtol=1e-4, atol=1e-4)


def test_a_staged_block_is_bound_without_reading_anything(manager, directory):
    STAGED.put(2, manager.reader().read(str(directory / "four")))
    assert 2 in manager.list_adapters()
    nowhere = LoRARequest("four", 2, "/nowhere")
    manager.set_active_adapters({nowhere}, LoRAMapping((2,), (2,)))
    assert manager.block(2) is not None


def test_an_adapter_removed_while_a_request_runs_goes_on_from_the_requests_own_block(manager, directory):
    block = manager.reader().read(str(directory / "four"))
    running = BoundRequest("four", 2, "/nowhere", block=block)
    for _ in range(2):
        manager.set_active_adapters({running}, LoRAMapping((2,), (2,)))
        assert manager.block(2) is block
        assert manager.remove_adapter(2)


def test_a_refused_adapter_changes_nothing(manager, directory):
    step(manager, directory, [1, 2])
    before = manager.list_adapters(), list(manager._adapter_manager.lora_index_to_id)
    with pytest.raises(FileNotFoundError):
        manager.add_adapter(LoRARequest("none", 9, "/nowhere"))
    assert (manager.list_adapters(), list(manager._adapter_manager.lora_index_to_id)) == before


def test_vllms_stacked_tensors_keep_their_shapes_and_take_no_memory(manager):
    for module in manager._adapter_manager.modules.values():
        for stacked in (module.lora_a_stacked, module.lora_b_stacked):
            for tensor in stacked if isinstance(stacked, tuple) else (stacked,):
                assert tensor.shape[0] == SLOTS
                assert tensor.untyped_storage().nbytes() == tensor.itemsize
    assert isinstance(manager._adapter_manager.model.model.embed_tokens, NativeEmbedding)


def test_warm_up_with_vllms_dummy_adapters_takes_no_memory(manager):
    with manager.dummy_lora_cache():
        for number in range(1, SLOTS + 1):
            assert manager.add_dummy_lora(LoRARequest(f"w{number}", number, "/not/a/real/path"), rank=8)
    wanted = {LoRARequest(f"w{number}", number, "/not/a/real/path") for number in range(1, SLOTS + 1)}
    manager.set_active_adapters(wanted, LoRAMapping((1, 2, 3), (1, 2, 3)))
    assert manager.block(1) is EMPTY
    manager.remove_all_adapters()
    assert manager.list_adapters() == set()


def test_a_compiled_layer_is_traced_once_whatever_batches_slots_and_adapters_do(manager, directory):
    module, _ = module_and_parts(manager, "qkv_proj")
    traced = []

    def backend(graph, _inputs):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: module(x)[0], fullgraph=True, dynamic=True, backend=backend)
    for rows in ([0, 0], [1, 2, 0], [4, 4, 4, 4], [3, 1], [0, 2, 4]):
        x = torch.randn(len(rows), 256)
        step(manager, directory, rows)
        torch.testing.assert_close(compiled(x), module(x)[0])
    assert len(traced) == 1
    assert isinstance(module.punica_wrapper, ModuleLora)


def change(directory: Path, target: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """Copy adapter "four" with one tensor changed or added."""
    target.mkdir()
    tensors = load_file(directory / "four" / "adapter_model.safetensors")
    if tensor is not None:
        tensors[name] = tensor
    else:
        del tensors[name]
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_bytes((directory / "four" / "adapter_config.json").read_bytes())
    return target


Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (Q.format(0, "A"), torch.ones(4, 255), "q_proj takes A and B of"),
        (Q.format(0, "B"), torch.ones(255, 4), "rows"),
        (Q.format(0, "A"), torch.ones(3, 256), "q_proj takes A and B of"),
        (Q.format(9, "A"), torch.ones(4, 256), r"layers\.9"),
        (Q.format(0, "B"), None, "one of A and B is missing"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_by_name(
    manager, directory, tmp_path, name, tensor, message
):
    with pytest.raises(ValueError, match=message):
        manager.reader().read(str(change(directory, tmp_path / "bad", name, tensor)))


def test_a_directory_without_safetensors_is_refused_before_anything_else_is_read(
    manager, directory, tmp_path
):
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        manager.reader().read(str(tmp_path))
