"""The audit log: append-only, chained, signed."""

import datetime as dt
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_registry.errors import DamagedError
from loraplex_registry.format import layout
from loraplex_registry.format.canonical import canonical, parse
from loraplex_registry.lifecycle.audit import AuditLog
from loraplex_registry.lifecycle.audit_check import reconcile
from loraplex_registry.signing import PublicKey, Signer, load_signer
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import CountingStore, Store, open_store
from loraplex_registry.trust.policy import TrustedKey
from tests.registry import builders
from tests.registry.shell import Shell, failing

NOW = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC)


def key_of(*signers: Signer):
    known: dict[str, PublicKey] = {signer.keyid: signer.public_key for signer in signers}
    return known.get


def test_entries_come_back_in_order_and_verify(store: Store, signer: Signer) -> None:
    log = AuditLog(store, "acme")
    for number in range(1, 4):
        log.append("push", f"acme/orders@{number}", signer, NOW, detail={"digest": "sha256:00"})
    entries = list(AuditLog(store, "acme").entries())
    assert [entry.subject for entry in entries] == [f"acme/orders@{n}" for n in (1, 2, 3)]
    assert [entry.number for entry in AuditLog(store, "acme").entries(after=1)] == [2, 3]
    assert {entry.actor for entry in entries} == {signer.keyid}
    report = AuditLog(store, "acme").verify(key_of(signer))
    assert (report.entries, report.findings) == (3, ())


def test_an_empty_log_verifies(local: Store, signer: Signer) -> None:
    report = AuditLog(local, "acme").verify(key_of(signer))
    assert (report.entries, report.head, report.findings) == (0, "", ())


def test_appending_again_is_one_request(local: Store, signer: Signer) -> None:
    store = CountingStore(local)
    log = AuditLog(store, "acme")
    log.append("push", "acme/a@1", signer, NOW)
    before = store.requests
    log.append("push", "acme/a@2", signer, NOW)
    assert store.requests == before + 1


@pytest.mark.parametrize("near", [0, 1, 40, 1000])
def test_the_end_is_found_in_few_requests(near: int, local: Store, signer: Signer) -> None:
    log = AuditLog(local, "acme")
    for number in range(70):
        log.append("push", f"acme/a@{number + 1}", signer, NOW)
    store = CountingStore(local)
    assert AuditLog(store, "acme").append("push", "acme/a@99", signer, NOW, near=near).number == 71
    assert store.requests <= 18


def test_many_writers_make_one_chain_without_gap(local: Store, signer: Signer, keys: Path) -> None:
    signers = [signer, load_signer(keys / "globex.key")]

    def write(number: int) -> None:
        log = AuditLog(local, "acme")
        for turn in range(5):
            log.append("tag", f"acme/w{number}@t{turn}", signers[number % 2], NOW)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = AuditLog(local, "acme").verify(key_of(*signers))
    assert (report.entries, report.findings) == (40, ())


def make_log(root: Path, signer: Signer, length: int) -> Path:
    store = open_store(root.as_uri())
    store.prepare()
    log = AuditLog(store, "acme")
    for number in range(length):
        log.append("push", f"acme/a@{number + 1}", signer, NOW)
    return root / layout.audit_prefix("acme")


def test_an_entry_taken_out_is_noticed(tmp_path: Path, signer: Signer) -> None:
    place = make_log(tmp_path, signer, 4)
    (place / "000000000002.json").unlink()
    report = AuditLog(open_store(tmp_path.as_uri()), "acme").verify(key_of(signer))
    assert any("entry 2 is missing" in finding for finding in report.findings)


def test_an_entry_replaced_by_a_validly_signed_one_breaks_the_chain(tmp_path: Path, signer: Signer) -> None:
    place = make_log(tmp_path / "one", signer, 4)
    other = make_log(tmp_path / "two", signer, 1)
    store = open_store((tmp_path / "two").as_uri())
    AuditLog(store, "acme").append("delete", "acme/a@9", signer, NOW)
    (place / "000000000002.json").unlink()
    (place / "000000000002.json").write_bytes((other / "000000000002.json").read_bytes())
    report = AuditLog(open_store((tmp_path / "one").as_uri()), "acme").verify(key_of(signer))
    assert any("does not follow" in finding for finding in report.findings)


def test_an_entry_of_another_tenant_is_noticed(tmp_path: Path, signer: Signer) -> None:
    make_log(tmp_path, signer, 1)
    store = open_store(tmp_path.as_uri())
    store.create(
        layout.audit_key("globex", 1), store.get(layout.audit_key("acme", 1), limit_bytes=1 << 16).body
    )
    report = AuditLog(store, "globex").verify(key_of(signer))
    assert "signed as number 1 of acme" in report.findings[0]


def test_a_key_that_is_not_known_is_told_from_a_broken_chain(tmp_path: Path, signer: Signer) -> None:
    place = make_log(tmp_path, signer, 3)
    log = AuditLog(open_store(tmp_path.as_uri()), "acme")
    report = log.verify(lambda keyid: None)
    assert (report.findings, len(report.unknown), report.outdated) == ((), 3, ())
    assert "not known" in report.unknown[0]
    (place / "000000000002.json").unlink()
    assert "entry 2 is missing" in log.verify(lambda keyid: None).findings[0]


def counted(signer: Signer, begin: dt.datetime | None, end: dt.datetime | None):
    """One key's dates, as `AuditLog.verify` asks for them."""
    trusted = TrustedKey(signer.public_key, begin, end)

    def dates(keyid: str, at: dt.datetime) -> None:
        if keyid == signer.keyid:
            trusted.check(at)

    return dates


def test_a_retired_key_is_judged_by_the_time_of_its_entries(local: Store, signer: Signer) -> None:
    log, day = AuditLog(local, "acme"), dt.timedelta(days=1)
    for number in range(3):
        log.append("push", f"acme/a@{number}", signer, NOW + number * day)
    for begin, end, outdated in (
        (None, NOW + 3 * day, 0),
        (None, NOW + 2 * day, 1),
        (None, NOW, 3),
        (NOW, None, 0),
        (NOW + day, None, 1),
    ):
        report = log.verify(key_of(signer), dates=counted(signer, begin, end))
        assert (report.findings, report.unknown, len(report.outdated)) == ((), (), outdated)


def test_the_holder_of_a_retired_key_cannot_date_entries_back(
    local: Store, signer: Signer, keys: Path
) -> None:
    other = load_signer(keys / "globex.key")
    retired = NOW + dt.timedelta(days=1)
    AuditLog(local, "acme").append("push", "acme/a@1", signer, NOW)
    AuditLog(local, "acme").append("push", "acme/a@2", other, retired + dt.timedelta(days=5))
    AuditLog(local, "acme").append("push", "acme/a@3", signer, NOW)
    report = AuditLog(local, "acme").verify(key_of(signer, other), dates=counted(signer, None, retired))
    (sentence,) = report.outdated
    assert sentence.startswith("entry 3 of 2026-06-01T12:00:00Z, behind one of 2026-06-07")


@settings(max_examples=100, deadline=None)
@given(days=st.lists(st.integers(0, 9), min_size=1, max_size=8), end=st.integers(0, 10))
def test_exactly_the_entries_that_can_not_be_of_the_keys_time_are_outdated(
    days: list[int], end: int, keys: Path
) -> None:
    signer, day = load_signer(keys / "acme.key"), dt.timedelta(days=1)
    store = MemoryStore()
    for number, after in enumerate(days):
        AuditLog(store, "acme").append("push", f"acme/a@{number}", signer, NOW + after * day)
    report = AuditLog(store, "acme").verify(key_of(signer), dates=counted(signer, None, NOW + end * day))
    assert len(report.outdated) == sum(after >= end for after in days)
    assert (report.findings, report.unknown) == ((), ())


def test_an_entry_that_names_another_key_than_signed_it_is_broken(tmp_path: Path, signer: Signer) -> None:
    place = make_log(tmp_path, signer, 1)
    value = parse((place / "000000000001.json").read_bytes())
    value["entry"]["signatures"][0]["keyid"] = "0" * 64
    (place / "000000000001.json").unlink()
    (place / "000000000001.json").write_bytes(canonical(value))
    report = AuditLog(open_store(tmp_path.as_uri()), "acme").verify(lambda keyid: None)
    assert "is signed by 0000" in report.findings[0]


def test_the_command_tells_retired_unknown_and_altered_apart(tmp_path: Path) -> None:
    shell = Shell(tmp_path, {})
    root = Path(shell.json("init", "--tenant", "acme")["registry"].removeprefix("file://"))
    builders.make_adapter(tmp_path / "orders")
    base = builders.make_base(tmp_path / "base")
    shell("push", "orders", "--base", base, "--tag", "prod")
    time.sleep(1.1)
    shell("keys", "rotate", "--no-passphrase", "--overlap", "0")
    assert "is whole: 2 entries" in shell("audit", "verify")  # what the retired key signed in its time
    old = tmp_path / ".config/loraplex/keys/acme.key"
    shell("tag", "orders@1", "late", "--key", old)
    said = failing(shell, 6, "EXPIRED", "audit", "verify")
    assert "missing or altered, but some are signed by keys that did not count then: entry 3" in said
    policy = tmp_path / ".config/loraplex/policy.toml"
    policy.write_text(re.sub(r'\{ path = "keys/acme.pub"[^}]*\}, ', "", policy.read_text()))
    said = failing(shell, 5, "SIGNATURE_INVALID", "audit", "verify")
    assert "does not list who signed some: entry 1" in said
    (root / "t/acme/audit/000000000002.json").unlink()
    assert "is not whole: entry 2 is missing" in failing(shell, 8, "DIGEST_MISMATCH", "audit", "verify")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_changed_bit_passes(data: st.DataObject, tmp_path_factory, keys: Path) -> None:
    root, signer = tmp_path_factory.mktemp("log"), load_signer(keys / "acme.key")
    place = make_log(root, signer, 2)
    path = place / f"{data.draw(st.sampled_from([1, 2])):012d}.json"
    body = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 1 << 24)) % (len(body) * 8)  # signatures differ in length from run to run
    body[bit // 8] ^= 1 << bit % 8
    path.unlink()
    path.write_bytes(body)
    assert AuditLog(open_store(root.as_uri()), "acme").verify(key_of(signer)).findings


def test_a_damaged_entry_is_said_to_be_damaged(tmp_path: Path, signer: Signer) -> None:
    place = make_log(tmp_path, signer, 1)
    value = parse((place / "000000000001.json").read_bytes())
    value["extra"] = 1
    (place / "000000000001.json").unlink()
    (place / "000000000001.json").write_bytes(canonical(value))
    with pytest.raises(DamagedError, match="entry 1 of acme"):
        list(AuditLog(open_store(tmp_path.as_uri()), "acme").entries())


def test_what_the_log_does_not_tell_is_reported(local: Store, signer: Signer) -> None:
    log = AuditLog(local, "acme")
    log.append("push", "acme/a@1", signer, NOW)
    log.append("import", "acme/b@1", signer, NOW)
    held = [("push", "acme/a@1"), ("push", "acme/b@1"), ("push", "acme/a@2")]
    assert reconcile(log.entries(), iter(held)) == ["push of acme/a@2 is not in the log"]
