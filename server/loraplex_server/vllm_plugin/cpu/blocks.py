"""An adapter as one block of memory: read, checked, cast, scaled and packed, once, away from the engine's step.

Promises: a block holds an adapter's A and B for every wrapped module, each at its own rank, in the form the kernels
read (`kernels`), in one region of memory that goes with its last reference; what an adapter does not touch
takes no memory. A weight that no wrapped module takes, or of another shape than its module's, refuses the adapter.

For whoever builds blocks ahead of the engine (any thread; nothing here writes to what vLLM shares):

    reader = manager.reader()              # `manager`: the NativeWorkerLoRAManager of this process, after loading
    block = reader.read(path)              # an AdapterBlock; raises ValueError, FileNotFoundError, OSError
    STAGED.put(adapter_id, block)          # the engine's first step with this id binds it, without reading anything
    STAGED.drop(adapter_id)                # when it is not wanted any more; `remove_lora` does it too

`read` calls its `pause` often, between two matrices: a place to yield. They are at most a few hundred microseconds
apart, but for the file's header, vLLM's look at all names (2 ms and 1 ms for 336 tensors) and embeddings. A request
that the engine has taken in holds its block until it ends, whatever is dropped meanwhile (`hooks`).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch

from loraplex_registry.validation.weights import WEIGHTS_NAME
from loraplex_server.vllm_plugin.cpu.choice import kernel_library
from loraplex_server.vllm_plugin.cpu.kernels import Binding, Geometry, Piece, pack_b, packed_b_bytes
from loraplex_server.vllm_plugin.cpu.regions import REGIONS
from loraplex_server.vllm_plugin.cpu.tensor_file import read_tensors

ALIGN: Final = 64  # bytes: a cache line, and the width of an AVX-512 register
# Values cast at once: below torch's threshold for parallel work, so that a background thread never wakes a second
# team of OpenMP threads beside the engine's.
CAST_VALUES: Final = 32_000
STAGED_MAX: Final = 4096  # blocks in memory; the server's budget in bytes is far below

Kind = Literal["linear", "embedding", "logits"]


@dataclass(frozen=True)
class Layer:
    """One wrapped module of the model: its shape, and what its parts are called in an adapter."""

    kind: Kind
    names: tuple[
        str, ...
    ]  # in an adapter, in the order of the slices; fewer where a part covers several slices
    in_features: int  # rows of the vocabulary for an embedding
    out_features: tuple[int, ...]  # per slice

    @property
    def geometry(self) -> Geometry:
        """What the kernels know of it."""
        return Geometry.side_by_side(self.in_features, self.out_features)


class Low(NamedTuple):
    """The two factors of one slice's delta, ``scale * x @ a.T @ b.T``."""

    a: torch.Tensor  # (rank, in_features)
    b: torch.Tensor  # (out_features, rank)
    scale: float


@dataclass(frozen=True)
class AdapterBlock:
    """One adapter's weights for the kernels; `binding` keeps their memory."""

    binding: Binding
    n_bytes: int  # as allocated


EMPTY: Final = AdapterBlock(Binding.of((), keep=None), 0)
"""An adapter that touches nothing: what vLLM's warm-up gets for its dummy adapters."""


@dataclass(frozen=True)
class _Place:
    """Where one slice of one module lies in a block."""

    module: int
    slice: int
    low: Low
    a_offset: int
    b_offset: int
    b_bytes: int


def build(
    layers: Sequence[Layer],
    weights: Sequence[Sequence[Low | None]],
    dtype: torch.dtype,
    pause: Callable[[], None] = lambda: None,
) -> AdapterBlock:
    """Lay an adapter out in one block.

    Args:
        layers: the wrapped modules, numbered as in the kernels' table.
        weights: per layer and slice, None where the adapter does not touch it.
        dtype: torch.bfloat16 or torch.float32, what the kernels multiply in.
        pause: called after each matrix, on each of the two threads that share the work.

    Raises:
        ValueError: weights are not of their layer's shape.

    """
    places, size = _lay_out(layers, weights, dtype)
    if not places:
        return EMPTY
    memory = REGIONS.take(size)

    def fill(some: Sequence[_Place]) -> list[Piece]:
        pieces = []
        for place in some:
            a = memory[place.a_offset :][: place.low.a.numel() * dtype.itemsize].view(dtype)
            b = memory[place.b_offset :][: place.b_bytes]
            _copy(a, place.low.a.t() if layers[place.module].kind == "embedding" else place.low.a)
            pack_b(kernel_library(), b, _cast(place.low.b, dtype), place.low.scale)
            pieces.append(Piece(place.module, place.slice, len(place.low.a), a.data_ptr(), b.data_ptr()))
            pause()
        return pieces

    half = bisect_left(places, size // 2, key=lambda place: place.a_offset)
    with ThreadPoolExecutor(1, thread_name_prefix="loraplex-build") as helper:
        second = helper.submit(fill, places[half:])
        binding = Binding.of([*fill(places[:half]), *second.result()], keep=memory)
        held = memory.untyped_storage().nbytes()  # memory that is used again may be more than asked for
        return AdapterBlock(binding, held)


def _lay_out(
    layers: Sequence[Layer], weights: Sequence[Sequence[Low | None]], dtype: torch.dtype
) -> tuple[list[_Place], int]:
    """Return where everything goes, and the size of it all in bytes."""
    places: list[_Place] = []
    offset = 0
    for number, (layer, slices) in enumerate(zip(layers, weights, strict=True)):
        for index, low in enumerate(slices):
            if low is None:
                continue
            _check_shape(layer, index, low)
            a_bytes = _aligned(low.a.numel() * dtype.itemsize)
            b_bytes = packed_b_bytes(layer.out_features[index], len(low.a), dtype)
            places.append(_Place(number, index, low, offset, offset + a_bytes, b_bytes))
            offset += a_bytes + _aligned(b_bytes)
    return places, offset


def _check_shape(layer: Layer, index: int, low: Low) -> None:
    rank = len(low.a)
    wanted_a, wanted_b = (rank, layer.in_features), (layer.out_features[index], rank)
    if rank == 0 or tuple(low.a.shape) != wanted_a or tuple(low.b.shape) != wanted_b:
        name = layer.names[min(index, len(layer.names) - 1)]
        takes = f"(rank, {layer.in_features}) and ({layer.out_features[index]}, rank)"
        raise ValueError(
            f"{name} takes A and B of {takes}, not {tuple(low.a.shape)} and {tuple(low.b.shape)}"
        )


def by_slice(layer: Layer, parts: Sequence[Low | None]) -> list[Low | None]:
    """Give each slice of a layer its factors; a part may cover several slices, which then share its A.

    Raises:
        ValueError: the rows of a part's B do not end where a slice ends.

    """
    slices: list[Low | None] = []
    for low in parts:
        if low is None:
            # With fewer parts than slices the last part is the only one that may be missing, as in vLLM.
            covered = 1 if len(parts) == len(layer.out_features) else len(layer.out_features) - len(slices)
            slices += [None] * covered
            continue
        start = 0
        while start < len(low.b) and len(slices) < len(layer.out_features):
            width = layer.out_features[len(slices)]
            slices.append(Low(low.a, low.b[start : start + width], low.scale))
            start += width
        if start != len(low.b):
            raise ValueError(
                f"B of {layer.names[0]} has {len(low.b)} rows, its slices have {layer.out_features}"
            )
    if len(slices) != len(layer.out_features):
        raise ValueError(f"{layer.names[0]} has {len(layer.out_features)} slices, the adapter {len(slices)}")
    return slices


@dataclass(frozen=True)
class BlockReader:
    """Reads adapters of the PEFT format from disk into blocks, with vLLM's own checks. Immutable."""

    layers: tuple[Layer, ...]
    dtype: torch.dtype
    load: Callable[
        [str, dict[str, torch.Tensor]], Any
    ]  # a directory and its tensors to vLLM's LoRAModel of them

    def read(self, path: str, pause: Callable[[], None] = lambda: None) -> AdapterBlock:
        """Read the adapter in a directory.

        Raises:
            ValueError: it is not an adapter for this model, or larger than the engine's rank.
            FileNotFoundError, OSError: it cannot be read.

        """
        if not (Path(path) / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f"{path} has no {WEIGHTS_NAME}")
        tensors = read_tensors(Path(path) / WEIGHTS_NAME, pause)
        try:
            found = dict(self.load(path, tensors).loras)
        except (ValueError, OSError):
            raise
        except Exception as error:  # vLLM's loader raises types of its own, asserts among them
            raise ValueError(f"{type(error).__name__}: {error}") from error
        pause()
        weights = [by_slice(layer, [_take(found, name) for name in layer.names]) for layer in self.layers]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ValueError(f"no module of this engine takes the weights of {min(found)}{more}")
        return build(self.layers, weights, self.dtype, pause)


def _take(found: dict[str, Any], name: str) -> Low | None:
    # Pooling models are registered without the "model." that adapters name (as in vLLM's own manager).
    weights = found.pop(name, None) or found.pop(name.removeprefix("model."), None)
    if weights is None:
        return None
    if weights.lora_a is None or weights.lora_b is None:
        raise ValueError(f"{name}: one of A and B is missing")
    return Low(weights.lora_a, weights.lora_b, float(weights.scaling))


class Staged:
    """Blocks by the id of their adapter, from before its first step until it is dropped. For any thread."""

    def __init__(self) -> None:
        self._blocks: dict[int, AdapterBlock] = {}
        self._lock = threading.Lock()

    def put(self, adapter_id: int, block: AdapterBlock) -> None:
        """Hand a block over.

        Raises:
            RuntimeError: STAGED_MAX blocks are here already.

        """
        with self._lock:
            if len(self._blocks) >= STAGED_MAX and adapter_id not in self._blocks:
                raise RuntimeError(f"{STAGED_MAX} adapters are in memory already")
            self._blocks[adapter_id] = block

    def get(self, adapter_id: int) -> AdapterBlock | None:
        """Return the block of an adapter, or None."""
        with self._lock:
            return self._blocks.get(adapter_id)

    def drop(self, adapter_id: int) -> bool:
        """Forget a block; whether there was one."""
        with self._lock:
            return self._blocks.pop(adapter_id, None) is not None

    def __contains__(self, adapter_id: int) -> bool:
        return adapter_id in self._blocks

    def ids(self) -> frozenset[int]:
        """Adapters whose blocks are here."""
        with self._lock:
            return frozenset(self._blocks)


STAGED: Final = Staged()
"""Of this process: others put, the engine's threads find."""


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write the values of `source` into the flat `target`, cast, in pieces that torch does on this thread alone."""
    pieces = source.contiguous().view(-1).split(CAST_VALUES)
    for to, of in zip(target.split(CAST_VALUES), pieces, strict=True):
        to.copy_(of)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor` contiguous and of `dtype`."""
    if tensor.dtype == dtype:
        return tensor.contiguous()
    cast = torch.empty(tensor.shape, dtype=dtype)
    _copy(cast.view(-1), tensor)
    return cast
