"""Moving tags: compare-and-swap, history, expectations, removal, several signatures, rivals and deleters."""

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest

from loraplex_registry.errors import (
    AdapterNotFoundError,
    ConflictError,
    DamagedError,
    InvalidReferenceError,
    SettingsError,
)
from loraplex_registry.format import layout
from loraplex_registry.format.record import RECORD_BYTES_MAX, AbortedRecord
from loraplex_registry.format.tags import PAYLOAD_TYPE
from loraplex_registry.lifecycle.history import tag_history
from loraplex_registry.lifecycle.proposals import move_proposed, propose, proposed_statement
from loraplex_registry.lifecycle.tagging import (
    Target,
    find_target,
    move_tag,
    parse_expect,
    read_tag_state,
    refresh_copies,
    untag,
)
from loraplex_registry.refs import AdapterRef
from loraplex_registry.signing import envelope_keyids, verify_envelope
from loraplex_registry.storage.store import CountingStore, Store
from tests.registry.flaky_store import FlakyStore, Meanwhile
from tests.registry.lab import Lab, no_sleep
from tests.registry.shell import Shell

ORDERS = AdapterRef.parse("acme/orders")


def target(store: Store, version: int) -> Target:
    return find_target(store, AdapterRef("acme", "orders", version=version))


def generation(store: Store, tag: str = "prod") -> int:
    state = read_tag_state(store, ORDERS, tag)
    assert state is not None
    return state.statement.generation


def test_every_move_is_kept_and_each_follows_from_the_one_before(two: Store, lab: Lab) -> None:
    lab.tag(two, ORDERS, 2, "prod")
    lab.tag(two, ORDERS, 1, "prod")  # back is a move like any other
    lab.untag(two, ORDERS, "prod")
    lab.tag(two, ORDERS, 2, "prod")
    events = list(tag_history(two, ORDERS, "prod"))
    assert [(event.generation, event.version) for event in events] == [
        (1, 1),
        (2, 2),
        (3, 1),
        (4, None),
        (5, 2),
    ]
    assert all(event.fault is None and event.keyids == (lab.signer.keyid,) for event in events)
    assert len(list(two.children(layout.tag_log_prefix(ORDERS, "prod")))) == 4


def test_a_tag_that_is_there_already_is_left_alone(two: Store, lab: Lab) -> None:
    before = two.get(layout.tag_key(ORDERS, "prod"), limit_bytes=RECORD_BYTES_MAX)
    counting = CountingStore(two)
    assert not lab.tag(counting, ORDERS, 1, "prod").moved
    assert counting.requests == 2  # the version, the tag
    assert two.get(layout.tag_key(ORDERS, "prod"), limit_bytes=RECORD_BYTES_MAX) == before


def test_a_tag_set_by_another_key_is_signed_anew(two: Store, lab: Lab) -> None:
    move = move_tag(two, ORDERS, "prod", target(two, 1), [lab.other], now=lab.now)
    assert (move.moved, move.statement.generation) == (True, 2)


def test_requests_of_a_move(two: Store, lab: Lab) -> None:
    counting = CountingStore(two)
    lab.tag(counting, ORDERS, 2, "prod")
    assert counting.requests == 5  # version, tag, log, tag, version again
    counting = CountingStore(two)
    lab.tag(counting, ORDERS, 2, "new")
    assert counting.requests == 4


@pytest.mark.parametrize("expect", ["1", "digest"])
def test_a_move_with_the_right_expectation_goes_through(expect: str, two: Store, lab: Lab) -> None:
    text = target(two, 1).record.digest if expect == "digest" else expect
    assert lab.tag(two, ORDERS, 2, "prod", expect=parse_expect(text)).moved


def test_a_whole_number_is_a_generation_and_never_a_version(two: Store, lab: Lab) -> None:
    lab.tag(two, ORDERS, 2, "prod", expect=1)
    lab.tag(two, ORDERS, 1, "prod", expect=2)  # back to version 1, at generation 3
    with pytest.raises(ConflictError, match="at generation 3 "):
        lab.tag(two, ORDERS, 2, "prod", expect=parse_expect("1"))
    assert lab.tag(two, ORDERS, 2, "prod", expect=parse_expect("3")).moved


@pytest.mark.parametrize("expect", ["0", "2", "absent", "sha256:" + "0" * 64, "1.0.0"])
def test_a_move_with_a_wrong_expectation_changes_nothing(expect: str, two: Store, lab: Lab) -> None:
    with pytest.raises(ConflictError, match="generation 1"):
        lab.tag(two, ORDERS, 2, "prod", expect=parse_expect(expect))
    assert generation(two) == 1
    assert lab.tag(two, ORDERS, 2, "new", expect="absent").moved
    assert lab.tag(two, ORDERS, 2, "newer", expect=0).moved


@pytest.mark.parametrize("text", ["", "-1", "latest", "sha256:x", "\u0661"])
def test_an_expectation_is_one_of_four_forms(text: str) -> None:
    with pytest.raises(InvalidReferenceError):
        parse_expect(text)


def test_a_rival_between_reading_and_writing_makes_the_move_be_built_again(two: Store, lab: Lab) -> None:
    third = lab.push(two, ORDERS, 2)[0].version
    rival = Meanwhile(two, "swap", [lambda: lab.tag(two, ORDERS, 2, "prod")])
    move = lab.tag(rival, ORDERS, third, "prod")
    assert (move.moved, move.statement.generation) == (True, 3)
    assert all(event.fault is None for event in tag_history(two, ORDERS, "prod"))


def test_with_an_expectation_a_rival_wins(two: Store, lab: Lab) -> None:
    rival = Meanwhile(two, "swap", [lambda: lab.tag(two, ORDERS, 2, "prod")])
    third = lab.push(two, ORDERS, 2)[0].version
    with pytest.raises(ConflictError, match="generation 2"):
        lab.tag(rival, ORDERS, third, "prod", expect=1)


def test_rivals_without_end_are_a_conflict(two: Store, lab: Lab) -> None:
    moves = [lambda: lab.tag(two, ORDERS, 2, "prod"), lambda: lab.tag(two, ORDERS, 1, "prod")]
    rivals = Meanwhile(two, "swap", itertools.cycle(moves))
    third = target(two, int(lab.push(two, ORDERS, 2)[0].version))
    waits: list[float] = []
    with pytest.raises(ConflictError, match="keeps being moved"):
        move_tag(rivals, ORDERS, "prod", third, [lab.signer], now=lab.now, sleep=waits.append)
    assert len(waits) == 5


def test_a_move_whose_reply_was_lost_and_that_was_overtaken_is_not_done_twice(two: Store, lab: Lab) -> None:
    third = int(lab.push(two, ORDERS, 2)[0].version)

    class LostThenOvertaken(FlakyStore):
        done = False

        def swap(self, key: str, body: bytes, *, etag: str) -> str:
            answer = super().swap(key, body, etag=etag)
            if not self.done:
                self.done = True
                lab.tag(two, ORDERS, 2, "prod")  # a rival moves on before we can look
                return super().swap(key, body, etag=etag)  # the request was sent twice: told "conflict"
            return answer

    move = lab.tag(LostThenOvertaken(two), ORDERS, third, "prod")
    assert (move.moved, move.statement.generation) == (True, 2)
    assert generation(two) == 3
    assert lab.read(two, AdapterRef.parse("acme/orders@prod"))[0] == 2  # the rival's move stands


# --- moving against deleting


def deleter(store: Store, lab: Lab, *versions: int, method: str = "swap") -> Meanwhile:
    """Deletes a version just before each of the first writes of a tag."""
    deletions = [functools.partial(lab.delete, store, ORDERS, version) for version in versions]
    return Meanwhile(store, method, deletions)


def test_a_tag_moved_to_a_version_that_is_deleted_meanwhile_goes_back(two: Store, lab: Lab) -> None:
    with pytest.raises(ConflictError, match="was deleted while"):
        lab.tag(deleter(two, lab, 2), ORDERS, 2, "prod")
    assert lab.read(two, AdapterRef.parse("acme/orders@prod"))[0] == 1
    assert [event.version for event in tag_history(two, ORDERS, "prod")] == [1, 2, 1]


def test_a_tag_whose_earlier_version_is_gone_too_goes_back_to_nothing(two: Store, lab: Lab) -> None:
    with pytest.raises(ConflictError, match="was deleted while"):
        lab.tag(deleter(two, lab, 2, 1), ORDERS, 2, "prod")
    assert [event.version for event in tag_history(two, ORDERS, "prod")] == [1, 2, 1, None]
    assert not lab.fsck(two).severities["warning"]


def test_a_new_tag_on_a_version_that_is_deleted_meanwhile_points_to_nothing(two: Store, lab: Lab) -> None:
    with pytest.raises(ConflictError):
        lab.tag(deleter(two, lab, 2, method="create"), ORDERS, 2, "fresh")
    with pytest.raises(AdapterNotFoundError):
        lab.read(two, AdapterRef.parse("acme/orders@fresh"))


def test_a_version_changed_without_being_deleted_is_no_conflict(two: Store, lab: Lab) -> None:
    """Attaching a statement or wrapping a key anew replaces the record, not what it is."""
    attested = {"payload": "", "payloadType": "x", "signatures": []}

    class Amended(FlakyStore):
        def swap(self, key: str, body: bytes, *, etag: str) -> str:
            etag_now = super().swap(key, body, etag=etag)
            if key == layout.tag_key(ORDERS, "prod") and not target(two, 2).record.attest:
                found = target(two, 2)
                new = dataclasses.replace(found.record, attest=(attested,))
                two.swap(layout.version_key(ORDERS, 2), new.to_bytes(), etag=found.etag)
            return etag_now

    assert lab.tag(Amended(two), ORDERS, 2, "prod").moved
    state = read_tag_state(two, ORDERS, "prod")
    assert state is not None
    assert state.tag.record is not None
    assert state.tag.record.attest == (attested,)  # and the tag's copy is the new one


def test_only_a_committed_version_can_be_tagged(two: Store, lab: Lab) -> None:
    two.create(layout.version_key(ORDERS, 9), AbortedRecord("0" * 32, "x").to_bytes())
    for version in (9, 10):
        with pytest.raises(AdapterNotFoundError):
            lab.tag(two, ORDERS, version, "prod")


# --- history that does not hold


def test_a_tag_put_back_to_an_older_generation_is_seen_by_the_next_mover(two: Store, lab: Lab) -> None:
    key = layout.tag_key(ORDERS, "prod")
    old = two.get(key, limit_bytes=RECORD_BYTES_MAX).body
    lab.tag(two, ORDERS, 2, "prod")
    lab.tag(two, ORDERS, 1, "prod")
    two.swap(key, old, etag=two.get(key, limit_bytes=RECORD_BYTES_MAX).etag)
    with pytest.raises(DamagedError, match="put back"):
        lab.tag(two, ORDERS, 2, "prod")
    assert lab.fsck(two).of("tag-rolled-back")


def test_an_entry_taken_out_of_the_log_is_a_fault(two: Store, lab: Lab) -> None:
    for version in (2, 1, 2):
        lab.tag(two, ORDERS, version, "prod")
    two._objects.pop(layout.tag_log_key(ORDERS, "prod", 2))
    two._keys.remove(layout.tag_log_key(ORDERS, "prod", 2))
    faults = [event.generation for event in tag_history(two, ORDERS, "prod") if event.fault]
    assert faults == [2]
    assert lab.fsck(two).of("log-gap")


def test_refreshing_renews_copies_and_leaves_statements_alone(two: Store, lab: Lab) -> None:
    lab.tag(two, ORDERS, 1, "canary")
    found = target(two, 1)
    new = dataclasses.replace(found.record, attest=({"a": 1},))
    two.swap(layout.version_key(ORDERS, 1), new.to_bytes(), etag=found.etag)
    assert [finding.severity for finding in lab.fsck(two).of("tag-copy-stale")] == ["note", "note"]
    assert refresh_copies(two, ORDERS, target(two, 1)) == ["canary", "prod"]
    assert not lab.fsck(two).of("tag-copy-stale")
    assert generation(two) == 1
    assert refresh_copies(two, ORDERS, target(two, 1)) == []


# --- several signatures


def test_two_keys_sign_at_once_or_one_after_the_other(two: Store, lab: Lab) -> None:
    both = [lab.signer, lab.other]
    move_tag(two, ORDERS, "prod", target(two, 2), both, now=lab.now, sleep=no_sleep)
    envelope = propose(two, ORDERS, "prod", target(two, 1), [lab.signer], now=lab.now)
    assert generation(two) == 2
    assert proposed_statement(envelope).generation == 3
    move = move_proposed(two, envelope, [lab.other], now=lab.now)
    assert (move.moved, move.statement.version) == (True, 1)
    state = read_tag_state(two, ORDERS, "prod")
    assert state is not None
    assert set(envelope_keyids(state.tag.envelope)) == {lab.signer.keyid, lab.other.keyid}
    verify_envelope(state.tag.envelope, PAYLOAD_TYPE, [signer.public_key for signer in both])
    assert not move_proposed(two, envelope, [lab.other], now=lab.now).moved  # again: done


def test_a_proposal_is_void_once_the_tag_was_moved(two: Store, lab: Lab) -> None:
    envelope = propose(two, ORDERS, "prod", target(two, 2), [lab.signer], now=lab.now)
    lab.untag(two, ORDERS, "prod")
    with pytest.raises(ConflictError, match="was moved since"):
        move_proposed(two, envelope, [lab.other], now=lab.now)


def test_a_proposal_to_a_version_deleted_since_is_refused(two: Store, lab: Lab) -> None:
    envelope = propose(two, ORDERS, "prod", target(two, 2), [lab.signer], now=lab.now)
    lab.delete(two, ORDERS, 2)
    with pytest.raises(AdapterNotFoundError):
        move_proposed(two, envelope, [lab.other], now=lab.now)


def test_removing_takes_a_key_and_what_never_was_is_not_removed(two: Store, lab: Lab) -> None:
    with pytest.raises(SettingsError, match="give a key"):
        untag(two, ORDERS, "prod", [], now=lab.now)
    assert untag(two, ORDERS, "never", [lab.signer], now=lab.now) is None
    assert lab.untag(two, ORDERS, "prod") is not None
    again = lab.untag(two, ORDERS, "prod")
    assert again is not None
    assert not again.moved


# --- the commands


def test_the_commands_move_remove_and_tell_the_history(shell: Shell, lab: Lab) -> None:
    shell("push", lab.pulled(0), "orders", "--tag", "prod")
    shell("push", lab.pulled(1), "orders")
    moved = shell.json("tag", "orders@2", "prod", "--expect", "1", "--expires", "30d")
    assert (moved["generation"], moved["version"], moved["previous_version"]) == (2, 2, 1)
    shell("tag", "orders@1", "prod", "--expect", "1", code=4)
    statement = shell.home / "statement.json"
    shell("tag", "orders@1", "prod", "--sign-only", statement)
    shell("keys", "gen", "second.key", "--no-passphrase")
    assert shell.json("tag", "--from", statement, "--key", "second.key")["generation"] == 3
    assert not shell.json("untag", "orders@prod")["version"]
    moves = shell.json("log", "orders@prod")["moves"]
    assert [(move["generation"], move["version"], len(move["keyids"])) for move in moves] == [
        (1, 1, 1),
        (2, 2, 1),
        (3, 1, 2),
        (4, None, 1),
    ]
    assert shell("log", "orders").count("\n") == 4
    shell("log", "orders@never", code=3)
    shell("untag", "orders@never", code=3)
    shell("tag", "orders", code=2)


def test_a_tag_that_needs_two_signatures_is_not_moved_by_one(shell: Shell, lab: Lab) -> None:
    shell("push", lab.pulled(0), "orders")
    shell("keys", "gen", "second.key", "--no-passphrase")
    policy = Path(shell.made["policy"])
    first, second = Path(shell.made["key"]).with_suffix(".pub"), shell.home / "second.pub"
    policy.write_text(
        f"""version = 1
default = "deny"
[[rules]]
scope = "acme/**"
keys = [{{ path = "{first}" }}, {{ path = "{second}" }}]
[rules.tags]
prod = {{ threshold = 2 }}
"""
    )
    assert "needs 2 signatures" in shell("tag", "orders@1", "prod", code=6)
    statement = shell.home / "statement.json"
    shell("tag", "orders@1", "prod", "--sign-only", statement)
    assert "these are 1" in shell("tag", "--from", statement, code=6)
    assert shell.json("tag", "--from", statement, "--key", "second.key")["moved"]
    shell("verify", "orders@prod")
    done = shell.json("tag", "orders@1", "prod", "--key", shell.made["key"], "--key", "second.key")
    assert not done["moved"]
