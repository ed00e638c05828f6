"""Records and tags: their states, their canonical form, and fuzzed readers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.canonical import canonical
from loraplex_registry.errors import DamagedError
from loraplex_registry.record import AbortedRecord, PendingRecord, read_record
from loraplex_registry.tags import TagStatement, read_tag
from tests.registry.test_refs import digests, names, tags

pids = st.text("0123456789abcdef", min_size=32, max_size=32)
pending = st.builds(PendingRecord, pids, names, st.integers(0, 2**40), st.integers(0, 10**6))
aborted = st.builds(AbortedRecord, pids, names)
statements = st.builds(
    TagStatement,
    names,
    names,
    tags,
    st.integers(1, 2**40),
    st.integers(1, 999_999_999),
    digests.map(lambda digest: digest[7:]),
    st.just("") | pids,
    st.just("2026-06-01T12:00:00Z"),
)


@given(pending | aborted)
def test_a_record_reads_back_as_itself(record: PendingRecord | AbortedRecord) -> None:
    assert read_record(record.to_bytes(), version=1, where="x") == record


@given(statements)
def test_a_tag_statement_reads_back_as_itself(statement: TagStatement) -> None:
    assert TagStatement.from_bytes(statement.to_bytes()) == statement


@given(pending, st.floats(0, 2**41))
def test_a_lease_is_over_after_its_seconds_and_not_before(record: PendingRecord, now: float) -> None:
    assert record.lease_over(now) == (now - record.started_s > record.lease_s)


@given(
    body=st.binary(max_size=100)
    | st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_anything_else_is_damage(body: bytes) -> None:
    with pytest.raises(DamagedError):
        read_record(body, version=1, where="x")
    with pytest.raises(DamagedError):
        read_tag(body, where="x")


@pytest.mark.parametrize(
    "change", [{"fmt": 2}, {"state": "committed"}, {"state": "gone"}, {"pid": "x"}, {"extra": 1}, {"t": -1}]
)
def test_a_record_out_of_shape_is_damage(change: dict[str, object]) -> None:
    value = {**json.loads(PendingRecord("0" * 32, "me", 5, 6).to_bytes()), **change}
    with pytest.raises(DamagedError):
        read_record(canonical(value), version=1, where="x")
