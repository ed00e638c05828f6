"""What may be a key, a prefix, a range: checked by every store before anything becomes a path or a request."""

from __future__ import annotations

import re
from typing import Final

from ..errors import InvalidReferenceError

KEY_CHARS_MAX: Final = 900
"""Longest key below the root, in characters; S3 takes 1024 with the prefix."""

_SEGMENT: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._~-]{0,126}[A-Za-z0-9])?")


def require_key(key: str) -> None:
    """Check that a key is a path of allowed segments; nothing else ever becomes a path or a request.

    Raises:
        InvalidReferenceError: it is not.
    """
    if len(key) > KEY_CHARS_MAX or not all(is_name(segment) for segment in key.split("/")):
        raise InvalidReferenceError(f"key {key[:200]!r} is not allowed.")


def require_prefix(prefix: str) -> None:
    """Check a prefix to list: empty for the root, otherwise a key followed by '/'.

    Raises:
        InvalidReferenceError: it is neither.
    """
    if prefix and not prefix.endswith("/"):
        raise InvalidReferenceError(f"prefix {prefix[:200]!r} does not end in '/'.")
    if prefix:
        require_key(prefix[:-1])


def is_name(name: str) -> bool:
    """Say whether a listed name is one segment of a key; listings pass over everything else."""
    return bool(_SEGMENT.fullmatch(name)) and ".." not in name


def require_range(key: str, *, start: int, length: int, size_bytes: int) -> None:
    """Check a range a caller asks for.

    Raises:
        InvalidReferenceError: it is not within the blob, or empty although the blob is not.
    """
    if start < 0 or length < (size_bytes > 0) or start + length > size_bytes:
        raise InvalidReferenceError(
            f"bytes {start}..{start + length} of {key} are not within its {size_bytes}; ask for less."
        )


def require_blob_key(key: str) -> None:
    """Check that a key may be deleted: it lies below a segment `b` and does not end in `.json`, as all records do.

    The ending is looked at too because a tenant or an adapter may be called `b`.

    Raises:
        InvalidReferenceError: it may be a record, a tag or an entry of a log.
    """
    require_key(key)
    if "b" not in key.split("/")[:-1] or key.endswith(".json"):
        raise InvalidReferenceError(f"{key[:200]!r} is no blob; only blobs can be deleted.")
