"""Is this directory a plain LoRA adapter that fits this base? The same answer at push and at load.

`validate_adapter` reads two files within limits, decodes no tensor, calls no library that could run code, and either
returns facts or raises one of three declared errors. The order is cheap to dear: names, sizes, settings, header,
shapes, and only then one pass over the weights that hashes them and looks for NaN and infinity.

It does not judge who made the adapter; that is `trust`.
"""

from __future__ import annotations

import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import BaseMismatchError, RankTooLargeError, UnsupportedAdapterError
from ..format.hashing import PIECE_BYTES, FileHasher, entry_of
from ..format.manifest import FileEntry
from .base import CARD_NAME, BaseModel, Progress
from .lora_config import CONFIG_BYTES_MAX, CONFIG_NAME, AdapterConfig, ModuleRules, read_config
from .safetensors_header import Header, HeaderError, TensorEntry, check_contiguous, read_header
from .scan import FiniteScan

WEIGHTS_NAME: Final = "adapter_model.safetensors"
MANIFEST_NAME: Final = "adapter.manifest.json"
BUNDLE_NAME: Final = "adapter.sig.json"
TEXT_BYTES_MAX: Final = 256 << 10
"""Longest README.md or LICENSE file, in bytes (256 KiB)."""

DIRECTORY_ENTRIES_MAX: Final = 64
"""Most entries looked at in an adapter directory."""

_LICENSE = re.compile(r"LICENSE(?:\.(?:md|txt))?")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)"
    r"\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB])"
)
_TENSOR_NAME_LENGTH_MAX = 512
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings"})
_FLOATS: Final = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True, slots=True)
class Limits:
    """What an adapter may be, each limit with its unit."""

    max_rank: int = 512
    """Largest LoRA rank of any module."""
    max_bytes: int = 2 << 30
    """Largest adapter_model.safetensors, bytes (2 GiB)."""
    max_tensors: int = 20_000
    """Most tensors in the file."""
    max_header_bytes: int = 1 << 20
    """Longest safetensors header, bytes (1 MiB; a rank-any adapter of an 80-layer model needs about 0.2)."""
    max_metadata_bytes: int = 16 << 10
    """Longest safetensors __metadata__, characters (16 Ki)."""
    embeddings: bool = True
    """Whether the embedding and the output layer may be adapted."""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What was found in an accepted adapter.

    Attributes:
        rank: largest rank of any module in the file.
        alpha: default lora_alpha.
        dtype: `F16`, `BF16`, `F32`, or `mixed`.
        target_modules: sorted target_modules of the configuration.
        n_tensors, n_params: tensors and numbers in the file.
        size_bytes: size of adapter_model.safetensors.
        config: the checked settings.
        files: the files that make up the adapter, sorted by name (never the base card, manifest or signature).
    """

    rank: int
    alpha: float
    dtype: str
    target_modules: tuple[str, ...]
    n_tensors: int
    n_params: int
    size_bytes: int
    config: AdapterConfig
    files: tuple[FileEntry, ...]


def validate_adapter(
    directory: str | Path, base: BaseModel, limits: Limits | None = None, *, progress: Progress | None = None
) -> AdapterFacts:
    """Check an adapter directory against limits and a base model, and hash it.

    Args:
        directory: regular files only; see `docs/format.md` for the names allowed.
        base: the base whose layer table the shapes must fit.
        limits: default `Limits()`.
        progress: called with phase "check" and bytes of the weights file.

    Raises:
        UnsupportedAdapterError: a file that does not belong, a truncated or foreign file, a setting beyond plain
            LoRA, NaN or infinity among the weights.
        RankTooLargeError: a rank above `limits.max_rank`.
        BaseMismatchError: a module the base does not have, or of another shape.
    """
    limits = limits or Limits()
    place = Path(directory)
    names = _file_names(place)
    config_body = read_small(place / CONFIG_NAME, limit_bytes=CONFIG_BYTES_MAX)
    config = read_config(config_body, rank_max=limits.max_rank)
    texts = [name for name in names if name == "README.md" or _LICENSE.fullmatch(name)]
    with open_regular(place / WEIGHTS_NAME) as file:
        header = _checked_header(file, limits)
        ranks = _check_shapes(header, config, base, limits)
        weights = _hash_finite(file, header, progress)
    files = [entry_of(CONFIG_NAME, config_body), weights]
    files += [entry_of(name, read_small(place / name, limit_bytes=TEXT_BYTES_MAX)) for name in texts]
    dtypes = {tensor.dtype for tensor in header.tensors}
    return AdapterFacts(
        rank=max(ranks),
        alpha=config.alpha,
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        target_modules=config.target_modules,
        n_tensors=len(header.tensors),
        n_params=sum(tensor.n_elements for tensor in header.tensors),
        size_bytes=weights.size,
        config=config,
        files=tuple(sorted(files, key=lambda fact: fact.name)),
    )


def check_weights(file: BinaryIO, config: AdapterConfig, base: BaseModel, limits: Limits) -> int:
    """Check header and shapes of a weights file without reading its numbers, and return the largest rank found.

    For bytes that were checked whole before, under limits or a base that may have been others.

    Raises:
        UnsupportedAdapterError, RankTooLargeError, BaseMismatchError: as `validate_adapter`.
    """
    file.seek(0)
    return max(_check_shapes(_checked_header(file, limits), config, base, limits))


def check_head(
    head: bytes, size_bytes: int, config: AdapterConfig, base: BaseModel, limits: Limits
) -> tuple[Header, int]:
    """Check header and shapes of a weights file of which only the beginning is there yet.

    Args:
        head: at least the header.
        size_bytes: size the whole file will have.
        config: the checked settings.
        base: the base whose layer table the shapes must fit.
        limits: what an adapter may be.

    Returns:
        The header, and the largest rank found.

    Raises:
        UnsupportedAdapterError, RankTooLargeError, BaseMismatchError: as `validate_adapter`.
    """
    header = _header_of(io.BytesIO(head), size_bytes, limits)
    return header, max(_check_shapes(header, config, base, limits))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, never through a link.

    Raises:
        UnsupportedAdapterError: absent, a link, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnsupportedAdapterError(
            f"{path.name} cannot be opened as a plain file in {path.parent} ({error.strerror}); "
            f"an adapter needs {CONFIG_NAME} and {WEIGHTS_NAME}."
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsupportedAdapterError(f"{path.name} is not a regular file; replace it by a plain file.")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, *, limit_bytes: int) -> bytes:
    """Return the bytes of a small regular file.

    Raises:
        UnsupportedAdapterError: absent, a link, empty, or longer than `limit_bytes`.
    """
    with open_regular(path) as file:
        body = file.read(limit_bytes + 1)
    if not 0 < len(body) <= limit_bytes:
        raise UnsupportedAdapterError(f"{path.name} is empty or longer than {limit_bytes} bytes; shorten it.")
    return body


def _file_names(place: Path) -> list[str]:
    """List the directory and refuse everything that an adapter has no use for."""
    try:
        with os.scandir(place) as entries:
            found = [entry for _, entry in zip(range(DIRECTORY_ENTRIES_MAX + 1), entries, strict=False)]
    except OSError as error:
        raise UnsupportedAdapterError(f"{place} cannot be read as a directory ({error.strerror}).") from error
    if len(found) > DIRECTORY_ENTRIES_MAX:
        raise UnsupportedAdapterError(
            f"{place} holds more than {DIRECTORY_ENTRIES_MAX} entries; give one adapter."
        )
    for entry in found:
        _check_entry(entry)
    return sorted(entry.name for entry in found)


def check_file_name(name: str) -> None:
    """Refuse a file that an adapter has no use for, by its name alone.

    Raises:
        UnsupportedAdapterError: pickled weights, code, or anything else that is not on the list.
    """
    shown = ascii(name[:128])
    if name.lower().endswith(_PICKLES):
        raise UnsupportedAdapterError(
            f"{shown} may hold pickled code; save the adapter as safetensors and remove it."
        )
    known = {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, MANIFEST_NAME, BUNDLE_NAME, "README.md"}
    if name not in known and not _LICENSE.fullmatch(name):
        raise UnsupportedAdapterError(
            f"{shown} does not belong to an adapter; keep {CONFIG_NAME}, {WEIGHTS_NAME}, {CARD_NAME}, README.md "
            "and LICENSE, or let `registry import` leave the rest behind."
        )


def _check_entry(entry: os.DirEntry[str]) -> None:
    check_file_name(entry.name)
    status = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise UnsupportedAdapterError(
            f"{entry.name[:128]!a} is a link or not a regular file; replace it by a copy."
        )


def _checked_header(file: BinaryIO, limits: Limits) -> Header:
    return _header_of(file, os.fstat(file.fileno()).st_size, limits)


def _header_of(file: BinaryIO, size: int, limits: Limits) -> Header:
    if size > limits.max_bytes:
        raise UnsupportedAdapterError(f"{WEIGHTS_NAME} has {size} bytes, the limit is {limits.max_bytes}.")
    try:
        header = read_header(
            file,
            header_bytes_max=limits.max_header_bytes,
            tensors_max=limits.max_tensors,
            metadata_bytes_max=limits.max_metadata_bytes,
        )
        check_contiguous(header, file_size_bytes=size)
    except HeaderError as error:
        raise UnsupportedAdapterError(f"{WEIGHTS_NAME} is refused: {error}; save it again.") from error
    if not header.tensors:
        raise UnsupportedAdapterError(f"{WEIGHTS_NAME} holds no tensor; train at least one module.")
    return header


def _check_shapes(header: Header, config: AdapterConfig, base: BaseModel, limits: Limits) -> list[int]:
    """Check every A/B pair and return the ranks found."""
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for tensor in header.tensors:
        module, part = _module_and_part(tensor)
        if part in pairs.setdefault(module, {}):
            raise UnsupportedAdapterError(f"{module} has {part} twice; save the adapter again.")
        pairs[module][part] = tensor
    rules = ModuleRules(config)
    return [_check_pair(module, pair, rules, base, limits) for module, pair in pairs.items()]


def _module_and_part(tensor: TensorEntry) -> tuple[str, str]:
    match = _TENSOR_NAME.fullmatch(tensor.name) if len(tensor.name) <= _TENSOR_NAME_LENGTH_MAX else None
    shown = ascii(tensor.name[:128])
    if match is None:
        raise UnsupportedAdapterError(
            f"Tensor {shown} is not a LoRA weight; save with PEFT and without whole layers or embeddings."
        )
    if tensor.dtype not in _FLOATS or len(tensor.shape) != 2:
        raise UnsupportedAdapterError(
            f"Tensor {shown} must be a matrix of F16, BF16 or F32, not {tensor.dtype}."
        )
    return match["module"], match["part"].removesuffix(".weight")


def _check_pair(
    module: str, pair: dict[str, TensorEntry], rules: ModuleRules, base: BaseModel, limits: Limits
) -> int:
    embedding = module.rpartition(".")[2] in _EMBEDDINGS
    a, b = (f"lora_embedding_{half}" if embedding else f"lora_{half}" for half in "AB")
    if set(pair) != {a, b}:
        raise UnsupportedAdapterError(
            f"{module} must have exactly {a} and {b}, it has {', '.join(sorted(pair))}."
        )
    if module not in base.layers:
        raise BaseMismatchError(
            f"{module} is not a layer of base {base.name}; train on the base that serves it."
        )
    if not limits.embeddings and base.vocab_size in base.layers[module]:
        raise UnsupportedAdapterError(
            f"{module} belongs to the vocabulary, and this server holds adapters of the layers between only; "
            "set adapters.embeddings = true there, or train without it."
        )
    if not rules.targets(module):
        raise UnsupportedAdapterError(
            f"{module} is not covered by target_modules of {CONFIG_NAME}; save it again."
        )
    rank = pair[a].shape[0]
    if rank > limits.max_rank:
        raise RankTooLargeError(
            f"{module} has rank {rank}, the limit is {limits.max_rank}; train it smaller."
        )
    if rank != rules.rank_of(module) or pair[b].shape[1] != rank:
        raise UnsupportedAdapterError(
            f"{module} has shapes {pair[a].shape} and {pair[b].shape}, {CONFIG_NAME} says rank "
            f"{rules.rank_of(module)}; save it again."
        )
    width_in, width_out = base.layers[module][::-1] if embedding else base.layers[module]
    if (pair[a].shape[1], pair[b].shape[0]) != (width_in, width_out):
        raise BaseMismatchError(
            f"{module} maps {pair[a].shape[1]} to {pair[b].shape[0]}, in base {base.name} it maps {width_in} to "
            f"{width_out}; train on the base that serves it."
        )
    return rank


def _hash_finite(file: BinaryIO, header: Header, progress: Progress | None) -> FileEntry:
    """Hash the whole file in one pass, refusing weights that are not finite."""
    digest, scan = FileHasher(), FiniteScan(header)
    look = scan.chunk(0)
    done, total = 0, header.data_offset + header.tensors[-1].end
    buffer = memoryview(bytearray(min(PIECE_BYTES, total)))
    file.seek(0)
    while done < total:
        count = file.readinto(buffer[: total - done])  # type: ignore[attr-defined]
        if not count:
            raise UnsupportedAdapterError(
                f"{WEIGHTS_NAME} became shorter while it was read; leave it alone and retry."
            )
        digest.update(buffer[:count])
        look.feed(buffer[:count])
        done += count
        if progress is not None:
            progress("check", done, total)
    scan.accept(look)
    refuse_not_finite(scan)
    return digest.entry(WEIGHTS_NAME)


def refuse_not_finite(scan: FiniteScan) -> None:
    """Refuse weights in which a scan found NaN or infinity.

    Raises:
        UnsupportedAdapterError: it did.
    """
    bad = scan.bad_tensor()
    if bad is not None:
        raise UnsupportedAdapterError(f"Tensor {bad!r} holds NaN or infinity; the training diverged.")
