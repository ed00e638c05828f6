"""Planted bugs are noticed, and the laws that only a planted bug would break."""

import base64
import hashlib
from pathlib import Path

import pytest

from loraplex_registry.format import layout
from loraplex_registry.format.record import AbortedRecord, DeletingRecord, PendingRecord
from loraplex_registry.lifecycle.versions import Reserver, get_record
from loraplex_registry.refs import AdapterRef
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.s3_parts import Part, is_good
from loraplex_registry.storage.store import write_conditionally
from tests.registry import mutants
from tests.registry.flaky_store import CrashError, FlakyStore
from tests.registry.lab import Lab

ORDERS = AdapterRef.parse("acme/orders")


def test_every_planted_bug_still_applies() -> None:
    assert len(mutants.MUTANTS) >= 12
    assert mutants.faults_of_list() == []


def test_a_planted_bug_is_noticed(tmp_path: Path) -> None:
    tree = mutants.copy_tree(tmp_path)
    mutant = next(mutant for mutant in mutants.MUTANTS if mutant.name == "a deletion whose bytes come back")
    assert mutants.is_clean(tree, mutant.test)
    assert mutants.is_noticed(mutant, tree)


def test_a_state_of_deleting_is_unique(lab: Lab) -> None:
    """Two deletions of one person in one second must not be taken for one another."""
    bodies = set()
    for _ in range(2):
        store = MemoryStore()
        lab.push(store, ORDERS, 0)
        with pytest.raises(CrashError):
            lab.delete(FlakyStore(store, at=2, how="crash before"), ORDERS, 1)
        found = get_record(store, ORDERS, 1)
        assert found is not None
        assert isinstance(found[0], DeletingRecord)
        bodies.add(found[0].by)
    assert len(bodies) == 2


def test_a_push_id_is_never_used_twice(lab: Lab) -> None:
    """Not even by a push that takes over what another left: a collector would take its blobs for garbage."""
    store = MemoryStore()
    seen = set()
    for at in (1, 3, 3):  # the upload; behind a look at what is there when the version is taken over
        with pytest.raises(CrashError):
            lab.push(FlakyStore(store, at=at, how="crash before"), ORDERS, 0, version=1)
        found = get_record(store, ORDERS, 1)
        assert found is not None
        seen.add(found[0].pid)
        body = AbortedRecord(found[0].pid, "x").to_bytes()
        store.swap(layout.version_key(ORDERS, 1), body, etag=found[1])
    assert len(seen) == 3


def test_a_lost_reply_is_read_back() -> None:
    store = MemoryStore()
    flaky = FlakyStore(store, at=0, how="lost reply")
    etag = write_conditionally(flaky, "t/acme/x.json", b"{}", etag=None)
    assert store.get("t/acme/x.json", limit_bytes=10).etag == etag
    assert flaky.calls == ["create", "get"]  # looked, and written once


def test_a_write_sent_twice_is_no_conflict() -> None:
    """A load balancer that repeats a request turns success into a conflict with oneself."""

    class Twice(FlakyStore):
        def create(self, key: str, body: bytes) -> str:
            super().create(key, body)
            return super().create(key, body)

    store = MemoryStore()
    etag = write_conditionally(Twice(store), "t/acme/x.json", b"{}", etag=None)
    assert store.get("t/acme/x.json", limit_bytes=10).etag == etag


@pytest.mark.parametrize("which", ["pid", "by", "state"])
def test_a_pending_push_of_another_is_not_gone_on_with(which: str) -> None:
    """Nor given up: that would end a push that is alive."""
    store, key = MemoryStore(), layout.version_key(ORDERS, 1)
    record = PendingRecord(
        "a" * 32 if which != "pid" else "b" * 32, "me" if which != "by" else "you", 1000, 60
    )
    body = AbortedRecord("a" * 32, "x").to_bytes() if which == "state" else record.to_bytes()
    etag = store.create(key, body)
    reserver = Reserver(store, ORDERS, by="me", now_s=2000, size_bytes=0, is_this=lambda _: False)
    assert reserver.resume(1, "a" * 32) is None
    reserver.abandon(1, "a" * 32)
    assert store.get(key, limit_bytes=1000).etag == etag
    store.swap(key, PendingRecord("a" * 32, "me", 1000, 60).to_bytes(), etag=etag)
    assert reserver.resume(1, "a" * 32) is not None


def test_a_part_that_is_listed_counts_by_size_and_signed_digest() -> None:
    part = Part(2, 0, 3, hashlib.sha256(b"abc").hexdigest())
    good = {"PartNumber": 2, "Size": 3, "ETag": "e", "ChecksumSHA256": part.checksum}
    other = base64.b64encode(hashlib.sha256(b"abd").digest()).decode()
    assert is_good(good, part)
    for wrong in ({"Size": 4}, {"ChecksumSHA256": other}, {"ChecksumSHA256": None}, {"ETag": None}):
        assert not is_good({**good, **wrong}, part)
