"""The tensors of a safetensors file as views of its pages: nothing is copied, and every tensor is a place to pause.

The header meets the registry's own limits and its own strict reader once more, as it did when the adapter was verified.
(The usual library takes longer for each tensor than the kernels' packing of it, and cannot be interrupted.)
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

import torch

from loraplex_registry.validation.safetensors_header import Header, HeaderError, check_contiguous, read_header
from loraplex_registry.validation.weights import Limits

DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LIMITS: Final = Limits()


def read_tensors(path: Path, pause: Callable[[], None] = lambda: None) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name; they keep its pages mapped.

    What is written to them stays theirs. A file that is cut off while they are used ends the process (SIGBUS, mmap(2)),
    as with any reader that maps files: the server's copies of adapters are its own, and replaced, not changed.

    Args:
        path: the file.
        pause: called after the header and after each tensor.

    Raises:
        ValueError: it is no safetensors file within the registry's limits, or has numbers of another type.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            header = _header(file)
        except HeaderError as error:
            raise ValueError(f"{path.name}: {error}") from error
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pause()
    tensors = {}
    for entry in header.tensors:
        if (dtype := DTYPES.get(entry.dtype)) is None:
            raise ValueError(f"{path.name} has numbers of type {entry.dtype}, not {', '.join(DTYPES)}")
        flat = torch.frombuffer(
            pages, dtype=dtype, count=entry.n_elements, offset=header.data_offset + entry.begin
        )
        tensors[entry.name] = flat.view(entry.shape)
        pause()
    return tensors


def _header(file: BinaryIO) -> Header:
    header = read_header(
        file,
        header_bytes_max=LIMITS.max_header_bytes,
        tensors_max=LIMITS.max_tensors,
        metadata_bytes_max=LIMITS.max_metadata_bytes,
    )
    check_contiguous(header, file_size_bytes=os.fstat(file.fileno()).st_size)
    return header
