"""JSON at the trust boundary."""

import json

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from loraplex_registry.format.canonical import (
    StrictJsonError,
    b64decode,
    b64encode,
    canonical,
    parse,
    parse_canonical,
)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(values.filter(lambda value: "\ud800" not in json.dumps(value)))
def test_canonical_bytes_read_back_as_the_same_value_and_bytes(value: object) -> None:
    body = canonical(value)
    assert parse_canonical(body) == value
    assert canonical(parse(body)) == body


mixed = st.recursive(
    values | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**55), 2**55) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(mixed)
@example({"\x7f": '\x00\x1f\x7f"\\/\b\f\n\r\t', "a": [], "b": {}, "A": (1, True, None)})
@example({"\ufb33": 1, "\U0001f600": 2})  # sorted by UTF-16 units, not by code points
@example([2**53 - 1, -(2**53) + 1])
@example([2**53])
@example([32.0, 1e21, -0.0])
def test_canonical_bytes_are_those_of_the_reference_library(value: object) -> None:
    try:
        wanted = rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError):
        with pytest.raises(StrictJsonError):
            canonical(value)
        return
    assert canonical(value) == wanted


@pytest.mark.parametrize("value", [b"bytes", {1: "a number as a key"}, {"a": {1, 2}}, float("nan")])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(StrictJsonError):
        canonical(value)


@pytest.mark.parametrize(
    "body",
    [
        b'{"r":8,"r":100000}',
        b'{"a":{"b":1,"b":1}}',
        b"NaN",
        b'{"alpha":Infinity}',
        b'{"alpha":1e999}',
        b"[" * 100_000,
        b"\xff",
        b"{}x",
        b"",
        b'{"a":' + b"1" * 5000 + b"}",
    ],
)
def test_json_that_two_readers_could_read_differently_is_refused(body: bytes) -> None:
    with pytest.raises(StrictJsonError):
        parse(body)


def test_a_document_over_the_limit_is_refused() -> None:
    with pytest.raises(StrictJsonError):
        parse(b"[1,2,3]", limit_bytes=6)


@pytest.mark.parametrize("body", [b'{"b":1,"a":2}', b'{"a": 1}', b"[1.0]", b'"\\u0041"'])
def test_a_second_spelling_of_a_value_is_refused(body: bytes) -> None:
    parse(body)
    with pytest.raises(StrictJsonError):
        parse_canonical(body)


@given(st.binary(max_size=40))
def test_base64_has_one_spelling(body: bytes) -> None:
    assert b64decode(b64encode(body)) == body


@pytest.mark.parametrize("text", ["QR==", "QQ=", "QQ", "Q Q==", "QQ==\n", 5, None])
def test_other_spellings_of_base64_are_refused(text: object) -> None:
    assert b64decode("QQ==") == b"A"
    with pytest.raises(StrictJsonError):
        b64decode(text)
