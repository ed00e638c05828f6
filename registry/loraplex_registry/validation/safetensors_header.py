"""A bounded reader of safetensors headers that never touches tensor data and runs no foreign code.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length N, N bytes of
JSON, then the tensors' bytes back to back. The usual library accepts 100 MB headers, duplicate keys, 200,000
zero-sized tensors and any tensor name; an adapter needs none of that, so a stranger's file meets these limits first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from ..format.canonical import StrictJsonError, exact_object, parse

DTYPE_BYTES: Final = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
"""Bytes per element of the dtypes whose size is a whole number of bytes."""

_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_DIMENSIONS_MAX = 8


class HeaderError(ValueError):
    """The file does not begin with an acceptable header. Never leaves the package."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header tells it: name, dtype name, shape, bytes `begin:end` counted from `data_offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors in file order, where their bytes begin, and the metadata strings."""

    tensors: tuple[TensorEntry, ...]
    data_offset: int
    metadata: dict[str, str]


def read_header(
    file: BinaryIO, *, header_bytes_max: int, tensors_max: int, metadata_bytes_max: int
) -> Header:
    """Read the header from the start of `file`; at most `8 + header_bytes_max` bytes are read.

    Raises:
        HeaderError: truncated, over a limit, or not of the format.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise HeaderError("the file ends before its header")
    length = int.from_bytes(prefix, "little")
    if length > header_bytes_max:
        raise HeaderError(f"the header says {length} bytes, more than the limit of {header_bytes_max}")
    body = file.read(length)
    if len(body) < length:
        raise HeaderError("the file ends inside its header")
    if not body.startswith(b"{"):
        raise HeaderError("the header is not a JSON object")
    return _header(body, tensors_max=tensors_max, metadata_bytes_max=metadata_bytes_max)


def check_contiguous(header: Header, *, file_size_bytes: int) -> None:
    """Check that tensors fill the file after the header exactly: no hole, no overlap, no empty tensor, no tail.

    Raises:
        HeaderError: they do not, or a size disagrees with shape and dtype, or the dtype is unknown.
    """
    position = 0
    for tensor in header.tensors:
        width = DTYPE_BYTES.get(tensor.dtype)
        if width is None:
            raise HeaderError(f"tensor {_shown(tensor.name)} has the unknown dtype {tensor.dtype[:16]!a}")
        if tensor.begin != position or tensor.n_elements == 0:
            raise HeaderError(f"tensor {_shown(tensor.name)} is empty, overlaps another or leaves a hole")
        if tensor.end - tensor.begin != tensor.n_elements * width:
            raise HeaderError(
                f"tensor {_shown(tensor.name)} has a size that does not follow from shape and dtype"
            )
        position = tensor.end
    expected = header.data_offset + position
    if expected != file_size_bytes:
        word = "truncated" if file_size_bytes < expected else "too long"
        raise HeaderError(f"the file is {word}: {file_size_bytes} bytes where the header says {expected}")


def _header(body: bytes, *, tensors_max: int, metadata_bytes_max: int) -> Header:
    try:
        entries = parse(body, limit_bytes=len(body))
        metadata = _metadata(entries.pop("__metadata__", {}), metadata_bytes_max)
        if len(entries) > tensors_max:
            raise HeaderError(f"{len(entries)} tensors, more than the limit of {tensors_max}")
        tensors = [_entry(name, value) for name, value in entries.items()]
    except StrictJsonError as error:
        raise HeaderError(f"the header is refused: {error}") from error
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    return Header(tuple(tensors), 8 + len(body), metadata)


def _metadata(value: object, limit_bytes: int) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise HeaderError("__metadata__ is not a map of strings")
    if sum(len(key) + len(text) for key, text in value.items()) > limit_bytes:
        raise HeaderError(f"__metadata__ is longer than {limit_bytes} characters")
    return value


def _entry(name: str, value: Any) -> TensorEntry:
    shown = _shown(name)
    fields = exact_object(value, _ENTRY_KEYS)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets):
        raise HeaderError(f"tensor {shown} is described by values of the wrong kind")
    if len(shape) > _DIMENSIONS_MAX or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"tensor {shown} has an impossible shape or position")
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _shown(name: str) -> str:
    return ascii(name[:128])


def _is_sizes(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _DIMENSIONS_MAX
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )
