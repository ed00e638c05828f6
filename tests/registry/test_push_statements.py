"""`push --attest`: no reader of a tag ever sees a version without the statements it was pushed with."""

import json
from pathlib import Path

import pytest

from loraplex_registry.errors import InvalidReferenceError
from loraplex_registry.format import layout
from loraplex_registry.format.record import ATTESTATIONS_MAX
from loraplex_registry.lifecycle.content import Statement
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.signing.attestations import verify_attestations
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.validation.base import BaseModel
from tests.registry import builders
from tests.registry.flaky_store import CrashError, FlakyStore
from tests.registry.shell import Shell

ORDERS = AdapterRef.parse("acme/orders")
PROD = AdapterRef.parse("acme/orders@prod")
SCORE = "https://acme.example/score/v1"


def score(signer: Signer, value: int) -> Statement:
    return Statement(SCORE, {"score": value}, signer)


def scores(store: MemoryStore, ref: AdapterRef, signer: Signer) -> list[int]:
    """The scores that a reader finds, each verified for the version it is about."""
    resolved = Registry(store).resolve(ref)
    subject = f"{ref.name}@{resolved.version}"
    found = verify_attestations(resolved.record.attest, subject, resolved.digest, [signer.public_key])
    return [statement.predicate["score"] for statement in found]


def test_statements_are_part_of_the_commit(adapter: Path, base: BaseModel, signer: Signer) -> None:
    store = MemoryStore()
    plain = Registry(MemoryStore()).publish(adapter, ORDERS, signer, base, tag="prod")
    done = Registry(store).publish(adapter, ORDERS, signer, base, tag="prod", statements=[score(signer, 7)])
    assert done.attested == (SCORE,)
    assert done.requests == plain.requests  # not one more
    assert scores(store, PROD, signer) == scores(store, ORDERS, signer) == [7]


def test_a_version_that_was_there_has_them_before_the_tag_moves(
    adapter: Path, base: BaseModel, signer: Signer
) -> None:
    store = MemoryStore()
    Registry(store).publish(adapter, ORDERS, signer, base, statements=[score(signer, 7)])
    calls = 0
    while True:
        flaky = FlakyStore(store, at=calls, how="crash before")
        try:
            Registry(flaky).publish(
                adapter, ORDERS, signer, base, tag="prod", statements=[score(signer, 7), score(signer, 8)]
            )
        except CrashError:
            if layout.tag_key(ORDERS, "prod") in store._keys:
                assert scores(store, PROD, signer) == [7, 8]
            calls += 1
            continue
        break
    assert calls > 4
    assert scores(store, PROD, signer) == scores(store, ORDERS, signer) == [7, 8]
    again = Registry(store).publish(
        adapter, ORDERS, signer, base, tag="prod", statements=[score(signer, 7), score(signer, 8)]
    )
    assert (again.created, again.attested, again.tag_moved) == (False, (), False)


def test_too_many_statements_are_refused_before_anything_is_uploaded(
    adapter: Path, base: BaseModel, signer: Signer
) -> None:
    store = MemoryStore()
    many = [score(signer, number) for number in range(ATTESTATIONS_MAX + 1)]
    with pytest.raises(InvalidReferenceError, match="attestations"):
        Registry(store).publish(adapter, ORDERS, signer, base, statements=many)
    assert list(store.blobs(layout.blobs_prefix(ORDERS))) == []
    assert Registry(store).publish(adapter, ORDERS, signer, base).version == 1


def test_the_command_says_what_was_attached_and_whether_it_is_encrypted(tmp_path: Path) -> None:
    shell = Shell.acme(tmp_path / "home")
    builders.make_base(shell.home / "base")
    builders.make_adapter(shell.home / "orders")
    (shell.home / "score.json").write_text(json.dumps({"score": 7}))
    words = (
        "push",
        "orders",
        "--base",
        "base",
        "--tag",
        "prod",
        "--attest",
        "score.json",
        "--attest-type",
        SCORE,
    )
    said = shell(*words)
    assert f"  attest  {SCORE}\n" in said
    assert "encrypted" not in said
    again = shell.json(*words)
    assert (again["created"], again["attested"], again["encrypted"]) == (False, [], False)
    actions = [entry["action"] for entry in shell.json("audit", "log", "acme")["entries"]]
    assert actions[-3:] == ["push", "attest", "tag"]
    shell("keys", "gen", "acme.kek", "--encryption")
    with (shell.home / ".config/loraplex/config.toml").open("a") as settings:
        settings.write(f'encryption_key = "file:{shell.home}/acme.kek"\n')
    assert "  stored  encrypted\n" in shell("push", "orders", "--base", "base")
    assert shell.json("push", "orders", "--base", "base")["encrypted"] is True
