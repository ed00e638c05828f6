"""vLLM's LoRA wrapper for CPU, grouped by adapter: right for every row of a mixed batch, and fast.

vLLM's LoRA layers hold stacked weights and call a *punica wrapper* with their output `y` and input `x`;
`GroupedPunicaWrapper` is that wrapper. It promises:

* A row gets the delta ``x @ A.T @ B.T`` of its own adapter. A base row is neither read nor written. (vLLM's
  CPU wrapper indexes the weights with the row's slot, and -1, the base model, picks the last slot.)
* Sums are accumulated in fp32. For bf16 the low-rank value and the updated output are rounded to bf16 once
  each; vLLM's wrapper rounds the delta as well, so the error is not above its own. In fp32 nothing is
  rounded.
* With no LoRA row in the batch every method returns at once.
* Work is done at each adapter's true rank, and only for adapters that touch the module (`slots`).

Grouping (`grouping`) is done when vLLM reports a new mapping; what to multiply with what (`_Module.jobs`)
is worked out once per module and mapping, and kept until the mapping or the weights change.

Not thread-safe, as vLLM's: one worker thread owns it. Mixture-of-experts layers raise NotImplementedError,
as in vLLM's own CPU wrapper.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from loraplex_server.vllm_plugin.grouping import (
    NO_ROWS,
    Groups,
    PaddedBatch,
    Segment,
    group_rows,
    make_plan,
    slots_of_rows,
)
from loraplex_server.vllm_plugin.slots import stacked_version, true_ranks_of_a, true_ranks_of_b

# One entry per wrapped module of the model; more means that a caller makes new stacked tensors per call.
MODULES_MAX: Final = 100_000

Stack = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Slice:
    """One packed projection of a module: its weights, its columns of the output, the ranks of its slots."""

    a: torch.Tensor | None  # (slots, max_rank, in_features); None where the caller has applied A already
    b: torch.Tensor  # (slots, out_features, max_rank)
    ranks: tuple[int, ...]  # true rank per slot
    columns: slice


@dataclass(frozen=True)
class _Product:
    """The two factors of one slice's delta, cut to the rank in use and laid out for the product.

    2-D for one slot, 3-D with the slots of a batched product in front. They are views of vLLM's stacked weights,
    except `slots`, where wanted slots lie apart and must be copied together at each use.
    """

    a: torch.Tensor | None  # (..., in_features, rank)
    b: torch.Tensor  # (..., rank, out_features)
    columns: slice
    slots: torch.Tensor | None = None


@dataclass(frozen=True)
class _Job:
    """Products of a module for slices that are touched by the same adapters."""

    segments: tuple[tuple[Segment, tuple[_Product, ...]], ...]
    padded: tuple[PaddedBatch, tuple[_Product, ...]] | None


@dataclass
class _Module:
    """What is known of one wrapped module; filled and refreshed by `GroupedPunicaWrapper._jobs`."""

    a: Stack | None
    b: Stack
    columns: tuple[slice, ...]
    version: int = -2  # of the weights when `ranks` was read
    ranks: tuple[tuple[int, ...], ...] = ()  # per slice, per slot
    groups: Groups | None = None  # the mapping `jobs` was made for
    jobs: tuple[_Job, ...] = field(default=())


class GroupedPunicaWrapper(PunicaWrapperBase):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's punica interface, with rows grouped by adapter slot. See the module's promise."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **_unused: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._tokens = NO_ROWS
        self._samples = NO_ROWS
        self._modules: dict[int, _Module] = {}

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **_unused: Any,
    ) -> None:
        """Take over the rows' adapters for the coming steps.

        Args:
            mapping: vLLM's LoRAMapping: adapter ids (0 = base) per token and per sampled position.
            lora_index_to_id: the adapter id in each slot, None where it is free.
            max_loras: slots + 1 (vLLM's convention).
            vocab_size: rows per slot of the stacked embedding A.

        Raises:
            KeyError: a row names an adapter that is in no slot.

        """
        slot_of_id = {number: slot for slot, number in enumerate(lora_index_to_id) if number is not None}
        tokens = slots_of_rows(mapping.index_mapping, slot_of_id)
        samples = slots_of_rows(mapping.prompt_mapping, slot_of_id)
        self._tokens = group_rows(tokens)
        self._samples = group_rows(samples)
        self._fill_vllm_indices(tokens, samples, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        self.no_lora = self._tokens.idle

    def _fill_vllm_indices(
        self, tokens: np.ndarray, samples: np.ndarray, max_loras: int, vocab_size: int
    ) -> None:
        """Keep the index tensors that vLLM's layers read from the wrapper themselves."""
        padded = np.where(samples == -1, max_loras - 1, samples) * len(samples) + np.arange(len(samples))
        for buffer, values in (
            (self._token_lora_indices, tokens),
            (self._sampler_indices, samples),
            (self._sampler_indices_padded, padded),
            # Base rows look up row 0 of slot 0: it must be in range, and the result is not used.
            (self._embeddings_indices, np.maximum(tokens, 0) * vocab_size),
        ):
            buffer[: len(values)].copy_(torch.from_numpy(values))
        self.indices_len[:] = [len(tokens), len(samples), len(samples), len(tokens)]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Stack,
        lora_b_stacked: Stack,
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **_unused: Any,
    ) -> None:
        """Add to `y` (rows, sum of output_slices) each row's delta, all packed projections in one pass.

        Args:
            y: changed in place.
            x: (rows, in_features).
            lora_a_stacked: per slice (slots, 1, max_rank, in_features).
            lora_b_stacked: per slice (slots, 1, out_features, max_rank).
            scale: factor on the delta; vLLM passes 1, having scaled B at load.
            output_slices: columns of `y` per slice, side by side.
            add_inputs: False overwrites `y` instead, with 0 in base rows.

        Raises:
            ValueError: fewer rows than vLLM announced.

        """
        if not add_inputs:
            y.zero_()
        groups = self._tokens
        if not groups.slots:
            return
        module = self._modules.get(id(lora_b_stacked[0]))
        if module is None:
            module = self._remember(lora_a_stacked, lora_b_stacked, output_slices)
        _run(self._jobs(module, groups), y, x, scale, groups)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **_unused: Any,
    ) -> None:
        """Add ``x @ B.T`` of each row's adapter to the embeddings `y` (rows, dim).

        Args:
            y: changed in place.
            x: (rows, max_rank), the rows of A that the layer has looked up.
            lora_b_stacked: (slots, 1, dim, max_rank).
            add_inputs: False overwrites `y` instead, with 0 in base rows.

        """
        if not add_inputs:
            y.zero_()
        groups = self._tokens
        if not groups.slots:
            return
        module = self._modules.get(id(lora_b_stacked))
        if module is None:
            module = self._remember(None, (lora_b_stacked,), (lora_b_stacked.shape[2],))
        _run(self._jobs(module, groups), y, x, 1.0, groups)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **_unused: Any,
    ) -> None:
        """Add the delta of each sampled position's adapter to the logits `y` (positions, vocabulary).

        `y` may have more or fewer columns than B has rows (padding of the vocabulary): what is common is
        added.

        Args:
            y: changed in place.
            x: (positions, hidden).
            lora_a_stacked: (slots, 1, max_rank, hidden).
            lora_b_stacked: (slots, 1, vocabulary, max_rank).
            scale: factor on the delta.

        Raises:
            ValueError: rows that vLLM did not announce, and adapters on the logits differ among the batch.

        """
        groups = self._samples
        if not groups.slots:
            return
        module = self._modules.get(id(lora_b_stacked))
        if module is None:
            width = min(lora_b_stacked.shape[2], y.shape[-1])
            module = self._remember((lora_a_stacked,), (lora_b_stacked,), (width,))
        jobs = self._jobs(module, groups)
        if jobs and len(x) != groups.n_rows:
            # Prompt log-probabilities: rows of one request, of which vLLM does not say which.
            groups = _same_for_all(groups, len(x))
            jobs = self._jobs(module, groups)
        _run(jobs, y, x, scale, groups)

    def apply_lora_full_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        weight_stacked: torch.Tensor,
        bias_stacked: torch.Tensor,
        module_enabled: torch.Tensor,
    ) -> None:
        """Replace `y` by the adapter's own full layer, for rows whose adapter brings one.

        Args:
            y: (rows, labels), changed in place.
            x: (rows, in_features).
            weight_stacked: (slots, 1, labels, in_features).
            bias_stacked: (slots, labels).
            module_enabled: (slots,) of bool.

        """
        groups = self._samples
        _require_rows(groups, x)
        for slot, numbers in zip(groups.slots, groups.rows, strict=True):
            if not module_enabled[slot]:
                continue
            rows = torch.from_numpy(numbers)
            full = x.index_select(0, rows).float() @ weight_stacked[slot, 0].float().t()
            y.index_copy_(0, rows, full.to(y.dtype) + bias_stacked[slot].to(y.dtype))

    def add_shrink(
        self, y: Stack | torch.Tensor, x: torch.Tensor, lora_a_stacked: Stack, scale: float, **_unused: Any
    ) -> None:
        """Write ``scale * x @ A.T`` of each row's adapter into ``y[slice]`` (rows, max_rank); base rows stay.

        Used by vLLM where A and B are sharded among several workers; one product per group and slice.
        """
        x = x.view(-1, x.shape[-1])
        groups = self._tokens
        _require_rows(groups, x)
        for slot, numbers in zip(groups.slots, groups.rows, strict=True):
            rows = torch.from_numpy(numbers)
            wide = x.index_select(0, rows).float()
            for index, stacked in enumerate(lora_a_stacked):
                low = (wide @ stacked[slot, 0].float().t()) * scale
                y[index].index_copy_(0, rows, low.to(y[index].dtype))

    def add_expand(
        self,
        y: torch.Tensor,
        x: Stack | torch.Tensor,
        lora_b_stacked: Stack,
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **_unused: Any,
    ) -> None:
        """Add ``x[slice] @ B.T`` of each row's adapter to the slices' columns of `y`."""
        y = y.view(-1, y.shape[-1])
        groups = self._tokens
        _require_rows(groups, y)
        columns = _side_by_side(output_slices, offset_start)
        if not add_inputs:
            y[:, offset_start : columns[-1].stop] = 0
        for slot, numbers in zip(groups.slots, groups.rows, strict=True):
            rows = torch.from_numpy(numbers)
            for low, stacked, place in zip(x, lora_b_stacked, columns, strict=True):
                delta = low.index_select(0, rows).float() @ stacked[slot, 0].float().t()
                out = y[:, place]
                out.index_copy_(0, rows, (out.index_select(0, rows).float() + delta).to(y.dtype))

    def _remember(self, a: Stack | None, b: Stack, output_slices: tuple[int, ...]) -> _Module:
        """Begin to keep a module; its first B, kept alive here, is its identity."""
        if len(self._modules) >= MODULES_MAX:
            self._modules.clear()
        module = _Module(a=a, b=b, columns=_side_by_side(output_slices))
        self._modules[id(b[0])] = module
        return module

    def _jobs(self, module: _Module, groups: Groups) -> tuple[_Job, ...]:
        """Return what to multiply for `groups`; remade when the mapping or the module's weights changed."""
        version = stacked_version(module.b if module.a is None else module.a + module.b)
        if module.groups is groups and module.version == version and version >= 0:
            return module.jobs
        if module.version != version or version < 0:
            module.ranks = _read_ranks(module)
            module.version = version
        module.jobs = _make_jobs(module, groups)
        module.groups = groups
        return module.jobs


def _side_by_side(widths: tuple[int, ...], start: int = 0) -> tuple[slice, ...]:
    """Return adjoining column slices of the given widths."""
    ends = [start, *(start + total for total in np.cumsum(widths).tolist())]
    return tuple(slice(left, right) for left, right in pairwise(ends))


def _read_ranks(module: _Module) -> tuple[tuple[int, ...], ...]:
    if module.a is None:
        return tuple(true_ranks_of_b(stacked) for stacked in module.b)
    return tuple(true_ranks_of_a(stacked) for stacked in module.a)


def _make_jobs(module: _Module, groups: Groups) -> tuple[_Job, ...]:
    """Join the slices that the same adapters touch, so that rows are gathered once for all of them."""
    by_touched: dict[tuple[int, ...], list[_Slice]] = {}
    for index, (b, columns) in enumerate(zip(module.b, module.columns, strict=True)):
        ranks = module.ranks[index]
        touched = tuple(slot for slot in groups.slots if ranks[slot])
        if touched:
            a = None if module.a is None else module.a[index][:, 0]
            b = b[:, 0, : columns.stop - columns.start]
            by_touched.setdefault(touched, []).append(_Slice(a=a, b=b, ranks=ranks, columns=columns))
    return tuple(_make_job(groups, touched, slices) for touched, slices in by_touched.items())


def _make_job(groups: Groups, touched: tuple[int, ...], slices: list[_Slice]) -> _Job:
    plan = make_plan(groups, touched)
    segments = tuple(
        (segment, tuple(_product(one, segment.slot, one.ranks[segment.slot]) for one in slices))
        for segment in plan.segments
    )
    if plan.padded is None:
        return _Job(segments=segments, padded=None)
    wanted = plan.padded.slots
    products = tuple(_product(one, wanted, max(one.ranks[slot] for slot in touched)) for one in slices)
    return _Job(segments=segments, padded=(plan.padded, products))


def _product(piece: _Slice, slots: int | slice | torch.Tensor, rank: int) -> _Product:
    apart = slots if isinstance(slots, torch.Tensor) else None
    taken = slice(None) if isinstance(slots, torch.Tensor) else slots
    a = None if piece.a is None else piece.a[taken][..., :rank, :].transpose(-1, -2)
    b = piece.b[taken][..., :rank].transpose(-1, -2)
    return _Product(a=a, b=b, columns=piece.columns, slots=apart)


def _same_for_all(groups: Groups, n_rows: int) -> Groups:
    """Return groups for `n_rows` rows that all want the one adapter of the batch."""
    if len(groups.slots) != 1 or len(groups.rows[0]) != groups.n_rows:
        raise ValueError(
            f"{n_rows} rows of logits for a batch of {groups.n_rows} positions with different adapters: "
            "prompt log-probabilities with an adapter on lm_head need a batch of that adapter alone"
        )
    return Groups(n_rows=n_rows, slots=groups.slots, rows=(np.arange(n_rows),))


def _require_rows(groups: Groups, x: torch.Tensor) -> None:
    if len(x) < groups.n_rows:
        raise ValueError(f"{len(x)} rows, but the adapter mapping of this step has {groups.n_rows}")


def _run(jobs: tuple[_Job, ...], y: torch.Tensor, x: torch.Tensor, scale: float, groups: Groups) -> None:
    """Do the products of one module, in place in `y`."""
    if not jobs:
        return
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    if y.dim() != 2:
        y = y.view(-1, y.shape[-1])
    _require_rows(groups, x)
    if x.dtype == y.dtype == _weights_dtype(jobs[0]):
        _run_jobs(jobs, y, x, scale)
    else:
        _run_mixed(jobs, y, x, scale, groups)


def _run_jobs(jobs: tuple[_Job, ...], y: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    for job in jobs:
        for segment, products in job.segments:
            _run_segment(segment, products, y, x, scale)
        if job.padded is not None:
            _run_padded(*job.padded, y, x, scale)


def _run_segment(
    segment: Segment, products: tuple[_Product, ...], y: torch.Tensor, x: torch.Tensor, scale: float
) -> None:
    """One GEMM pair per slice for the rows of one slot."""
    rows = segment.rows
    in_place = isinstance(rows, slice)
    x_rows = x[rows] if in_place else x.index_select(0, rows)
    y_rows = y[rows] if in_place else y.index_select(0, rows)
    for one in products:
        low = x_rows[:, : one.b.shape[0]] if one.a is None else torch.mm(x_rows, one.a)
        y_rows[:, one.columns].addmm_(low, one.b, alpha=scale)
    if not in_place:
        y.index_copy_(0, rows, y_rows)


def _run_padded(
    batch: PaddedBatch, products: tuple[_Product, ...], y: torch.Tensor, x: torch.Tensor, scale: float
) -> None:
    """One batched pair of products per slice for many slots with a few rows each."""
    in_place = batch.direct is not None
    x_rows = x[batch.direct] if in_place else x.index_select(0, batch.gather)
    y_rows = y[batch.direct] if in_place else y.index_select(0, batch.gather)
    x_groups = x_rows.view(batch.n_groups, batch.n_each, -1)
    y_groups = y_rows.view(batch.n_groups, batch.n_each, -1)
    for one in products:
        a, b = one.a, one.b
        if one.slots is not None:
            a = None if a is None else a.index_select(0, one.slots)
            b = b.index_select(0, one.slots)
        low = x_groups[:, :, : b.shape[1]] if a is None else torch.bmm(x_groups, a)
        y_groups[:, :, one.columns].baddbmm_(low, b, alpha=scale)
    if not in_place:
        y.index_copy_(0, batch.rows, y_rows if batch.places is None else y_rows.index_select(0, batch.places))


def _weights_dtype(job: _Job) -> torch.dtype:
    products = job.segments[0][1] if job.segments else (job.padded or (None, ()))[1]
    return products[0].b.dtype


def _run_mixed(
    jobs: tuple[_Job, ...], y: torch.Tensor, x: torch.Tensor, scale: float, groups: Groups
) -> None:
    """Do the same where inputs, weights and outputs differ in type: all in fp32, the result rounded once."""
    y_wide = y.float()
    _run_jobs(tuple(map(_in_fp32, jobs)), y_wide, x.float(), scale)
    if y_wide is not y:
        wanted = torch.from_numpy(np.concatenate(groups.rows))
        y.index_copy_(0, wanted, y_wide.index_select(0, wanted).to(y.dtype))


def _in_fp32(job: _Job) -> _Job:
    def widen(products: tuple[_Product, ...]) -> tuple[_Product, ...]:
        return tuple(
            replace(one, a=None if one.a is None else one.a.float(), b=one.b.float()) for one in products
        )

    segments = tuple((segment, widen(products)) for segment, products in job.segments)
    padded = None if job.padded is None else (job.padded[0], widen(job.padded[1]))
    return _Job(segments=segments, padded=padded)
