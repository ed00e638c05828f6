"""Garbage collection: what is dead goes, what is alive stays, whatever the clocks and the pushers do meanwhile."""

import dataclasses
import datetime as dt
from pathlib import Path

import pytest

from loraplex_registry.errors import ConflictError, InvalidReferenceError, StoreRefusedError
from loraplex_registry.format import layout
from loraplex_registry.format.hashing import entry_of
from loraplex_registry.format.record import LEASE_S, AbortedRecord, PendingRecord
from loraplex_registry.lifecycle import gc
from loraplex_registry.lifecycle.versions import get_record
from loraplex_registry.refs import AdapterRef
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import CountingStore, Store
from tests.registry.flaky_store import FlakyStore
from tests.registry.lab import NOW, Lab
from tests.registry.shell import Shell

ORDERS = AdapterRef.parse("acme/orders")
DAY_S = 86400.0


def put(store: Store, tmp_path: Path, version: int, pid: str, ref: AdapterRef = ORDERS) -> str:
    """Put a blob of a push and return its key."""
    path = tmp_path / "blob"
    path.write_bytes(b"blob")
    key = layout.adapter_prefix(ref) + layout.blob_name(version, pid, 0)
    store.put_blob(key, path, entry_of("blob", b"blob"))
    return key


def keys(store: Store) -> list[str]:
    return [blob.key for blob in store.blobs(layout.blobs_prefix(ORDERS))]


@pytest.fixture
def full(lab: Lab, tmp_path: Path) -> MemoryStore:
    """Everything a collection can meet: see the names in `EXPECTED`."""
    store = MemoryStore(clock=lambda: (NOW - dt.timedelta(days=30)).timestamp())
    lab = dataclasses.replace(lab)
    lab.push(store, ORDERS, 0, tag="prod")  # 1: live
    lab.push(store, ORDERS, 1)  # 2: deleted long ago
    lab.push(store, ORDERS, 2)  # 3: deleted just now
    lab.now = NOW - dt.timedelta(days=9)
    lab.delete(store, ORDERS, 2)
    lab.now = NOW
    lab.delete(store, ORDERS, 3)
    old, now_s = int(NOW.timestamp()) - 9 * 86400, int(NOW.timestamp())
    records = {
        4: PendingRecord("4" * 32, "dead", old, LEASE_S),
        5: PendingRecord("5" * 32, "at work", now_s, LEASE_S),
        6: AbortedRecord("6" * 32, "x"),
        7: AbortedRecord("0" * 32, "another push's"),
    }
    for version, record in records.items():
        store.create(layout.version_key(ORDERS, version), record.to_bytes())
    for version in (4, 5, 6, 7, 8):  # 8 has no record
        put(store, tmp_path, version, str(version) * 32)
    store.create(layout.version_key(ORDERS, 9), b"not a record")
    put(store, tmp_path, 9, "9" * 32)
    store._clock = lambda: NOW.timestamp()
    put(store, tmp_path, 10, "a" * 32)  # fresh
    return store


EXPECTED = {
    "live": 1,
    "deleted": 1,
    "deleted recently": 1,
    "abandoned": 1,
    "pushing": 1,
    "aborted": 1,
    "replaced": 1,
    "purged": 1,
    "unreadable": 1,
    "within grace": 1,
}


def test_every_state_is_judged_by_its_record(full: MemoryStore, lab: Lab) -> None:
    before = dict(full._objects)
    report = lab.gc(full, grace_s=DAY_S, apply=False)
    assert {reason: tally.groups for reason, tally in report.tallies.items()} == EXPECTED
    assert full._objects == before  # a dry run writes nothing
    assert report.dead_total().blobs == 5
    assert {verdict.group.ref.version for verdict in report.dead} == {2, 4, 6, 7, 8}


def test_what_is_dead_goes_and_the_rest_stays(full: MemoryStore, lab: Lab) -> None:
    report = lab.gc(full, grace_s=DAY_S)
    left = {int(key.partition("~")[0]) for key in keys(full)}
    assert left == {1, 3, 5, 9, 10}
    assert report.delete_requests == 1
    record = get_record(full, ORDERS, 4)
    assert record is not None
    assert isinstance(record[0], AbortedRecord)  # fenced before its blobs went
    again = lab.gc(full, grace_s=DAY_S)
    assert again.dead_total().blobs == 0
    assert again.delete_requests == 0


def test_totals_are_bytes_and_reasons(full: MemoryStore, lab: Lab) -> None:
    report = lab.gc(full, grace_s=DAY_S, apply=False)
    assert report.tallies["purged"].size_bytes == 4
    total = report.dead_total()
    assert total.size_bytes == sum(verdict.group.size_bytes for verdict in report.dead)


def test_an_expired_push_that_commits_first_keeps_its_blobs(lab: Lab) -> None:
    """The collector's clock says the push is long dead; the push is not impressed."""
    store = MemoryStore(clock=lambda: NOW.timestamp())

    class CommitsFirst(FlakyStore):
        done = False

        def swap(self, key: str, body: bytes, *, etag: str) -> str:
            if not self.done and b'"aborted"' in body:
                self.done = True
                waiting.commit()
            return super().swap(key, body, etag=etag)

    waiting = Waiting(store, lab)
    report = lab.gc(CommitsFirst(store), ahead_s=10 * DAY_S)
    assert report.tallies["pushing"].groups == 1
    assert lab.read(store, ORDERS) == (1, 0)


class Waiting:
    """A push that has uploaded everything and not committed yet."""

    def __init__(self, store: Store, lab: Lab) -> None:
        held: list[bytes] = []

        class Held(FlakyStore):
            def swap(self, key: str, body: bytes, *, etag: str) -> str:
                held.append(body)
                held.append(etag.encode())
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            lab.push(Held(store), ORDERS, 0)
        self._store, self._body, self._etag = store, held[0], held[1].decode()

    def commit(self) -> None:
        self._store.swap(layout.version_key(ORDERS, 1), self._body, etag=self._etag)


def test_a_fenced_push_is_told_and_nothing_of_it_is_readable(lab: Lab) -> None:
    store = MemoryStore(clock=lambda: NOW.timestamp())

    class Collected(FlakyStore):
        def swap(self, key: str, body: bytes, *, etag: str) -> str:
            if b'"committed"' in body:
                lab.gc(store, ahead_s=10 * DAY_S)
            return super().swap(key, body, etag=etag)

    with pytest.raises(ConflictError, match="took over"):
        lab.push(Collected(store), ORDERS, 0)
    assert lab.read_or_none(store, ORDERS) is None
    assert keys(store) == []


def test_one_tenant_or_one_adapter_can_be_collected(full: MemoryStore, lab: Lab, tmp_path: Path) -> None:
    for text in ("acme/mails", "globex/orders"):
        put(full, tmp_path, 1, "b" * 32, AdapterRef.parse(text))
    now_s = NOW.timestamp() + 5 * DAY_S

    def dead(**options: object) -> set[str]:
        found = gc.collect(full, now_s=now_s, workers=4, **options)  # type: ignore[arg-type]
        return {verdict.group.ref.name for verdict in found.dead}

    assert dead() == {"acme/mails", "acme/orders", "globex/orders"}
    assert dead(tenant="acme") == {"acme/mails", "acme/orders"}
    assert dead(ref=AdapterRef.parse("acme/mails")) == {"acme/mails"}


def test_requests_are_two_listings_and_one_look_per_old_group(full: MemoryStore, lab: Lab) -> None:
    counting = CountingStore(full)
    gc.collect(counting, now_s=NOW.timestamp(), grace_s=DAY_S, workers=1)
    assert counting.requests == 2 + sum(EXPECTED.values()) - EXPECTED["within grace"]


def test_objects_that_are_no_blobs_of_a_push_are_left_alone(lab: Lab, tmp_path: Path) -> None:
    store = MemoryStore(clock=lambda: 0.0)
    path = tmp_path / "x"
    path.write_bytes(b"x")
    strange = [
        "t/acme/a/orders/b/1/0",
        f"t/acme/a/orders/b/01~{'0' * 32}/0",
        f"t/acme/a/orders/b/1~{'X' * 32}/0",
        f"t/ACME/a/orders/b/1~{'0' * 32}/0",
        f"t/acme/x/orders/b/1~{'0' * 32}/0/1",
    ]
    for key in strange:
        store.put_blob(key, path, entry_of("x", b"x"))
    assert lab.gc(store).dead_total().blobs == 0
    assert len(store._objects) == len(strange)


def test_a_large_group_goes_in_pages(lab: Lab, tmp_path: Path) -> None:
    store = MemoryStore(clock=lambda: 0.0)
    path = tmp_path / "x"
    path.write_bytes(b"x")
    prefix = layout.blobs_prefix(ORDERS) + "1~" + "0" * 32
    for number in range(2500):
        store.put_blob(f"{prefix}/{number}", path, entry_of("x", b"x"))
    report = lab.gc(store)
    assert (report.dead_total().groups, report.dead_total().blobs, report.delete_requests) == (3, 2500, 3)
    assert store._objects == {}


@pytest.mark.parametrize("options", [{"grace_s": -1.0}, {"workers": 0}])
def test_nonsense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidReferenceError):
        gc.collect(MemoryStore(), **options)  # type: ignore[arg-type]


# --- the storage's time


def test_time_is_taken_from_the_storage_and_leaves_nothing(store: Store) -> None:
    import time

    assert abs(gc.storage_time(store) - time.time()) < 60
    assert list(store.blobs(gc.CLOCK_PREFIX)) == []


def test_a_storage_with_another_clock_is_believed(lab: Lab) -> None:
    store = MemoryStore(clock=lambda: 1000.0)
    assert gc.storage_time(store) == 1000.0
    assert gc.collect(store, apply=True).now_s == 1000.0


def test_a_storage_that_takes_no_clock_is_no_obstacle() -> None:
    import time

    class ReadOnly(FlakyStore):
        def put_blob(self, *args: object, **options: object) -> int:
            raise StoreRefusedError("no")

    assert abs(gc.storage_time(ReadOnly(MemoryStore())) - time.time()) < 60


def test_every_store_is_collected_alike(store: Store, lab: Lab, tmp_path: Path) -> None:
    lab.push(store, ORDERS, 0, tag="prod")
    put(store, tmp_path, 5, "5" * 32)
    gc.collect(store, apply=True, grace_s=3600.0)
    assert len(keys(store)) == 2  # young, by the storage's clock
    import time

    done = gc.collect(store, apply=True, grace_s=0.0, now_s=time.time() + 3600)
    assert done.dead_total().blobs == 1
    assert lab.read(store, AdapterRef.parse("acme/orders@prod")) == (1, 0)


def test_the_command_reports_first_and_removes_when_told(tmp_path: Path, lab: Lab) -> None:
    (tmp_path / "home").mkdir()
    shell = Shell(tmp_path / "home", {})
    made = shell.json("init", "--tenant", "acme")
    shell("push", lab.pulled(0), "orders")
    shell("rm", "orders@1")
    assert "within grace" in shell("gc")
    import time

    time.sleep(1.1)  # a tombstone's time is in whole seconds
    assert "would be removed" in shell("gc", "--grace", "0")
    done = shell.json("gc", "--grace", "0", "--apply")
    assert (done["applied"], done["blobs"]) == (True, 1)
    assert done["groups"][0]["reason"] == "deleted"
    assert shell.json("gc", "--grace", "0", "--apply", "--tenant", "acme")["blobs"] == 0
    shell("gc", "--tenant", "acme", "--adapter", "orders", code=2)
    assert not shell.json("fsck")["damaged"]
    assert made["registry"]
