"""References: the grammar, its round trip, and that no name reaches outside."""

import random
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.errors import InvalidReferenceError
from loraplex_registry.format import layout
from loraplex_registry.refs import AdapterRef, Version, parse_version, version_order

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True).filter(
    lambda name: ".." not in name
)
tags = names.filter(lambda name: name[0].isalpha())
digests = st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256:{}".format)
_numbers = st.integers(0, 12) | st.integers(0, 999_999_999)
_identifiers = st.from_regex(r"[0-9a-z-]{0,4}[a-z-][0-9a-z-]{0,4}", fullmatch=True) | _numbers.map(str)
semvers = (
    st.builds(
        lambda numbers, pre: ".".join(map(str, numbers)) + ("-" + ".".join(pre) if pre else ""),
        st.tuples(_numbers, _numbers, _numbers),
        st.lists(_identifiers, max_size=3),
    )
    .filter(lambda text: not text.endswith("-"))
    .filter(lambda text: len(text) <= 64)
)
versions = st.integers(1, 999_999_999) | semvers
refs = st.builds(AdapterRef, names, names) | st.one_of(
    st.builds(AdapterRef, names, names, tag=tags),
    st.builds(AdapterRef, names, names, version=versions),
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
        "acme/orders@1.2",
        "acme/orders@1.02.3",
        "acme/orders@1.2.3-01",
        "acme/orders@1.2.3-a..b",
        "acme/orders@1.2.3-",
        "acme/orders@1.2.3+build",
        "acme/orders@1.2.3-RC",
        "acme/orders@1.2.1000000000",
        "acme/orders@1.2.3-" + "a" * 60,
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


@given(versions)
def test_a_written_version_reads_back_as_itself(version: Version) -> None:
    assert parse_version(str(version)) == version
    assert (
        layout.version_of_record(layout.version_key(AdapterRef("a", "b"), version).split("/")[-1]) == version
    )
    assert layout.parse_blob_group(layout.blob_group(version, "0" * 32)) == (version, "0" * 32)


@given(versions, versions)
def test_two_versions_are_equal_in_order_only_when_they_are_the_same(one: Version, two: Version) -> None:
    assert (version_order(one) == version_order(two)) == (one == two)
    assert (version_order(one) < version_order(two)) == (version_order(two) > version_order(one))


def test_versions_are_ordered_as_the_specification_of_semver_says() -> None:
    # Section 11 of Semantic Versioning 2.0.0; a number stands before the semantic versions it begins.
    ordered = [
        "0.9.9",
        1,
        "1.0.0-alpha",
        "1.0.0-alpha.1",
        "1.0.0-alpha.beta",
        "1.0.0-beta",
        "1.0.0-beta.2",
        "1.0.0-beta.11",
        "1.0.0-rc.1",
        "1.0.0",
        "1.0.1",
        "1.2.0",
        "1.10.0",
        2,
        "2.0.0",
        10,
    ]
    assert sorted(random.Random(0).sample(ordered, len(ordered)), key=version_order) == ordered
