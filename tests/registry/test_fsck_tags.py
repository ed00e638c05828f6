"""Checking tags: their signatures, older statements that were put back, and movers that died; and `registry log`."""

import dataclasses
from pathlib import Path

import pytest

from loraplex_registry.errors import ConflictError, SignatureInvalidError
from loraplex_registry.format import layout
from loraplex_registry.format.canonical import canonical
from loraplex_registry.format.record import RECORD_BYTES_MAX
from loraplex_registry.format.tags import read_tag
from loraplex_registry.lifecycle.audit import AuditLog
from loraplex_registry.lifecycle.findings import Finding
from loraplex_registry.lifecycle.fsck import check
from loraplex_registry.lifecycle.fsck_adapter import Depth
from loraplex_registry.lifecycle.history import tag_history
from loraplex_registry.lifecycle.judging import PolicyJudge
from loraplex_registry.lifecycle.settling import settle_tag
from loraplex_registry.lifecycle.tag_state import Unread, find_target, read_tag_state
from loraplex_registry.lifecycle.tagging import Mover, move_tag
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.trust.marks import MemoryMarks
from loraplex_registry.trust.policy import TrustedKey, TrustPolicy
from loraplex_registry.trust.revocations import Revocation
from loraplex_registry.trust.revoking import append
from tests.registry.lab import Lab, no_sleep
from tests.registry.shell import Shell

ORDERS = AdapterRef.parse("acme/orders")
PROD = AdapterRef.parse("acme/orders@prod")
KEY = layout.tag_key(ORDERS, "prod")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.build(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def store(lab: Lab) -> MemoryStore:
    """A registry with three versions and a tag that is at generation 3, every move in the audit log."""
    store = MemoryStore()
    store.create(layout.FORMAT_KEY, canonical({"fmt": 1}))
    for number in (1, 2, 3):
        lab.push(store, ORDERS, number - 1, tag="prod")
    return store


def put(store: MemoryStore, key: str, body: bytes) -> None:
    store.swap(key, body, etag=store.get(key, limit_bytes=RECORD_BYTES_MAX).etag)


def put_back(store: MemoryStore, generation: int) -> None:
    """Put an earlier statement of the tag in its place, as anybody who can write to the bucket could."""
    state = read_tag_state(store, ORDERS, "prod")
    assert state is not None
    logged = read_log(store, generation)
    record = find_target(store, AdapterRef("acme", "orders", version=logged["version"])).record
    put(store, KEY, canonical({"fmt": 1, "tag": logged["tag"], "record": record.to_value()}))


def read_log(store: MemoryStore, generation: int) -> dict:
    from loraplex_registry.format.tags import read_tag_log

    body = store.get(layout.tag_log_key(ORDERS, "prod", generation), limit_bytes=RECORD_BYTES_MAX).body
    entry = read_tag_log(body, where="prod")
    return {"tag": entry.envelope, "version": entry.statement.version}


def told(store: MemoryStore, lab: Lab, generation: int, subject: str = "acme/orders@prod") -> None:
    AuditLog(store, "acme").append(
        "tag", subject, lab.signer, lab.now, detail={"generation": str(generation)}
    )


def judge(store: MemoryStore, lab: Lab, **changes: object) -> PolicyJudge:
    """Judge by the lab's policy; `changes` are made to its rules, `marks` are what was seen before."""
    marks = changes.pop("marks", None) or MemoryMarks()
    rules = tuple(dataclasses.replace(rule, **changes) for rule in lab.policy.rules)  # type: ignore[arg-type]
    return PolicyJudge(Registry(store), TrustPolicy(rules), marks=marks, now=lambda: lab.now)  # type: ignore[arg-type]


def judged(store: MemoryStore, lab: Lab, **changes: object) -> list[tuple[str, str, str]]:
    by = judge(store, lab, **changes)
    depth = Depth(lab.now, judge=by.version, judge_tag=by.tag, judge_list=by.revocations)
    return [(one.code, one.severity, one.refusal) for one in check(store, depth, workers=1).findings]


def found(store: MemoryStore, lab: Lab) -> list[tuple[str, str]]:
    return [(one.code, one.severity) for one in check(store, Depth(lab.now), workers=1).findings]


# --- older statements that were put back


def test_a_tag_behind_a_later_statement_of_its_log_was_put_back(store: MemoryStore, lab: Lab) -> None:
    put_back(store, 1)
    assert found(store, lab) == [("tag-rolled-back", "damage")]
    events = list(tag_history(store, ORDERS, "prod"))
    assert [(event.generation, event.fault is None) for event in events] == [(1, True), (2, False)]
    assert "generation 1: somebody put that older statement back" in str(events[1].fault)


def test_a_tag_put_back_by_one_is_told_from_a_mover_that_died_by_the_audit_log(
    store: MemoryStore, lab: Lab
) -> None:
    told(store, lab, 3)
    assert found(store, lab) == []
    put_back(store, 2)
    assert found(store, lab) == [("tag-rolled-back", "damage")]
    (last,) = [event for event in tag_history(store, ORDERS, "prod") if event.remark]
    assert (last.generation, last.fault) == (2, None)
    assert "by one" in str(last.remark)


def test_without_word_of_the_later_move_a_tag_behind_its_log_is_a_warning(
    store: MemoryStore, lab: Lab
) -> None:
    put_back(store, 2)
    told(store, lab, 2)
    AuditLog(store, "globex").append(  # a tenant's log says nothing of another tenant's tags
        "tag", "acme/orders@prod", lab.signer, lab.now, detail={"generation": "9"}
    )
    (finding,) = check(store, Depth(lab.now), workers=1).findings
    assert (finding.code, finding.severity, finding.key) == ("tag-behind-log", "warning", KEY)
    lab.tag(store, ORDERS, 3, "prod")
    assert found(store, lab) == []


def test_another_statement_of_the_tags_own_generation_in_its_log_is_a_fork(
    store: MemoryStore, lab: Lab
) -> None:
    put_back(store, 2)
    lab.now = lab.now.replace(minute=1)
    mover = Mover(store, ORDERS, "prod", [lab.signer], lab.now)
    lab.now = lab.now.replace(minute=0)
    state = read_tag_state(store, ORDERS, "prod")
    assert state is not None
    before = read_tag_state(store, ORDERS, "prod")
    assert before is not None
    other = mover.next(find_target(store, AdapterRef.parse("acme/orders@1")), before)
    forged = dataclasses.replace(other.statement, generation=2, prev=state.statement.prev)
    from loraplex_registry.format.tags import make_tag

    put(store, KEY, make_tag(forged, other.record, lab.signer).to_bytes())
    assert found(store, lab) == [("tag-rolled-back", "damage")]
    assert "another statement" in str(list(tag_history(store, ORDERS, "prod"))[-1].fault)


# --- signatures


def test_every_tag_of_a_good_registry_is_trusted_removed_ones_too(store: MemoryStore, lab: Lab) -> None:
    lab.tag(store, ORDERS, 1, "old")
    lab.untag(store, ORDERS, "old")
    assert judged(store, lab) == []


def test_a_tag_signed_by_another_key_is_damage(store: MemoryStore, lab: Lab) -> None:
    target = find_target(store, AdapterRef.parse("acme/orders@1"))
    move_tag(store, ORDERS, "prod", target, [lab.other], now=lab.now, sleep=no_sleep)
    assert judged(store, lab) == [("tag-not-trusted", "damage", "SIGNATURE_INVALID")]
    assert found(store, lab) == []


def test_a_tag_with_too_few_signatures_is_damage(store: MemoryStore, lab: Lab) -> None:
    from loraplex_registry.trust.policy import TagRule

    both = (*lab.policy.rules[0].keys, TrustedKey(lab.other.public_key))
    changes = {"tags": (("prod", TagRule(2, both)),)}
    assert judged(store, lab, **changes) == [("tag-not-trusted", "damage", "SIGNATURE_INVALID")]


def test_a_tag_older_than_it_was_seen_here_is_damage(store: MemoryStore, lab: Lab) -> None:
    from loraplex_registry.trust.marks import Mark

    marks = MemoryMarks()
    mark = Mark(4, "0" * 64, (lab.signer.keyid,))
    marks.advance("acme", "orders@prod", mark, issued=lab.now, trusted=[lab.signer.keyid])
    assert judged(store, lab, marks=marks) == [("tag-not-trusted", "damage", "ROLLBACK")]
    assert marks.seen("acme").marks["orders@prod"] == mark


def test_a_tag_that_carries_another_content_than_it_was_signed_for_is_damage(
    store: MemoryStore, lab: Lab
) -> None:
    tag = read_tag(store.get(KEY, limit_bytes=RECORD_BYTES_MAX).body, where="prod")
    other = find_target(store, AdapterRef.parse("acme/orders@1")).record
    put(store, KEY, dataclasses.replace(tag, record=other).to_bytes())
    assert ("tag-mismatch", "damage") in found(store, lab) or ("tag-unreadable", "damage") in found(
        store, lab
    )


def test_a_revoked_version_is_noted_and_a_tag_that_leads_to_it_is_a_warning(
    store: MemoryStore, lab: Lab
) -> None:
    revokers = lab.policy.rules[0].keys
    digest = find_target(store, AdapterRef.parse("acme/orders@3")).record.digest
    append(store, "acme", [Revocation("bad", digest=digest)], lab.signer, revokers=revokers, now=lab.now)
    assert judged(store, lab, revokers=revokers) == [
        ("not-trusted", "note", "REVOKED"),
        ("tag-not-trusted", "warning", "REVOKED"),
    ]


def test_a_revocation_list_that_nobody_believes_is_damage(store: MemoryStore, lab: Lab) -> None:
    others = [TrustedKey(lab.other.public_key)]
    append(store, "acme", [], lab.other, revokers=others, now=lab.now, refresh=True)
    codes = judged(store, lab, revokers=lab.policy.rules[0].keys)
    assert ("revocations-not-trusted", "damage", "SIGNATURE_INVALID") in codes
    assert len(codes) == 5, "the list, three versions and a tag"


# --- movers that died


def die_after_the_move(store: MemoryStore, lab: Lab, version: int, tag: str = "prod") -> None:
    """Delete a version while a tag is moved to it; the mover dies before it looks again."""
    target = find_target(store, AdapterRef("acme", "orders", version=version))
    lab.delete(store, ORDERS, version, force=True)
    mover = Mover(store, ORDERS, tag, [lab.signer], lab.now)
    mover.move(target, expect=None, expires="", known=Unread.UNREAD, sleep=no_sleep)


def settle(store: MemoryStore, lab: Lab, tag: str = "prod", **changes: object):
    by = judge(store, lab, **changes)
    return settle_tag(
        store,
        AdapterRef("acme", "orders", tag=tag),
        lab.signer,
        now=lab.now,
        judge_statement=by.statement,
        judge_version=by.version,
    )


def test_the_next_move_settles_a_tag_on_a_deleted_version(store: MemoryStore, lab: Lab) -> None:
    die_after_the_move(store, lab, 2)
    assert found(store, lab) == [("tag-dangling", "warning")]
    lab.tag(store, ORDERS, 1, "prod")
    assert found(store, lab) == []


def test_a_tag_on_a_deleted_version_is_put_back_to_what_it_said_before(store: MemoryStore, lab: Lab) -> None:
    die_after_the_move(store, lab, 2)
    move = settle(store, lab)
    assert (move.statement.version, move.statement.generation) == (3, 5)
    assert found(store, lab) == []
    assert lab.read(store, PROD) == (3, 2)
    assert settle(store, lab) is None, "there is nothing to settle any more"


def test_where_what_it_said_before_is_gone_too_it_points_to_nothing(store: MemoryStore, lab: Lab) -> None:
    die_after_the_move(store, lab, 2, tag="new")
    assert settle(store, lab, "new").statement.version is None
    target = find_target(store, AdapterRef.parse("acme/orders@1"))
    lab.delete(store, ORDERS, 3, force=True)  # prod says nothing now
    lab.delete(store, ORDERS, 1, force=True)
    Mover(store, ORDERS, "prod", [lab.signer], lab.now).move(
        target, expect=None, expires="", known=Unread.UNREAD, sleep=no_sleep
    )
    assert settle(store, lab).statement.version is None
    assert found(store, lab) == []


def test_nothing_is_signed_on_top_of_a_statement_that_nobody_believes(store: MemoryStore, lab: Lab) -> None:
    target = find_target(store, AdapterRef.parse("acme/orders@2"))
    lab.delete(store, ORDERS, 2)
    for signers, refusal in (([lab.other], SignatureInvalidError), ([lab.signer, lab.other], ConflictError)):
        Mover(store, ORDERS, "prod", signers, lab.now).move(
            target, expect=None, expires="", known=Unread.UNREAD, sleep=no_sleep
        )
        before = store.get(KEY, limit_bytes=RECORD_BYTES_MAX).body
        with pytest.raises(refusal):
            settle(store, lab)
        assert store.get(KEY, limit_bytes=RECORD_BYTES_MAX).body == before


def test_a_log_that_is_not_the_tags_own_is_never_followed(store: MemoryStore, lab: Lab) -> None:
    from loraplex_registry.errors import DamagedError

    die_after_the_move(store, lab, 2)
    log = layout.tag_log_key(ORDERS, "prod", 3)
    other = store.get(layout.tag_log_key(ORDERS, "prod", 1), limit_bytes=RECORD_BYTES_MAX).body
    put(store, log, other)
    with pytest.raises(DamagedError, match="not the one its statement follows"):
        settle(store, lab)


# --- the commands


def test_the_commands_find_and_settle(tmp_path: Path, lab: Lab) -> None:
    (tmp_path / "home").mkdir()
    shell = Shell(tmp_path / "home", {})
    root = Path(shell.json("init", "--tenant", "acme")["registry"].removeprefix("file://"))
    shell("push", lab.pulled(0), "orders", "--tag", "prod")
    shell("push", lab.pulled(1), "orders", "--tag", "prod")
    tag = root / "t/acme/a/orders/tags/prod.json"
    newest = tag.read_bytes()
    assert shell.json("fsck", "--signatures")["findings"] == []
    assert shell.json("log", "orders@prod")["moves"][-1]["remark"] is None

    shell("push", lab.pulled(2), "orders", "--tag", "prod")
    put_in(tag, newest)
    (finding,) = shell.json("fsck", "acme", code=8)["findings"]
    assert (finding["code"], finding["refusal"]) == ("tag-rolled-back", "")
    assert "audit log tells of 3" in finding["reason"]
    assert "by one" in shell("log", "orders@prod")
    newer = root / "t/acme/a/orders/log/prod.json/0000000002.json"
    put_in(newer.with_name("0000000003.json"), newer.read_bytes())
    said = shell("log", "orders@prod", code=8)
    assert "FAULT" in said
    assert "in the log behind the tag" in said
    newer.with_name("0000000003.json").unlink()

    shell("untag", "orders@prod")
    shell("rm", "orders@2")
    put_in(tag, newest)  # a mover that died, or somebody who put the tag back: nothing is signed on top of it
    report = shell.json("fsck", "acme/orders", "--repair")
    assert {one["code"] for one in report["findings"]} == {"tag-dangling", "tag-behind-log"}
    assert report["repaired"] == []
    newer.unlink()  # now it is what a dead mover leaves
    done = shell.json("fsck", "acme/orders", "--repair")
    assert (len(done["repaired"]), done["findings"]) == (1, [])
    assert shell.json("verify", "orders@prod")["version"] == 1
    assert "repair acme/orders@prod" in shell("audit", "log")

    put_in(tag, newest)  # this machine has seen a later one
    assert shell.json("log", "orders@prod", code=6)["error"]["code"] == "ROLLBACK"
    refusals = {one["refusal"] for one in shell.json("fsck", "--signatures", code=8)["findings"]}
    assert "ROLLBACK" in refusals


def put_in(path: Path, body: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(body)


def test_a_finding_has_no_refusal_unless_somebody_was_asked() -> None:
    assert Finding("note", "x", "y", "z").refusal == ""
