"""Splits: their grammar, and the laws of weighted rendezvous hashing."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.errors import InvalidReferenceError
from loraplex_registry.refs import AdapterRef
from loraplex_server.errors import ConfigError
from loraplex_server.rollout.splits import TAGS_MAX, WEIGHT_MAX, Split, Splits, Target

TAG = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
SPLIT = (
    st.lists(
        st.tuples(TAG, st.integers(0, WEIGHT_MAX)),
        min_size=1,
        max_size=TAGS_MAX,
        unique_by=lambda arm: arm[0],
    )
    .filter(lambda arms: any(weight for _, weight in arms))
    .map(lambda arms: Split(tuple(arms)))
)


@given(SPLIT)
def test_a_split_reads_as_it_is_written(split: Split) -> None:
    assert Split.parse(str(split)) == split
    assert str(Target.parse(f"acme/orders@{split}")) == f"acme/orders@{split}"


@given(st.text(max_size=60))
def test_any_other_text_is_refused_with_our_own_error(text: str) -> None:
    try:
        split = Split.parse(text)
    except InvalidReferenceError:
        return
    assert Split.parse(str(split)) == split


@pytest.mark.parametrize(
    "text",
    ["", "prod", "prod=", "prod=-1", "prod=1.5", "prod=01", "prod=0", "prod=1,prod=2", "3=1", "a=1," * 9, "A=1",
     "prod=1000001", "prod=95;canary=5", "prod=1\x00"],
)  # fmt: skip
def test_a_split_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidReferenceError):
        Split.parse(text)


def test_a_reference_without_a_split_stays_a_reference() -> None:
    assert Target.parse("acme/orders@prod") == Target(AdapterRef("acme", "orders", tag="prod"))


@given(SPLIT, st.text(max_size=20))
def test_the_tag_of_a_session_is_one_with_a_weight_and_always_the_same(split: Split, session: str) -> None:
    tag = split.choose(session)
    assert dict(split.weights)[tag] > 0
    assert split.choose(session) == tag


@given(SPLIT, st.text(max_size=20), st.integers(0, TAGS_MAX - 1), st.integers(1, WEIGHT_MAX))
def test_a_weight_that_grows_moves_sessions_to_its_tag_only(
    split: Split, session: str, which: int, more: int
) -> None:
    which %= len(split.weights)
    grown = Split(
        tuple(
            (tag, min(WEIGHT_MAX, weight + more * (n == which)))
            for n, (tag, weight) in enumerate(split.weights)
        )
    )
    assert grown.choose(session) in (split.choose(session), split.weights[which][0])


@given(SPLIT, st.text(max_size=20))
def test_leaving_a_tag_out_moves_only_its_own_sessions(split: Split, session: str) -> None:
    gone = split.weights[-1][0]
    before, after = split.choose(session), split.choose(session, without={gone})
    assert after == before or before == gone
    assert after != gone or len(split.weights) == 1


def test_each_tag_gets_its_share_of_sessions() -> None:
    split = Split.parse("prod=90,canary=7,old=3")
    chosen = [split.choose(str(number)) for number in range(20_000)]
    shares = {tag: chosen.count(tag) / len(chosen) for tag, _ in split.weights}
    assert shares == pytest.approx({"prod": 0.90, "canary": 0.07, "old": 0.03}, abs=0.007)


def test_with_nothing_left_the_stable_tag_answers() -> None:
    assert Split.parse("prod=95,canary=5").choose("s", without={"prod", "canary"}) == "prod"
    assert Split.parse("prod=0,canary=5").choose("s", without={"canary"}) == "prod"


def test_the_closest_name_of_a_file_counts_and_only_for_the_stable_tag() -> None:
    text = b'"*" = "prod=99,canary=1"\n"acme/*" = "prod=90,canary=10"\n"acme/orders" = "live=50,next=50"\n'
    splits = Splits.parse(text, origin=Path("splits.toml"))

    def found(ref: str) -> str:
        return str(splits.for_call(Target.parse(ref)))

    assert found("acme/orders@live") == "live=50,next=50"
    assert found("acme/orders@prod") == "None"
    assert found("acme/support@prod") == "prod=90,canary=10"
    assert found("globex/support@prod") == "prod=99,canary=1"
    assert found("globex/support") == found("globex/support@3") == found("globex/support@canary") == "None"
    assert found("globex/support@a=1,b=1") == "a=1,b=1"


@pytest.mark.parametrize(
    "line", ['acme = "prod=1"', '"acme/" = "prod=1"', '"acme/x" = 5', '"*/x" = "prod=1"', "[", "\xff"]
)
def test_a_file_that_makes_no_sense_is_refused_with_its_name(line: str) -> None:
    with pytest.raises(ConfigError, match=r"splits\.toml"):
        Splits.parse(line.encode("latin-1"), origin=Path("splits.toml"))
