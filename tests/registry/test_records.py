"""Records and tags: their states, their canonical form, and fuzzed readers."""

import datetime as dt
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.errors import DamagedError, SignatureInvalidError
from loraplex_registry.format import layout
from loraplex_registry.format.canonical import canonical
from loraplex_registry.format.record import (
    AbortedRecord,
    CommittedRecord,
    DeletedRecord,
    DeletingRecord,
    Encryption,
    PendingRecord,
    Record,
    StoredFile,
    read_record,
)
from loraplex_registry.format.tags import TagStatement, read_tag
from tests.registry.test_manifest import hexes
from tests.registry.test_refs import names, tags, versions

pids = st.text("0123456789abcdef", min_size=32, max_size=32)
moments = st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2200, 1, 1)).map("{:%Y-%m-%dT%H:%M:%SZ}".format)
pending = st.builds(PendingRecord, pids, names, st.integers(0, 2**40), st.integers(0, 10**6))
aborted = st.builds(AbortedRecord, pids, names)
deleted = st.builds(DeletedRecord, pids, hexes, st.integers(0, 2**40), names)


@st.composite
def committed(draw: st.DrawFn) -> CommittedRecord:
    """A record of version 1 whose manifest, bundle and files are out of nothing; records do not look into them."""
    pid, encrypted = draw(pids), draw(st.booleans())
    files: list[StoredFile] = []
    for number in range(draw(st.integers(1, 4))):
        body = draw(st.binary(min_size=1, max_size=40))
        sha256 = hashlib.sha256(body).hexdigest()
        if draw(st.booleans()):
            files.append(StoredFile(f"f{number}", len(body), sha256, inline=body + b"tag" * encrypted))
        else:
            index = sum(file.blob is not None for file in files)
            files.append(StoredFile(f"f{number}", len(body), sha256, blob=layout.blob_name(1, pid, index)))
    return CommittedRecord(
        pid,
        draw(st.binary(max_size=40)),
        {"any": "thing"},
        tuple(files),
        tuple(draw(st.lists(st.dictionaries(names, names, max_size=2), max_size=2))),
        Encryption("alg", "file:kek", draw(st.binary(min_size=1, max_size=20))) if encrypted else None,
        draw(st.integers(0, 2**40)),
    )


deleting = st.builds(DeletingRecord, names, st.integers(0, 2**40), committed())


@st.composite
def statements(draw: st.DrawFn) -> TagStatement:
    """A tag statement, of a removal too."""
    generation = draw(st.integers(1, 999_999_999))
    version = draw(st.none() | versions)
    return TagStatement(
        draw(names),
        draw(names),
        draw(tags),
        generation,
        version,
        "" if version is None else draw(hexes),
        "" if generation == 1 else draw(hexes),
        draw(moments),
        draw(st.just("") | moments),
    )


@given(pending | aborted | committed() | deleting | deleted)
def test_a_record_reads_back_as_itself(record: Record) -> None:
    again = read_record(record.to_bytes(), version=1, where="x")
    assert again == record
    assert again.to_bytes() == record.to_bytes()


@given(committed())
def test_a_changed_record_never_has_the_bytes_of_an_earlier_state(record: CommittedRecord) -> None:
    later = record.revised(bundle={"another": "one"}).revised(bundle=record.bundle)
    assert later == record
    assert later.to_bytes() != record.to_bytes()


@given(statements())
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


STATEMENT = TagStatement("acme", "orders", "prod", 2, 3, "0" * 64, "1" * 64, "2026-06-01T12:00:00Z")


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 0},
        {"generation": 10**9},
        {"generation": True},
        {"generation": 1},
        {"prev": ""},
        {"version": None},
        {"version": "1.0"},
        {"version": 0},
        {"manifest_sha256": ""},
        {"issued": "2026-13-01T12:00:00Z"},
        {"expires": "never"},
        {"tag": "3"},
        {"extra": 1},
    ],
)
def test_a_tag_statement_out_of_shape_is_refused(change: dict[str, object]) -> None:
    value = {**json.loads(STATEMENT.to_bytes()), **change}
    with pytest.raises(SignatureInvalidError):
        TagStatement.from_bytes(canonical(value))
