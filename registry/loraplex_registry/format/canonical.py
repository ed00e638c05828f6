"""JSON at a trust boundary: read strictly, written canonically.

Python's `json` accepts duplicate keys (the last wins), NaN, Infinity and `1e999`; two readers of one signed document
could then see two documents. Everything that comes from outside passes through `parse`. Everything we sign or hash
is written by `canonical` (RFC 8785), so equal values are equal bytes.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any, Final, NoReturn

import rfc8785

JSON_BYTES_MAX: Final = 1 << 20
"""Largest JSON document read from a store or a directory, in bytes (1 MiB)."""


_INT_MAX: Final = 2**53 - 1
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


class StrictJsonError(ValueError):
    """The bytes are not the JSON we accept. Never leaves the package: callers name the file in their own error."""


def parse(body: bytes, *, limit_bytes: int = JSON_BYTES_MAX) -> Any:
    """Return the value of a UTF-8 JSON document.

    Args:
        body: the whole document.
        limit_bytes: longest document accepted.

    Raises:
        StrictJsonError: too long, not UTF-8, not JSON, a key twice, a number that is not finite, nested too deep.
    """
    if len(body) > limit_bytes:
        raise StrictJsonError(f"longer than {limit_bytes} bytes")
    try:
        return json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except StrictJsonError:
        raise
    except RecursionError as error:
        raise StrictJsonError("nested too deep") from error
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError and over-long integers
        raise StrictJsonError("not valid JSON") from error


def canonical(value: Any) -> bytes:
    """Return the RFC 8785 bytes of a JSON value.

    Raises:
        StrictJsonError: a value JSON cannot carry exactly (integer beyond 2**53, lone surrogate, NaN).
    """
    try:
        return _ENCODER.encode(value).encode("ascii") if _is_plain(value) else rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise StrictJsonError("not representable as canonical JSON") from error


def parse_canonical(body: bytes, *, limit_bytes: int = JSON_BYTES_MAX) -> Any:
    """Return the value of a document that must already be in canonical form.

    One value then has exactly one spelling, so no byte of a stored record can change without being seen.

    Raises:
        StrictJsonError: as `parse`, or the bytes are not canonical.
    """
    value = parse(body, limit_bytes=limit_bytes)
    if canonical(value) != body:
        raise StrictJsonError("not in canonical form")
    return value


def b64encode(body: bytes) -> str:
    """Return standard base64 with padding."""
    return base64.b64encode(body).decode("ascii")


def b64decode(text: object) -> bytes:
    """Return the bytes of a base64 string that has its one canonical spelling.

    Python ignores the unused low bits of the last character, so two texts can mean the same bytes; we accept one.

    Raises:
        StrictJsonError: not a string, not base64, or not the canonical spelling.
    """
    if not isinstance(text, str):
        raise StrictJsonError("not a base64 string")
    try:
        body = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise StrictJsonError("not base64") from error
    if b64encode(body) != text:
        raise StrictJsonError("not canonical base64")
    return body


def exact_object(
    value: object, required: frozenset[str], *, optional: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return `value` as a dict that has all `required` keys and none beyond `optional`.

    Raises:
        StrictJsonError: not an object, a key missing, a key too many (named).
    """
    if not isinstance(value, dict):
        raise StrictJsonError("not an object")
    missing = sorted(required - value.keys())
    unknown = sorted(value.keys() - required - optional)
    if missing:
        raise StrictJsonError(f"key {missing[0]!r} is missing")
    if unknown:
        raise StrictJsonError(f"key {unknown[0][:64]!r} is unknown")
    return value


def _is_plain(value: object) -> bool:
    """Say whether a value holds nothing but objects, lists, ASCII texts, booleans, nulls and integers that are exact.

    Of such a value the standard library's encoder writes the RFC 8785 bytes, ten times as fast as `rfc8785`: the
    RFC's own number format and its order of keys by UTF-16 units differ for floats and for characters beyond ASCII
    alone. A record is written out four times while it is resolved and verified.
    """
    kind = type(value)
    if kind is str:
        return value.isascii()  # type: ignore[attr-defined,no-any-return]
    if kind is dict:
        return all(
            type(key) is str and key.isascii() and _is_plain(item)
            for key, item in value.items()  # type: ignore[attr-defined]
        )
    if kind is list or kind is tuple:
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    if kind is int:
        return -_INT_MAX <= value <= _INT_MAX  # type: ignore[operator]
    return value is None or kind is bool


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise StrictJsonError(f"key {twice[:64]!r} appears twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise StrictJsonError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJsonError("a number is not finite")
    return value
