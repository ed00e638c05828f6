"""Amending committed versions by compare-and-swap: nothing is lost between rivals, nothing but signatures changes."""

import contextlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraplex_registry.errors import (
    AdapterNotFoundError,
    ConflictError,
    DigestMismatchError,
    SignatureInvalidError,
    StoreUnavailableError,
)
from loraplex_registry.format import layout
from loraplex_registry.format.record import DeletingRecord
from loraplex_registry.lifecycle import amend as amending
from loraplex_registry.lifecycle.amend import amend, attach, resign
from loraplex_registry.lifecycle.versions import get_record
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer, bundle_keyid
from loraplex_registry.signing.attestations import verify_attestations
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Store
from loraplex_registry.trust.verdict import TrustPolicy, VerifiedManifest
from loraplex_registry.validation.base import BaseModel
from tests.registry import builders
from tests.registry.flaky_store import CrashError, FlakyStore

REF = AdapterRef("acme", "orders")
TYPE = "https://acme.example/score/v1"


@pytest.fixture
def verified(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy
) -> VerifiedManifest:
    """acme/orders@1, published and tagged prod."""
    registry.publish(adapter, REF, signer, base, tag="prod")
    return registry.verify(registry.resolve(REF), policy)


def test_rivals_lose_none_of_each_others_statements(
    verified: VerifiedManifest, store: Store, signer: Signer, registry: Registry
) -> None:
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            start.wait(10)
            assert attach(store, verified, TYPE, {"n": number}, signer).changed
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    for ref in (REF, AdapterRef("acme", "orders", tag="prod")):
        record = registry.resolve(ref).record
        found = verify_attestations(record.attest, "acme/orders@1", record.digest, [signer.public_key])
        assert sorted(item.predicate["n"] for item in found) == [0, 1, 2, 3]


def test_a_late_renewal_does_not_leave_an_older_copy_in_a_tag(
    verified: VerifiedManifest,
    store: Store,
    signer: Signer,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renew, calls = amending.refresh_copies, []

    def late(store: Store, ref: AdapterRef, target: Any) -> list[str]:
        calls.append(target)
        if len(calls) == 1:  # a rival amends the record and renews the tag before we renew it
            attach(store, verified, TYPE, {"n": 2}, signer)
        return renew(store, ref, target)

    monkeypatch.setattr(amending, "refresh_copies", late)
    done = attach(store, verified, TYPE, {"n": 1}, signer)
    newest = registry.resolve(REF).record
    assert len(newest.attest) == 2
    assert registry.resolve(AdapterRef("acme", "orders", tag="prod")).record == newest == done.record


def test_signing_again_changes_the_bundle_alone_and_tags_show_it(
    verified: VerifiedManifest, store: Store, registry: Registry, keys: Path, policy: TrustPolicy
) -> None:
    before = registry.resolve(REF).record
    globex = builders.load_signer(keys / "globex.key")
    done = resign(store, verified, globex)
    assert (done.changed, done.tags) == (True, ("prod",))
    assert replace(done.record, bundle=before.bundle) == before
    both = builders.acme_policy(keys).__class__.load(_both(keys))
    for ref in (REF, AdapterRef("acme", "orders", tag="prod")):
        assert registry.verify(registry.resolve(ref), both).keyid == globex.keyid
        with pytest.raises(SignatureInvalidError):
            registry.verify(registry.resolve(ref), policy)
    again = resign(store, verified, globex)
    assert (again.changed, again.tags) == (False, ())


def _both(keys: Path) -> Path:
    path = keys / "both.toml"
    path.write_text(
        'version = 1\ndefault = "deny"\n[[rules]]\nscope = "acme/**"\n'
        'keys = [{ path = "acme.pub" }, { path = "globex.pub" }]\n'
    )
    return path


def test_an_amendment_of_anything_else_is_a_fault(verified: VerifiedManifest, store: Store) -> None:
    with pytest.raises(ValueError, match="alone"):
        amend(store, REF, 1, lambda record: replace(record, pid="0" * 32))
    found = get_record(store, REF, 1)
    assert found is not None
    assert found[0] == verified.record


def test_what_is_not_committed_is_not_amended(
    verified: VerifiedManifest, store: Store, signer: Signer
) -> None:
    with pytest.raises(AdapterNotFoundError):
        amend(store, REF, 2, lambda record: record)
    key = layout.version_key(REF, 1)
    etag = store.get(key, limit_bytes=1 << 20).etag
    store.swap(key, DeletingRecord("me", 1, verified.record).to_bytes(), etag=etag)
    with pytest.raises(ConflictError, match="being deleted"):
        attach(store, verified, TYPE, {}, signer)


def test_a_version_exchanged_after_it_was_verified_is_not_signed(
    verified: VerifiedManifest, store: Store, signer: Signer, keys: Path
) -> None:
    key = layout.version_key(REF, 1)
    etag = store.get(key, limit_bytes=1 << 20).etag
    forged = replace(
        verified.record, manifest_bytes=verified.record.manifest_bytes.replace(b'"rank":4', b'"rank":8')
    )
    assert forged != verified.record
    store.swap(key, forged.to_bytes(), etag=etag)
    with pytest.raises(DigestMismatchError, match="replaced"):
        resign(store, verified, builders.load_signer(keys / "globex.key"))
    with pytest.raises(DigestMismatchError, match="replaced"):
        attach(store, verified, TYPE, {}, signer)


def test_a_lost_reply_is_read_back_and_done_once(
    verified: VerifiedManifest, store: Store, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap, lost = store.swap, []

    def lose(key: str, body: bytes, *, etag: str) -> str:
        swap(key, body, etag=etag)
        lost.append(key)
        raise StoreUnavailableError("the reply was lost", ambiguous=True)

    def lose_once(key: str, body: bytes, **options: Any) -> str:
        return lose(key, body, **options) if not lost else swap(key, body, **options)

    monkeypatch.setattr(store, "swap", lose_once)
    done = attach(store, verified, TYPE, {"n": 1}, signer)
    assert lost == [layout.version_key(REF, 1)]
    assert (done.changed, len(done.record.attest), done.tags) == (True, 1, ("prod",))


@pytest.mark.parametrize("how", ["lost request", "lost reply", "crash before", "crash after"])
@pytest.mark.parametrize("operation", ["attach", "resign"])
def test_whatever_breaks_at_any_call_the_same_command_again_completes_it(
    how: str,
    operation: str,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    keys: Path,
    clock: Any,
) -> None:
    globex = builders.load_signer(keys / "globex.key")

    def work(store: Any, verified: VerifiedManifest) -> None:
        if operation == "attach":
            attach(store, verified, TYPE, {"n": 1}, signer)
        else:
            resign(store, verified, globex)

    for at in range(100):
        store = MemoryStore()
        registry = Registry(store, clock=clock)
        registry.publish(adapter, REF, signer, base, tag="prod")
        verified = registry.verify(registry.resolve(REF), policy)
        flaky = FlakyStore(store, at=at, how=how)
        with contextlib.suppress(StoreUnavailableError, CrashError):
            work(flaky, verified)
        ended = len(flaky.calls) <= at
        if operation == "attach":
            # what was half done is as valid as before
            registry.verify(registry.resolve(AdapterRef("acme", "orders", tag="prod")), policy)
        work(store, verified)
        record = registry.resolve(REF).record
        assert registry.resolve(AdapterRef("acme", "orders", tag="prod")).record == record
        assert len(record.attest) == (operation == "attach")
        assert bundle_keyid(record.bundle) == (signer if operation == "attach" else globex).keyid
        if ended:
            assert at >= 5
            return
    pytest.fail("it never ended")
