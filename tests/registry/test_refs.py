"""References: the grammar, its round trip, and that no name reaches outside."""

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry import layout
from loraplex_registry.errors import InvalidReferenceError
from loraplex_registry.refs import AdapterRef

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True).filter(
    lambda name: ".." not in name
)
tags = names.filter(lambda name: name[0].isalpha())
digests = st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256:{}".format)
refs = st.builds(AdapterRef, names, names) | st.one_of(
    st.builds(AdapterRef, names, names, tag=tags),
    st.builds(AdapterRef, names, names, version=st.integers(1, 999_999_999)),
    st.builds(AdapterRef, names, names, digest=digests),
)


@given(refs)
def test_a_written_reference_reads_back_as_itself(ref: AdapterRef) -> None:
    assert AdapterRef.parse(str(ref)) == ref


@given(st.text(st.sampled_from(string.printable + "é\0\u202e"), max_size=80))
def test_any_text_is_a_safe_reference_or_refused(text: str) -> None:
    try:
        ref = AdapterRef.parse(text)
    except InvalidReferenceError:
        return
    key = layout.tag_key(ref, ref.tag) if ref.tag else layout.version_key(ref, ref.version or 1)
    root = Path("/root")
    assert (root / key).resolve().is_relative_to(root)
    assert len(key.split("/")) == 6
    assert str(AdapterRef.parse(str(ref))) == str(ref)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acme",
        "acme/",
        "/orders",
        "acme/orders@",
        "acme/orders@03",
        "acme/orders@0",
        "acme/orders@1x",
        "acme/orders@1000000000",
        "Acme/orders",
        "acme/../x",
        "acme/a..b",
        "acme/orders/x",
        "acme/orders@a/b",
        "acme/orders@sha256:abc",
        "acme/orders@sha256:" + "A" * 64,
        "acme/orders\n",
        "acme/orders@prod\n",
        "a" * 65 + "/orders",
        "acme%2f/orders",
    ],
)
def test_text_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(InvalidReferenceError) as caught:
        AdapterRef.parse(text)
    assert caught.value.code == "INVALID_ARGUMENT"


def test_a_reference_with_two_selectors_is_refused() -> None:
    with pytest.raises(InvalidReferenceError):
        AdapterRef("acme", "orders", tag="prod", version=1)
