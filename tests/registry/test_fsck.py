"""Checking and mending: every kind of damage is found and named, nothing good is called damaged, good copies mend."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex_registry.encryption.data_keys import RingSealer
from loraplex_registry.encryption.key_providers import KeyRing
from loraplex_registry.errors import (
    AdapterNotFoundError,
    DigestMismatchError,
    SettingsError,
    SignatureInvalidError,
)
from loraplex_registry.format import layout
from loraplex_registry.format.canonical import canonical
from loraplex_registry.format.record import RECORD_BYTES_MAX, CommittedRecord, DeletingRecord
from loraplex_registry.lifecycle import repair
from loraplex_registry.lifecycle.audit import AuditLog
from loraplex_registry.lifecycle.findings import FINDINGS_MAX, Finding, Report
from loraplex_registry.lifecycle.fsck import check
from loraplex_registry.lifecycle.fsck_adapter import Depth, opener_of
from loraplex_registry.lifecycle.publish import Publication
from loraplex_registry.lifecycle.tagging import find_target
from loraplex_registry.refs import AdapterRef
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Store
from loraplex_registry.trust.verdict import verify
from tests.registry.lab import Lab
from tests.registry.sealed_versions import make_ring
from tests.registry.shell import Shell

ORDERS = AdapterRef.parse("acme/orders")
ONE = AdapterRef.parse("acme/orders@1")


@pytest.fixture
def good(lab: Lab) -> MemoryStore:
    """A registry with two versions, a tag with history, and an audit log."""
    store = MemoryStore()
    store.create(layout.FORMAT_KEY, canonical({"fmt": 1}))
    lab.push(store, ORDERS, 0, tag="prod")
    lab.push(store, ORDERS, 1, tag="prod")
    lab.push(store, AdapterRef.parse("globex/x"), 2)
    for number in range(3):
        AuditLog(store, "acme").append("push", f"acme/orders@{number + 1}", lab.signer, lab.now)
    return store


def change(store: MemoryStore, key: str, new: Callable[[bytes], bytes]) -> None:
    item = store.get(key, limit_bytes=RECORD_BYTES_MAX)
    store.swap(key, new(item.body), etag=item.etag)


def remove(store: MemoryStore, key: str) -> None:
    store._objects.pop(key)
    store._keys.remove(key)


def blob(store: Store, version: int) -> str:
    prefix = layout.blobs_prefix(ORDERS)
    return prefix + next(one.key for one in store.blobs(prefix) if one.key.startswith(f"{version}~"))


def flip(store: MemoryStore, key: str) -> None:
    found = store._objects[key]
    body = bytes([found.body[0] ^ 1]) + found.body[1:]
    store._objects[key] = dataclasses.replace(found, body=body)


def damage(report: Report) -> set[str]:
    return {finding.code for finding in report.findings if finding.severity == "damage"}


def test_a_good_registry_is_good(good: MemoryStore, lab: Lab) -> None:
    report = lab.fsck(good)
    assert report.findings == []
    expected = {"tenants": 2, "adapters": 2, "versions": 3, "tags": 1, "blobs": 3, "audit_entries": 3}
    assert {name: report.counts[name] for name in expected} == expected
    assert report.counts["orphan_blobs"] == 0
    assert report.counts["hashed_bytes"] == report.counts["blob_bytes"]


def test_many_workers_find_the_same(good: MemoryStore, lab: Lab) -> None:
    remove(good, blob(good, 1))
    many = check(good, Depth(lab.now), workers=4)
    assert damage(many) == damage(check(good, Depth(lab.now), workers=1)) == {"blob-missing"}


KEYS = {
    "record": layout.version_key(ORDERS, 1),
    "tag": layout.tag_key(ORDERS, "prod"),
    "log": layout.tag_log_key(ORDERS, "prod", 1),
    "audit": layout.audit_key("acme", 2),
    "format": layout.FORMAT_KEY,
}


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("record", "record-unreadable"),
        ("tag", "tag-unreadable"),
        ("log", "log-gap"),
        ("audit", "audit-damaged"),
        ("format", "format-unreadable"),
    ],
)
def test_an_object_that_cannot_be_read_is_damage(what: str, code: str, good: MemoryStore, lab: Lab) -> None:
    change(good, KEYS[what], lambda body: body[:-1])
    assert code in damage(lab.fsck(good))


@pytest.mark.parametrize(
    ("what", "code"), [("tag", "tag-missing"), ("log", "log-gap"), ("audit", "audit-gap"), ("record", None)]
)
def test_an_object_that_is_gone_is_damage(what: str, code: str | None, good: MemoryStore, lab: Lab) -> None:
    remove(good, KEYS[what])
    report = lab.fsck(good)
    if code is not None:
        assert code in damage(report)
    else:  # nothing says that there was a record; its blobs are for the collector
        assert report.counts["orphan_blobs"] == 1


def test_a_tag_to_a_version_without_record_is_damage(good: MemoryStore, lab: Lab) -> None:
    remove(good, layout.version_key(ORDERS, 2))
    assert damage(lab.fsck(good)) == {"tag-dangling"}


def test_damaged_revocations_are_damage(good: MemoryStore, lab: Lab) -> None:
    good.create(layout.revocations_key("acme"), b"{}")
    assert damage(lab.fsck(good)) == {"revocations-unreadable"}


def test_missing_short_and_changed_blobs_are_told_apart(good: MemoryStore, lab: Lab) -> None:
    first, second = blob(good, 1), blob(good, 2)
    flip(good, first)
    assert damage(check(good, Depth(lab.now))) == set()  # only reading it all shows it
    assert damage(lab.fsck(good)) == {"blob-content"}
    good._objects[second] = dataclasses.replace(good._objects[second], body=b"short")
    assert damage(check(good, Depth(lab.now))) == {"blob-size"}
    remove(good, first)
    assert damage(check(good, Depth(lab.now))) == {"blob-size", "blob-missing"}


def test_a_record_put_under_another_name_is_damage(good: MemoryStore, lab: Lab) -> None:
    record = find_target(good, AdapterRef.parse("globex/x@1")).record
    good.create(layout.version_key(AdapterRef.parse("acme/mails"), 1), record.to_bytes())
    assert "manifest-inconsistent" in damage(lab.fsck(good))


def test_a_tag_to_another_content_is_damage(good: MemoryStore, lab: Lab) -> None:
    other = MemoryStore()
    lab.push(other, ORDERS, 3)
    change(
        good,
        layout.version_key(ORDERS, 2),
        lambda _: other.get(layout.version_key(ORDERS, 1), limit_bytes=RECORD_BYTES_MAX).body,
    )
    assert damage(lab.fsck(good)) & {"record-unreadable", "tag-mismatch"}


def test_signatures_are_judged_when_asked(good: MemoryStore, lab: Lab) -> None:
    def judge(ref: AdapterRef, record: CommittedRecord) -> None:
        assert ref.version is not None
        verify(ref, version=ref.version, record=record, tag=None, policy=lab.policy, now=lab.now)

    report = check(good, Depth(lab.now, judge=judge))
    assert [(one.code, one.severity) for one in report.findings] == [("not-trusted", "warning")]  # globex
    found = find_target(good, ONE).record
    forged = dataclasses.replace(
        found, bundle={**found.bundle, "dsseEnvelope": {"payload": "", "payloadType": "x", "signatures": []}}
    )
    change(good, layout.version_key(ORDERS, 1), lambda _: forged.to_bytes())
    assert "not-trusted" in damage(check(good, Depth(lab.now, judge=judge)))


def test_strangers_are_noted(good: MemoryStore, lab: Lab) -> None:
    good.create("t/Acme/x", b"1")
    assert [one.code for one in lab.fsck(good).findings] == ["stranger"]


def test_a_report_is_bounded_and_goes_on_counting() -> None:
    report = Report()
    for number in range(FINDINGS_MAX + 5):
        report.add(Finding("note", "x", str(number), "y"))
    assert len(report.findings) == FINDINGS_MAX
    assert report.severities["note"] == FINDINGS_MAX + 5
    assert not report.damaged


# --- mending


@pytest.mark.parametrize("source", ["directory", "registry"])
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_damaged_version_is_mended_from_a_good_copy(
    source: str, how: str, good: MemoryStore, lab: Lab
) -> None:
    backup = MemoryStore()
    backup._objects, backup._keys = dict(good._objects), list(good._keys)
    lab.tag(good, ORDERS, 1, "old")
    digest = find_target(good, ONE).record.digest
    (remove if how == "gone" else flip)(good, blob(good, 1))
    copy = (
        repair.from_directory(lab.pulled(0)) if source == "directory" else repair.from_registry(backup, ONE)
    )
    done = repair.mend_version(good, ONE, copy)
    assert done.tags == ("old",)
    assert find_target(good, ONE).record.digest == digest
    assert lab.read(good, ONE) == (1, 0)
    assert lab.read(good, AdapterRef.parse("acme/orders@old")) == (1, 0)
    assert not lab.fsck(good).findings


def test_an_encrypted_version_is_read_and_mended_with_its_key_alone(lab: Lab, tmp_path: Path) -> None:
    ring, store = make_ring(tmp_path, "acme"), MemoryStore()
    sealer = RingSealer(ring)
    Publication(store, ORDERS, lab.contents[0], [lab.signer], lab.now, sealer=sealer).run(
        version=1, progress=None
    )
    known = Depth(lab.now, deep=True, opener=opener_of(ring))
    report = check(store, known)
    assert not report.damaged
    assert report.counts["hashed_bytes"] == find_target(store, ONE).record.manifest_unverified().size_bytes
    stranger = Depth(lab.now, deep=True, opener=opener_of(KeyRing([])))
    assert check(store, stranger).counts["not_decrypted"] == 3
    assert not lab.fsck(store).damaged
    flip(store, blob(store, 1))
    assert damage(check(store, known)) == {"blob-content"}
    good = repair.from_directory(lab.pulled(0))
    with pytest.raises(SettingsError, match="encrypted"):
        repair.mend_version(store, ONE, good)
    repair.mend_version(store, ONE, good, sealer=sealer)
    assert not check(store, known).damaged
    repair.mend_version(store, ONE, repair.from_registry(store, ONE, opener=opener_of(ring)), sealer=sealer)
    assert not check(store, known).damaged


def test_a_copy_that_is_not_what_was_signed_mends_nothing(good: MemoryStore, lab: Lab) -> None:
    before = dict(good._objects)
    with pytest.raises(DigestMismatchError, match="good copy"):
        repair.mend_version(good, ONE, repair.from_directory(lab.pulled(1)))
    assert good._objects == before


def test_a_collector_never_takes_what_is_being_mended(good: MemoryStore, lab: Lab) -> None:
    """Whatever its clock says: from the first byte on the new blobs belong to a committed version."""
    remove(good, blob(good, 1))

    class Collecting(MemoryStore):
        def put_blob(self, *args: object, **options: object) -> int:
            requests = super().put_blob(*args, **options)  # type: ignore[arg-type]
            lab.gc(self, ahead_s=30 * 86400.0)
            return requests

    store = Collecting()
    store._objects, store._keys = good._objects, good._keys
    repair.mend_version(store, ONE, repair.from_directory(lab.pulled(0)))
    assert lab.read(store, ONE) == (1, 0)


def test_a_record_is_restored_only_from_one_that_is_trusted(good: MemoryStore, lab: Lab) -> None:
    backup = MemoryStore()
    backup._objects, backup._keys = dict(good._objects), list(good._keys)

    def never(ref: AdapterRef, record: CommittedRecord) -> None:
        raise SignatureInvalidError("no")

    assert not repair.restore_record(good, ONE, backup, never)  # it can be read
    change(good, layout.version_key(ORDERS, 1), lambda body: body[:-1])
    with pytest.raises(SignatureInvalidError):
        repair.restore_record(good, ONE, backup, never)
    assert repair.restore_record(good, ONE, backup, lambda ref, record: None)
    assert lab.fsck(good).findings == []
    with pytest.raises(AdapterNotFoundError):
        repair.restore_record(MemoryStore(), ONE, backup, never)


def test_what_died_half_way_is_finished(good: MemoryStore, lab: Lab) -> None:
    for version in (1, 2):  # a deletion of 1 died, and one of 2, to which prod points
        found = find_target(good, AdapterRef("acme", "orders", version=version))
        body = DeletingRecord("x", 1, found.record).to_bytes()
        change(good, layout.version_key(ORDERS, version), lambda _, body=body: body)  # type: ignore[misc]
    done = repair.finish(good, lab.fsck(good).findings, by="test", now=lab.now)
    assert done == [
        "acme/orders@1 is deleted",
        "acme/orders@2 is what a tag points to; it was put back",
    ]
    assert lab.read(good, AdapterRef.parse("acme/orders@prod")) == (2, 1)
    found = find_target(good, AdapterRef.parse("acme/orders@2"))
    new = dataclasses.replace(found.record, attest=({"a": 1},))
    change(good, layout.version_key(ORDERS, 2), lambda _: new.to_bytes())
    assert repair.finish(good, lab.fsck(good).findings, by="test", now=lab.now) == [
        "acme/orders@prod was renewed"
    ]
    assert lab.fsck(good).findings == []


def test_the_command_finds_damage_and_mends_it(tmp_path: Path, lab: Lab) -> None:
    (tmp_path / "home").mkdir()
    shell = Shell(tmp_path / "home", {})
    made = shell.json("init", "--tenant", "acme")
    shell("push", lab.pulled(0), "orders", "--tag", "prod")
    assert shell.json("fsck", "--deep", "--signatures")["findings"] == []
    shell("pull", "orders", tmp_path / "copy")
    root = Path(made["registry"].removeprefix("file://"))
    (stored,) = (path for path in root.glob("t/acme/a/orders/b/*/*") if path.is_file())
    digest = hashlib.sha256(stored.read_bytes()).hexdigest()
    stored.chmod(0o644)
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    assert shell.json("fsck")["damaged"] is False
    report = shell.json("fsck", "--deep", code=8)
    assert [one["code"] for one in report["findings"]] == ["blob-content"]
    assert "blob-content" in shell("fsck", "acme/orders", "--deep", code=8)
    done = shell.json("fsck", "--deep", "--repair", "--from", tmp_path / "copy")
    assert (done["damaged"], len(done["repaired"])) == (False, 1)
    shell("verify", "orders@prod")
    assert digest in {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in root.glob("t/acme/a/orders/b/*/*")
    }
    shell("fsck", "--from", tmp_path / "copy", code=2)
