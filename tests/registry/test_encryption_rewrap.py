"""Rewrapping and shredding, on versions published through the registry's own code."""

import dataclasses
import datetime as dt
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex_registry import cli
from loraplex_registry.encryption.data_keys import RingSealer, open_data_key
from loraplex_registry.encryption.kek_file import generate_encryption_key
from loraplex_registry.encryption.key_providers import KeyContext, KeyRing, provider_from
from loraplex_registry.encryption.rewrap import plan_shred, rewrap_all, rewrap_version, shred, versions_in
from loraplex_registry.errors import (
    AdapterNotFoundError,
    DamagedError,
    DigestMismatchError,
    KeyConflictError,
    PolicyRefusedError,
    RegistryError,
    SettingsError,
)
from loraplex_registry.format import layout
from loraplex_registry.format.record import RECORD_BYTES_MAX, CommittedRecord, read_record
from loraplex_registry.format.tags import read_tag
from loraplex_registry.lifecycle.audit import AuditLog
from loraplex_registry.lifecycle.versions import get_record
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage.store import Store
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import WEIGHTS_NAME
from tests.registry import builders
from tests.registry.conftest import ready

REF = AdapterRef("acme", "orders", version=1)
NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
Push = Callable[..., CommittedRecord]


@pytest.fixture
def keks(tmp_path: Path) -> Path:
    """Key files of acme: old, new; and globex's."""
    place = tmp_path / "keks"
    for name, tenant in (("old", "acme"), ("new", "acme"), ("globex", "globex")):
        generate_encryption_key(place / f"{name}.kek", tenant)
    return place


@pytest.fixture
def push(store: Store, tmp_path: Path, base: BaseModel, signer: Signer) -> Push:
    """Publishes an adapter under a key and returns its record."""

    def run(
        ref: AdapterRef, address: str | None, *, seed: int = 0, tag: str | None = None
    ) -> CommittedRecord:
        directory = builders.make_adapter(tmp_path / f"{ref.adapter}-{seed}", seed=seed)
        sealer = RingSealer(KeyRing([address])) if address else None
        ready(store)
        registry = Registry(store, clock=lambda: NOW)
        done = registry.publish(
            directory,
            AdapterRef(ref.tenant, ref.adapter),
            signer,
            base,
            tag=tag,
            version=ref.version,
            sealer=sealer,
        )
        assert done.created
        return record_of(store, ref)

    return run


def record_of(store: Store, ref: AdapterRef) -> CommittedRecord:
    """Return a version's record."""
    assert ref.version is not None
    item = store.get(layout.version_key(ref, ref.version), limit_bytes=RECORD_BYTES_MAX)
    record = read_record(item.body, version=ref.version, where=str(ref))
    assert isinstance(record, CommittedRecord)
    return record


def blobs_of(store: Store, ref: AdapterRef) -> dict[str, Any]:
    """Return key -> size and time of every blob of an adapter."""
    prefix = layout.blobs_prefix(ref)
    return {blob.key: (blob.size, blob.modified_s) for blob in store.blobs(prefix)}


def opens(keks: Path, record: CommittedRecord, *names: str, ref: AdapterRef = REF) -> bool:
    """Say whether the key files of these names open a record."""
    assert record.encryption is not None
    assert ref.version is not None
    ring = KeyRing([f"file:{keks}/{name}.kek" for name in names])
    try:
        open_data_key(ring, record.encryption, KeyContext.of(ref, ref.version, record.pid))
    except (PolicyRefusedError, DigestMismatchError, SettingsError):
        return False
    return True


def test_an_encrypted_push_leaves_no_plaintext_in_the_store(store: Store, keks: Path, push: Push) -> None:
    record = push(REF, f"file:{keks}/old.kek")
    assert record.encryption is not None
    key = open_data_key(
        KeyRing([f"file:{keks}/old.kek"]), record.encryption, KeyContext.of(REF, 1, record.pid)
    )
    for file in record.files:
        manifest = record.manifest_unverified().file(file.name)
        if file.inline is not None:
            assert b"adapter" not in file.inline
            assert len(key.opened(file.inline, manifest)) == file.size
            continue
        blob = next(iter(store.blobs(layout.blobs_prefix(REF))))
        body = b"".join(
            bytes(piece)
            for piece in store.read_range(
                layout.adapter_prefix(REF) + (file.blob or ""),
                start=0,
                length=blob.size,
                size_bytes=blob.size,
            )
        )
        assert b"lora_A" not in body
        assert b"lora_A" in key.opened(body, manifest)


def test_rewrapping_changes_the_wrapped_key_and_nothing_else(store: Store, keks: Path, push: Push) -> None:
    before = push(REF, f"file:{keks}/old.kek", tag="prod")
    blobs = blobs_of(store, REF)
    to = provider_from(f"file:{keks}/new.kek", tenant="acme")
    done = rewrap_version(store, REF, KeyRing([f"file:{keks}/old.kek"]), to)
    after = record_of(store, REF)
    assert done is not None
    assert (done.outcome, done.kek, done.tags) == ("rewrapped", to.uri, ("prod",))
    assert dataclasses.replace(after, encryption=before.encryption) == before
    assert after.digest == before.digest
    assert blobs_of(store, REF) == blobs
    assert opens(keks, after, "new")
    assert not opens(keks, after, "old")
    item = store.get(layout.tag_key(REF, "prod"), limit_bytes=RECORD_BYTES_MAX)
    assert read_tag(item.body, where="prod").record == after
    again = rewrap_version(store, REF, KeyRing([f"file:{keks}/new.kek"]), to)
    assert again is not None
    assert (again.outcome, again.tags) == ("already", ())


def test_a_tag_left_stale_by_a_crash_is_renewed_by_the_same_command(
    store: Store, keks: Path, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(REF, f"file:{keks}/old.kek", tag="prod")
    to = provider_from(f"file:{keks}/new.kek", tenant="acme")
    ring = KeyRing([f"file:{keks}/old.kek", f"file:{keks}/new.kek"])
    with monkeypatch.context() as patch:
        patch.setattr("loraplex_registry.encryption.rewrap.refresh_copies", lambda *_: [])
        rewrap_version(store, REF, ring, to)
    done = rewrap_version(store, REF, ring, to)
    assert done is not None
    assert (done.outcome, done.tags) == ("already", ("prod",))


@pytest.fixture
def stale(
    store: Store, keks: Path, push: Push, policy: TrustPolicy, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., bytes]:
    """Reads a file by a tag whose copy of the record still names the old key, with the keys of these names.

    The rewrap died before it renewed the tag; `meanwhile` changes the version's own record then.
    """
    push(REF, f"file:{keks}/old.kek", tag="prod")
    with monkeypatch.context() as patch:
        patch.setattr("loraplex_registry.encryption.rewrap.refresh_copies", lambda *_: [])
        to = provider_from(f"file:{keks}/new.kek", tenant="acme")
        rewrap_version(store, REF, KeyRing([f"file:{keks}/old.kek"]), to)

    def read(
        *names: str, name: str = WEIGHTS_NAME, meanwhile: Callable[[CommittedRecord], Any] | None = None
    ) -> bytes:
        if meanwhile is not None:
            item = store.get(layout.version_key(REF, 1), limit_bytes=RECORD_BYTES_MAX)
            changed = meanwhile(record_of(store, REF))
            store.swap(layout.version_key(REF, 1), changed.to_bytes(), etag=item.etag)
        registry = Registry(
            store, clock=lambda: NOW, keys=KeyRing([f"file:{keks}/{key}.kek" for key in names])
        )
        verified = registry.verify(registry.resolve(AdapterRef.parse("acme/orders@prod")), policy)
        assert verified.record.encryption != record_of(store, REF).encryption
        return registry.read_file(verified, name)

    return read


@pytest.mark.parametrize("names", [("new",), ("lost", "new")], ids=" ".join)
def test_a_stale_tag_is_read_with_the_new_key_alone(names: tuple[str, ...], stale: Any, store: Store) -> None:
    for file in record_of(store, REF).manifest_unverified().files:
        body = stale(*names, name=file.name)
        assert (len(body), hashlib.sha256(body).hexdigest()) == (file.size, file.sha256)


def test_a_record_that_a_stale_tag_leads_to_must_be_encrypted_and_of_the_same_manifest(
    stale: Any, store: Store, keks: Path, push: Push
) -> None:
    def in_clear(record: CommittedRecord) -> CommittedRecord:
        assert record.encryption is not None
        context = KeyContext.of(REF, 1, record.pid)
        key = open_data_key(KeyRing([f"file:{keks}/new.kek"]), record.encryption, context)
        manifest = record.manifest_unverified()
        files = [
            file
            if file.inline is None
            else dataclasses.replace(file, inline=key.opened(file.inline, manifest.file(file.name)))
            for file in record.files
        ]
        return record.revised(encryption=None, files=tuple(files))

    record, other = record_of(store, REF), push(AdapterRef("acme", "orders", version=2), None, seed=1)
    forged = dataclasses.replace(record, manifest_bytes=other.manifest_bytes, bundle=other.bundle)
    for meanwhile in (in_clear, lambda _: forged):
        with pytest.raises(PolicyRefusedError, match="not among the configured ones"):
            stale("new", meanwhile=meanwhile)


def test_no_record_is_read_again_for_a_version_that_no_key_opens(
    stale: Any, store: Store, keks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_encryption_key(keks / "third.kek", "acme")
    asked = []

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return get_record(*arguments)

    monkeypatch.setattr("loraplex_registry.delivery.stored_files.get_record", counted)
    with pytest.raises(PolicyRefusedError, match="not among the configured ones"):
        stale("third")
    assert len(asked) == 1


class _Racing:
    """Passes everything on; before the first swap of a record, somebody else replaces it."""

    def __init__(self, store: Store, rival: Callable[[], object]) -> None:
        self._store = store
        self._rival: Callable[[], object] | None = rival

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        if self._rival is not None:
            rival, self._rival = self._rival, None
            rival()
            with pytest.raises(KeyConflictError):
                self._store.swap(key, body, etag=etag)
            raise KeyConflictError("somebody else was first")
        return self._store.swap(key, body, etag=etag)


def test_of_two_rewraps_the_later_one_builds_on_the_earlier(store: Store, keks: Path, push: Push) -> None:
    push(REF, f"file:{keks}/old.kek")
    generate_encryption_key(keks / "rival.kek", "acme")
    ring = KeyRing([f"file:{keks}/{name}.kek" for name in ("old", "rival")])
    rival, to = (provider_from(f"file:{keks}/{name}.kek", tenant="acme") for name in ("rival", "new"))
    racing: Any = _Racing(store, lambda: rewrap_version(store, REF, ring, rival))
    done = rewrap_version(racing, REF, ring, to)
    assert done is not None
    assert done.outcome == "rewrapped"
    assert opens(keks, record_of(store, REF), "new")


def test_a_key_that_does_not_give_back_what_it_wrapped_changes_nothing(
    store: Store, keks: Path, push: Push
) -> None:
    before = push(REF, f"file:{keks}/old.kek")

    class Forgetful:
        uri = "raw:forgetful"

        def wrap(self, dek: bytes, context: KeyContext) -> bytes:
            return b"gone"

        def unwrap(self, wrapped: bytes, context: KeyContext) -> bytes:
            return b"something else"

    with pytest.raises(DamagedError, match="does not give back"):
        rewrap_version(store, REF, KeyRing([f"file:{keks}/old.kek"]), Forgetful())
    assert record_of(store, REF) == before


def test_a_whole_tenant_is_rewrapped_and_damage_is_reported(store: Store, keks: Path, push: Push) -> None:
    old = f"file:{keks}/old.kek"
    push(REF, old)
    push(AdapterRef("acme", "orders", version=2), None, seed=1)
    push(AdapterRef("acme", "zeta", version="1.0.0"), old, seed=2)
    moved = push(AdapterRef("acme", "moved", version=3), old, seed=3)
    bad = AdapterRef("acme", "moved", version=3)
    item = store.get(layout.version_key(bad, 3), limit_bytes=RECORD_BYTES_MAX)
    stolen = record_of(store, REF).encryption
    store.swap(
        layout.version_key(bad, 3), dataclasses.replace(moved, encryption=stolen).to_bytes(), etag=item.etag
    )
    to = provider_from(f"file:{keks}/new.kek", tenant="acme")
    done = {str(one.ref): one for one in rewrap_all(store, versions_in(store, "acme"), KeyRing([old]), to)}
    assert {ref: one.outcome for ref, one in done.items()} == {
        "acme/moved@3": "failed",
        "acme/orders@1": "rewrapped",
        "acme/orders@2": "clear",
        "acme/zeta@1.0.0": "rewrapped",
    }
    assert "tampered" in done["acme/moved@3"].reason


def test_scopes_name_a_tenant_an_adapter_or_a_version(store: Store, keks: Path, push: Push) -> None:
    push(REF, None)
    assert [str(ref) for ref in versions_in(store, "acme/orders@1")] == ["acme/orders@1"]
    assert [str(ref) for ref in versions_in(store, "acme/orders")] == ["acme/orders@1"]
    for scope in ("acme/none", "acme/orders@2", "acme/orders@prod"):
        with pytest.raises(AdapterNotFoundError):
            list(versions_in(store, scope))
    for scope in ("..", "acme/*", ""):
        with pytest.raises(RegistryError):
            list(versions_in(store, scope))


def test_shredding_is_planned_done_and_proven(store: Store, keks: Path, push: Push) -> None:
    generate_encryption_key(keks / "other.kek", "acme")
    push(REF, f"file:{keks}/old.kek")
    push(AdapterRef("acme", "orders", version=2), None, seed=1)
    push(AdapterRef("acme", "beyond", version=1), f"file:{keks}/other.kek", seed=2)
    ring = KeyRing([f"file:{keks}/old.kek", f"file:{keks}/new.kek"])
    plan = plan_shred(store, "acme", ring)
    assert (plan.encrypted, plan.clear, plan.beyond) == (
        ("acme/orders@1",),
        ("acme/orders@2",),
        ("acme/beyond@1",),
    )
    assert len(plan.keys) == 2
    assert opens(keks, record_of(store, REF), "old")
    done = shred(store, "acme", ring, pending_days=7)
    assert (done.tried, done.opened) == (2, ())
    assert not (keks / "old.kek").exists()
    assert not opens(keks, record_of(store, REF), "old")
    assert (keks / "globex.kek").exists()


def test_another_tenants_key_is_never_shredded(store: Store, keks: Path) -> None:
    with pytest.raises(SettingsError, match="not tenant acme's"):
        plan_shred(store, "acme", KeyRing([f"file:{keks}/globex.kek"]))
    with pytest.raises(SettingsError, match="encryption_key"):
        plan_shred(store, "acme", KeyRing())
    with pytest.raises(PolicyRefusedError, match="its holder"):
        plan_shred(store, "acme", KeyRing(["vault:transit/keys/acme"]))


def test_the_commands_rewrap_and_shred(
    local: Store,
    keks: Path,
    keys: Path,
    tmp_path: Path,
    base: BaseModel,
    signer: Signer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    settings = tmp_path / "config" / "loraplex" / "config.toml"
    settings.parent.mkdir(parents=True)

    def configure(kek: str) -> None:
        settings.write_text(
            f'registry = "{local.url}"\nkey = "{keys}/acme.key"\nencryption_key = "file:{keks}/{kek}"\naudit = "on"\n'
        )

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        code = cli.main([*words, "--json"])
        return code, json.loads(capsys.readouterr().out)

    directory = builders.make_adapter(tmp_path / "orders")
    sealer = RingSealer(KeyRing([f"file:{keks}/old.kek"]))
    Registry(local).publish(directory, AdapterRef("acme", "orders"), signer, base, tag="prod", sealer=sealer)
    configure("old.kek")
    code, answer = run("rewrap", "acme", "--to", f"file:{keks}/new.kek")
    assert (code, answer["counts"], answer["versions"][0]["tags"]) == (0, {"rewrapped": 1}, ["prod"])
    configure("new.kek")
    code, answer = run("shred", "acme")
    assert (code, answer["applied"], answer["encrypted"]) == (0, False, ["acme/orders@1"])
    assert (keks / "new.kek").exists()
    code, answer = run("shred", "acme", "--apply")
    assert (code, answer["applied"], answer["tried"], answer["opened"]) == (0, True, 1, [])
    assert not (keks / "new.kek").exists()
    entries = list(AuditLog(local, "acme").entries())
    assert [(entry.action, entry.subject) for entry in entries] == [("rewrap", "acme"), ("shred", "acme")]
    code, answer = run("shred", "acme", "--apply")
    assert code == 2
