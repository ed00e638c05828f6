"""Deleting: refused while a tag points there, fenced against taggers, completed after a crash, and for good."""

import pytest

from loraplex_registry.errors import (
    AdapterNotFoundError,
    ConflictError,
    DamagedError,
    InvalidReferenceError,
    SettingsError,
    StoreUnavailableError,
)
from loraplex_registry.format import layout
from loraplex_registry.format.record import RECORD_BYTES_MAX, AbortedRecord, DeletedRecord, DeletingRecord
from loraplex_registry.lifecycle.delete import referencing_tags
from loraplex_registry.lifecycle.versions import get_record
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Store
from tests.registry.flaky_store import FlakyStore, Meanwhile
from tests.registry.lab import Lab
from tests.registry.shell import Shell

ORDERS = AdapterRef.parse("acme/orders")


def state(store: Store, version: int) -> str:
    found = get_record(store, ORDERS, version)
    assert found is not None
    return type(found[0]).__name__.removesuffix("Record").lower()


def test_a_deleted_version_is_gone_and_its_name_is_never_used_again(two: Store, lab: Lab) -> None:
    digest = lab.read(two, ORDERS) and lab.delete(two, ORDERS, 2).digest
    with pytest.raises(AdapterNotFoundError):
        lab.read(two, AdapterRef.parse("acme/orders@2"))
    assert lab.read(two, ORDERS) == (1, 0)
    newest = next(Registry(two).versions(ORDERS))
    assert (newest.version, newest.state, newest.digest) == (
        2,
        "deleted",
        digest,
    )
    with pytest.raises(ConflictError, match="was deleted"):
        lab.push(two, ORDERS, 1, version=2)
    assert lab.push(two, ORDERS, 1)[0].version == 3
    again = lab.delete(two, ORDERS, 2)
    assert (again.deleted, again.digest) == (False, digest)


def test_the_blobs_stay_until_they_are_collected(two: Store, lab: Lab) -> None:
    before = [blob.key for blob in two.blobs(layout.blobs_prefix(ORDERS))]
    lab.delete(two, ORDERS, 2)
    assert [blob.key for blob in two.blobs(layout.blobs_prefix(ORDERS))] == before


def test_a_version_that_a_tag_points_to_is_kept(two: Store, lab: Lab) -> None:
    lab.tag(two, ORDERS, 1, "canary")
    with pytest.raises(ConflictError, match="canary, prod point to"):
        lab.delete(two, ORDERS, 1)
    assert state(two, 1) == "committed"
    assert lab.read(two, AdapterRef.parse("acme/orders@prod")) == (1, 0)
    assert referencing_tags(two, AdapterRef.parse("acme/orders@1")) == ["canary", "prod"]


def test_force_removes_the_tags_by_signed_moves(two: Store, lab: Lab) -> None:
    lab.tag(two, ORDERS, 1, "canary")
    lab.tag(two, ORDERS, 2, "other")
    assert lab.delete(two, ORDERS, 1, force=True).untagged == ("canary", "prod")
    assert lab.read_or_none(two, AdapterRef.parse("acme/orders@prod")) is None
    assert lab.read(two, AdapterRef.parse("acme/orders@other")) == (2, 1)
    assert not lab.fsck(two).findings[1:]  # the root's marker alone


def test_force_without_a_key_changes_nothing(two: Store, lab: Lab) -> None:
    from loraplex_registry.lifecycle.delete import delete_version

    with pytest.raises(SettingsError, match="give a key"):
        delete_version(two, AdapterRef.parse("acme/orders@1"), by="x", now=lab.now, force=True)
    assert state(two, 1) == "committed"


def test_what_was_never_published_cannot_be_deleted(two: Store, lab: Lab) -> None:
    two.create(layout.version_key(ORDERS, 3), AbortedRecord("0" * 32, "x").to_bytes())
    with pytest.raises(ConflictError, match="never published"):
        lab.delete(two, ORDERS, 3)
    with pytest.raises(AdapterNotFoundError):
        lab.delete(two, ORDERS, 4)


def test_a_reason_has_bounds(two: Store, lab: Lab) -> None:
    from loraplex_registry.lifecycle.delete import delete_version

    for reason in ("", "x" * 257):
        with pytest.raises(InvalidReferenceError):
            delete_version(two, AdapterRef.parse("acme/orders@2"), by="x", now=lab.now, reason=reason)


def test_a_tag_that_cannot_be_read_keeps_the_version(two: Store, lab: Lab) -> None:
    key = layout.tag_key(ORDERS, "prod")
    two.swap(key, b"{}", etag=two.get(key, limit_bytes=RECORD_BYTES_MAX).etag)
    with pytest.raises(DamagedError):
        lab.delete(two, ORDERS, 2)
    assert state(two, 2) == "committed"


def test_a_store_that_fails_while_tags_are_looked_for_leaves_the_version_readable(
    two: Store, lab: Lab
) -> None:
    with pytest.raises(StoreUnavailableError):
        lab.delete(FlakyStore(two, at=2, how="lost request"), ORDERS, 2)
    assert state(two, 2) == "committed"


def test_while_it_is_being_deleted_a_version_cannot_be_read_and_anybody_may_finish(
    two: Store, lab: Lab
) -> None:
    found = get_record(two, ORDERS, 2)
    assert found is not None
    record, etag = found
    body = DeletingRecord("somebody 0123", 1, record).to_bytes()  # type: ignore[arg-type]
    two.swap(layout.version_key(ORDERS, 2), body, etag=etag)
    assert lab.read_or_none(two, AdapterRef.parse("acme/orders@2")) is None
    assert lab.fsck(two).of("delete-unfinished")
    assert lab.delete(two, ORDERS, 2).deleted
    assert state(two, 2) == "deleted"


def test_two_who_delete_at_once_both_succeed_and_none_undoes_the_other(two: Store, lab: Lab) -> None:
    second = Meanwhile(two, "children", [lambda: lab.delete(two, ORDERS, 2)])
    assert lab.delete(second, ORDERS, 2).deleted
    assert state(two, 2) == "deleted"


def test_a_version_put_back_by_a_rival_deleter_is_not_deleted_behind_his_back(two: Store, lab: Lab) -> None:
    """A deletion holds the record by bytes that never come back, so a stale one cannot finish."""

    class Overtaken(FlakyStore):
        def swap(self, key: str, body: bytes, *, etag: str) -> str:
            if b'"state":"deleted"' in body:
                record, held = get_record(two, ORDERS, 2)  # type: ignore[misc]
                assert isinstance(record, DeletingRecord)
                two.swap(key, record.record.to_bytes(), etag=held)  # the rival saw a tag and put it back
                lab.tag(two, ORDERS, 2, "prod")
            return super().swap(key, body, etag=etag)

    with pytest.raises(ConflictError, match="put back"):
        lab.delete(Overtaken(two), ORDERS, 2)
    assert lab.read(two, AdapterRef.parse("acme/orders@prod")) == (2, 1)


def test_a_lost_reply_at_any_write_ends_well(lab: Lab) -> None:
    for how in ("lost reply", "lost request"):
        for at in range(8):
            store = MemoryStore()
            lab.push(store, ORDERS, 0, tag="prod")
            flaky = FlakyStore(store, at=at, how=how)
            try:
                lab.delete(flaky, ORDERS, 1, force=True)
            except StoreUnavailableError:
                assert state(store, 1) in {"committed", "deleting"}
                lab.delete(store, ORDERS, 1, force=True)
            record = get_record(store, ORDERS, 1)
            assert record is not None
            assert isinstance(record[0], DeletedRecord), (how, at)


def test_the_command_deletes_and_says_so(shell: Shell, lab: Lab) -> None:
    shell("push", lab.pulled(0), "orders", "--tag", "prod")
    assert "--force" in shell("rm", "orders@1", code=4)
    done = shell.json("rm", "orders@1", "--force", "--reason", "a mistake")
    assert (done["deleted"], done["untagged"]) == (True, ["prod"])
    assert "already deleted" in shell("rm", "orders@1")
    shell("rm", "orders@2", code=3)
    shell("rm", "orders", code=2)
    assert shell.json("gc")["reasons"]["within grace"]["blobs"] == 1
