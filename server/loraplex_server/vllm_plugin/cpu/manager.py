"""vLLM's LoRA manager for CPU, with pointers for slots.

vLLM copies an adapter into stacked tensors, one place per slot, because a GPU's kernels want it there. On a CPU there
is no other memory to move to, so here

* an adapter is a block of memory (`blocks`), and giving it a slot writes its pointers into the kernels' table: some ten
  microseconds, no copy, no padding to the largest rank; vLLM's stacked tensors keep their shapes and take no memory;
* each wrapped layer holds a `ModuleLora` of its own, which calls one operator with the number of its module, so that
  `torch.compile` sees a constant and nothing changes in its graph when batches, slots or adapters do;
* under the server (`loraplex_stage_at`) nothing is evicted: an adapter is in memory from its first step until
  `remove_lora`. The server's books bound how many there are (`adapters.slots`, `adapters.memory_bytes_max`); beyond
  RESIDENT_MAX loading is refused here. Under vLLM's own, which keeps no books, the one unused for longest goes when
  there are `max_cpu_loras`.

One thread, the engine's, owns a manager. `NativeWorkerLoRAManager.reader()` may be used by others.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from vllm.lora.layers import (
    ClassificationHeadWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from loraplex_server.vllm_plugin.cpu import ops
from loraplex_server.vllm_plugin.cpu.blocks import EMPTY, STAGED, AdapterBlock, BlockReader, Layer
from loraplex_server.vllm_plugin.cpu.choice import kernel_library
from loraplex_server.vllm_plugin.cpu.kernels import SAMPLES, TOKENS, Table
from loraplex_server.vllm_plugin.cpu.layers import ModuleLora, NativeEmbedding
from loraplex_server.vllm_plugin.grouping import slots_of_rows

RESIDENT_MAX: Final = 16_384  # adapters; the server's own limits are far below
# Of the adapter that this thread reads: vLLM's way from `_load_adapter` to `AsStored` has no room for an argument.
_TENSORS: Final[ContextVar[dict[str, torch.Tensor]]] = ContextVar("tensors")


@dataclass(frozen=True)
class Resident:
    """An adapter in memory, as vLLM's manager keeps it."""

    id: int
    block: AdapterBlock


class NativeLoRAModelManager(LRUCacheLoRAModelManager):  # type: ignore[misc]  # vLLM is not typed for us
    """See the module."""

    _wrapping = False
    blocks: dict[int, AdapterBlock]
    """Of the adapters in memory. vLLM's own cache makes a copy of itself to be looked into, which no other thread may
    do while it changes; one entry of a dict may be read at any time."""

    @property
    def capacity(self) -> int:
        """Adapters in memory at which vLLM would evict; see the module."""
        return RESIDENT_MAX

    @property
    def lora_slots(self) -> int:
        """Slots, but one while layers are wrapped, which make their stacked tensors then."""
        return 1 if self._wrapping else super().lora_slots

    def _create_lora_modules(self) -> None:
        self.blocks = {}
        self._wrapping = True
        try:
            super()._create_lora_modules()
        finally:
            self._wrapping = False
        slots = self.lora_slots
        self.layers = tuple(self._layer(name, module) for name, module in self.modules.items())
        geometry = [layer.geometry for layer in self.layers]
        self.table = Table(kernel_library(), geometry, slots, self.lora_config.lora_dtype)
        for number, module in enumerate(self.modules.values()):
            _replace_stacked(module, slots)
            linear = module.base_layer if isinstance(module, BaseLinearLayerWithLoRA) else None
            module.set_mapping(ModuleLora(self.table, number, linear))
            if isinstance(module, VocabParallelEmbeddingWithLoRA):
                module.__class__ = NativeEmbedding
        ops.define()
        ops.use(self.table)

    def _layer(self, name: str, module: Any) -> Layer:
        names = tuple(self.packed_modules.get(name, (name,)))
        if isinstance(module, VocabParallelEmbeddingWithLoRA):
            base = module.base_layer
            return Layer("embedding", names, base.org_vocab_size, (base.embedding_dim,))
        if isinstance(module, LogitsProcessorWithLoRA):
            return Layer("logits", names, module.hidden_size, (module.base_layer.vocab_size,))
        # A classification head may be replaced whole by an adapter, which the kernels do not do.
        if isinstance(module, BaseLinearLayerWithLoRA) and not isinstance(module, ClassificationHeadWithLoRA):
            return Layer("linear", names, module.input_size, tuple(module.output_slices))
        raise NotImplementedError(
            f"{name}: LoRA on {type(module).__name__} has no native form on CPU; set LORAPLEX_CPU_LORA=grouped"
        )

    def _add_adapter(self, lora: Resident) -> None:
        if len(self._registered_adapters) >= RESIDENT_MAX:
            raise RuntimeError(f"{RESIDENT_MAX} adapters are in memory already")
        self._registered_adapters[lora.id] = lora
        self.blocks[lora.id] = lora.block

    def activate_adapter(self, lora_id: int) -> bool:
        """Give an adapter in memory a slot, the one of the adapter unused for longest if none is free."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        slot = self.lora_index_to_id.index(None)
        self.table.bind(slot, self._registered_adapters[lora_id].block.binding)
        self._last_mapping = None  # to be told again: the slot may hold another block than in the last step
        self.lora_index_to_id[slot] = lora_id
        self._active_adapters[lora_id] = None
        return True

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            slot = self.lora_index_to_id.index(lora_id)
            self.lora_index_to_id[slot] = None
            self.table.unbind(slot)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an adapter; whether there was one."""
        self.blocks.pop(adapter_id, None)
        return bool(super().remove_adapter(adapter_id))

    def remove_oldest(self) -> int:
        """Forget the adapter unused for longest, and return its id.

        Raises:
            RuntimeError: there is none but pinned ones.

        """
        known = self._registered_adapters
        oldest = next((one for one in known.order if one not in known.pinned_items), None)
        if oldest is None:
            raise RuntimeError(f"all {len(known)} adapters in memory are pinned: raise max_cpu_loras")
        self.remove_adapter(oldest)
        return int(oldest)

    def remove_all_adapters(self) -> None:
        """Forget every adapter."""
        self.blocks.clear()
        for slot, lora_id in enumerate(self.lora_index_to_id):
            if lora_id is not None:
                self.table.unbind(slot)
        super().remove_all_adapters()

    def _set_adapter_mapping(self, mapping: Any) -> None:
        slot_of_id = {number: slot for slot, number in enumerate(self.lora_index_to_id) if number is not None}
        for kind, ids in ((TOKENS, mapping.index_mapping), (SAMPLES, mapping.prompt_mapping)):
            self.table.rows(kind, slots_of_rows(ids, slot_of_id).astype(np.int32))


class AsStored(LoRAModel):  # type: ignore[misc]
    """vLLM's adapter, of tensors that are there already and keep their type: they are cast into the block."""

    @classmethod
    def from_local_checkpoint(
        cls,
        lora_dir: str,
        expected_lora_modules: set[str],
        peft_helper: Any,
        *,
        lora_model_id: int,
        device: str,
        dtype: torch.dtype,
        moe_ep_spec: Any,
        **names: Any,
    ) -> Any:
        """See `LoRAModel.from_local_checkpoint`; which modules are expected is for `BlockReader` to say.

        Raises:
            ValueError: a weight is none of LoRA's.
        """
        del lora_dir, expected_lora_modules, dtype, moe_ep_spec
        return cls.from_lora_tensors(
            lora_model_id, _TENSORS.get(), peft_helper, device=device, dtype=None, **names
        )


class NativeWorkerLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]
    """vLLM's worker-side manager, over `NativeLoRAModelManager`."""

    _manager_cls = NativeLoRAModelManager
    booked = False
    """Whether a server keeps books of what is in memory and says what goes."""

    def __init__(self, vllm_config: Any, device: torch.device, embedding_modules: Mapping[str, str]) -> None:
        super().__init__(vllm_config, device, embedding_modules, AsStored)

    def reader(self) -> BlockReader:
        """Return what reads adapters for this model, in any thread."""
        manager: NativeLoRAModelManager = self._adapter_manager
        return BlockReader(layers=manager.layers, dtype=self.lora_config.lora_dtype, load=self._load_as_vllm)

    def _load_as_vllm(self, path: str, tensors: dict[str, torch.Tensor]) -> Any:
        before = _TENSORS.set(tensors)
        try:
            return super()._load_adapter(LoRARequest("staged", 1, path))
        finally:
            _TENSORS.reset(before)

    def block(self, adapter_id: int) -> AdapterBlock | None:
        """Return what a step with this adapter would bind; None if it would have to read. For any thread."""
        block: AdapterBlock | None = self._adapter_manager.blocks.get(adapter_id)
        return STAGED.get(adapter_id) if block is None else block

    def stage(self, adapter_id: int, block: AdapterBlock) -> None:
        """Keep what was read for a request until its first step, for others of the same adapter. For any thread.

        Raises:
            RuntimeError: too many blocks wait.

        """
        if not self.booked and len(STAGED.ids()) >= self.lora_config.max_cpu_loras:
            # Of requests that never came to a step, most likely; one that still will has its block with it.
            for number in STAGED.ids():
                STAGED.drop(number)
        STAGED.put(adapter_id, block)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Bring an adapter into memory unless it is there, and give it a slot.

        Raises:
            ValueError, FileNotFoundError, OSError: it cannot be read; nothing has changed.
            RuntimeError: RESIDENT_MAX adapters are in memory.

        """
        manager, number = self._adapter_manager, lora_request.lora_int_id
        if number not in manager.blocks or lora_request.load_inplace:
            resident = self._load_adapter(lora_request)
            manager.remove_adapter(number)
            if not self.booked:
                STAGED.drop(number)
                while len(manager) >= self.lora_config.max_cpu_loras:
                    manager.remove_oldest()
            manager.add_adapter(resident)
        else:
            manager._registered_adapters.touch(number)
        manager.activate_adapter(number)
        return True

    def _load_adapter(self, lora_request: LoRARequest) -> Resident:
        block = getattr(lora_request, "block", None)
        if block is None and not lora_request.load_inplace:
            block = STAGED.get(lora_request.lora_int_id)
        if block is None:
            block = self.reader().read(get_adapter_absolute_path(lora_request.lora_path))
        return Resident(lora_request.lora_int_id, block)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Free an adapter's memory, staged or in use; whether there was one."""
        staged = STAGED.drop(adapter_id)
        return bool(super().remove_adapter(adapter_id)) or staged

    def list_adapters(self) -> set[int]:
        """Adapters in memory, those included that wait for their first step."""
        return set(self._adapter_manager.blocks) | STAGED.ids()

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:  # noqa: ARG002  # vLLM's signature
        """Register an adapter that touches nothing: there is nothing here to warm up by its weights."""
        if lora_request.lora_int_id in self._adapter_manager.blocks:
            return False
        added: bool = self._adapter_manager.add_adapter(Resident(lora_request.lora_int_id, EMPTY))
        return added


def _replace_stacked(module: Any, slots: int) -> None:
    """Give a wrapped layer stacked tensors of the shapes vLLM asks about, and of one value each in memory."""
    for name in ("lora_a_stacked", "lora_b_stacked"):
        stacked = getattr(module, name)
        shapes = stacked if isinstance(stacked, tuple) else (stacked,)
        flat = tuple(tensor.new_zeros(()).expand(slots, *tensor.shape[1:]) for tensor in shapes)
        setattr(module, name, flat if isinstance(stacked, tuple) else flat[0])
    if hasattr(module, "lora_a_stacked_2d"):
        del module.lora_a_stacked_2d  # what only vLLM's own embedding reads
