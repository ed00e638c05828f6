"""Publish, resolve, verify, fetch, pull: on every backend, through crashes and lost replies."""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from loraplex_registry.delivery import fetch
from loraplex_registry.errors import (
    AdapterNotFoundError,
    BaseMismatchError,
    ConflictError,
    DamagedError,
    InvalidReferenceError,
    RankTooLargeError,
    RegistryError,
    StoreUnavailableError,
    UnsupportedAdapterError,
)
from loraplex_registry.format import layout
from loraplex_registry.format.record import LEASE_S, PendingRecord, read_record
from loraplex_registry.lifecycle.content import Signed
from loraplex_registry.lifecycle.versions import Outcome, Reserver
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Store
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import Limits
from tests.registry import builders
from tests.registry.conftest import Clock
from tests.registry.flaky_store import CrashError, FlakyStore

ORDERS = AdapterRef.parse("acme/orders")
PROD = AdapterRef.parse("acme/orders@prod")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def test_what_is_published_is_fetched_byte_for_byte(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy, tmp_path: Path
) -> None:
    published = registry.publish(adapter, ORDERS, signer, base, tag="prod")
    assert (published.version, published.created, published.tag_moved) == (1, True, True)
    for text in ("acme/orders", "acme/orders@prod", "acme/orders@1", str(published.ref)):
        resolved = registry.resolve(AdapterRef.parse(text))
        assert resolved.digest == published.digest
        verified = registry.verify(resolved, policy, base_digest=base.digest)
        staged = registry.fetch(verified, tmp_path / "cache", base=base)
        assert staged.path == tmp_path / "cache" / published.digest.replace(":", "-")
        assert sorted(os.listdir(staged.path)) == [CONFIG, WEIGHTS]
        assert (staged.path / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
        assert staged.rank == 4
        assert staged.size_bytes == sum(file.stat().st_size for file in staged.path.iterdir())
    assert os.listdir(tmp_path / "cache") == [staged.path.name]


def test_the_same_bytes_are_published_once(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, clock: Clock
) -> None:
    first = registry.publish(adapter, ORDERS, signer, base, tag="prod")
    clock.advance(1000)
    second = registry.publish(adapter, ORDERS, signer, base, tag="prod")
    assert (second.created, second.tag_moved) == (False, False)
    assert (second.digest, second.version) == (first.digest, first.version)
    explicit = registry.publish(adapter, AdapterRef.parse("acme/orders@1"), signer, base)
    assert (explicit.created, explicit.digest) == (False, first.digest)


def test_new_bytes_get_the_next_version_and_old_versions_stay(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    first = registry.publish(adapter, ORDERS, signer, base)
    second = registry.publish(builders.make_adapter(adapter, seed=1), ORDERS, signer, base)
    assert (first.version, second.version) == (1, 2)
    assert registry.resolve(ORDERS).version == 2
    assert registry.resolve(first.ref).version == 1
    assert [entry.version for entry in registry.versions(ORDERS)] == [2, 1]


def test_requests_are_as_few_as_documented(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    def requests(**options: Any) -> int:
        return registry.publish(adapter, ORDERS, signer, base, **options).requests

    assert requests(version=1) == 3  # reserve, blob, commit
    assert requests(version=1) == 2  # reserve is refused, look: the same content
    builders.make_adapter(adapter, seed=1)
    assert requests(version=2, tag="prod") == 6  # and read the tag, write it, look at the version again
    assert requests() == 2  # list, look at the newest: the same content
    assert requests(tag="prod") == 3
    builders.make_adapter(adapter, seed=2)
    assert requests(version="3.0.0", tag="prod") == 7  # and keep the tag's earlier statement
    builders.make_adapter(adapter, seed=3)
    (adapter / "README.md").write_bytes(b"r" * 100_000)
    assert requests(version="3.0.1") == 4  # two blobs


def test_resolving_a_tag_or_a_version_is_one_request(
    store: Store, registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    registry.publish(adapter, PROD, signer, base)
    for text in ("acme/orders@prod", "acme/orders@1"):
        flaky = FlakyStore(store)
        Registry(flaky).resolve(AdapterRef.parse(text))
        assert flaky.calls == ["get"]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("acme/orders@prod", ["changed"]),
        ("acme/orders@1", ["changed"]),
        ("acme/orders@{digest}", ["changed"]),
        ("acme/orders", ["children", "changed"]),
    ],
)
def test_asking_again_is_one_conditional_request_and_gives_back_what_was_known(
    store: Store,
    registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    text: str,
    calls: list[str],
) -> None:
    published = registry.publish(adapter, PROD, signer, base)
    ref = AdapterRef.parse(text.format(digest=published.digest))
    known = registry.resolve(ref)
    flaky = FlakyStore(store)
    assert Registry(flaky).resolve(ref, known) is known
    assert flaky.calls == calls
    assert Registry(flaky).resolve(ref, dataclasses.replace(known, etag='"another"')) == known


def test_an_existing_version_with_other_content_is_a_conflict(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    registry.publish(adapter, ORDERS, signer, base, version=1)
    with pytest.raises(ConflictError, match="other content") as caught:
        registry.publish(builders.make_adapter(adapter, seed=1), ORDERS, signer, base, version=1)
    assert caught.value.code == "CONFLICT"


def test_a_version_signed_by_another_key_is_not_taken_for_ours(
    local_registry: Registry, adapter: Path, signer: Signer, base: BaseModel, keys: Path
) -> None:
    local_registry.publish(adapter, ORDERS, builders.load_signer(keys / "globex.key"), base)
    ours = local_registry.publish(adapter, ORDERS, signer, base)
    assert (ours.created, ours.version) == (True, 2)
    with pytest.raises(ConflictError):
        local_registry.publish(adapter, ORDERS, signer, base, version=1)


@pytest.mark.parametrize(
    "text", ["acme/nothing", "acme/orders@9", "acme/orders@canary", "acme/orders@sha256:" + "0" * 64]
)
def test_what_was_never_published_is_not_found(
    text: str, registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    registry.publish(adapter, ORDERS, signer, base)
    with pytest.raises(AdapterNotFoundError) as caught:
        registry.resolve(AdapterRef.parse(text))
    assert caught.value.code == "ADAPTER_NOT_FOUND"


def test_a_bad_directory_writes_nothing(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedAdapterError):
        registry.publish(adapter, ORDERS, signer, base)
    assert list(registry.tenants()) == []


def test_a_digest_cannot_be_chosen(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    with pytest.raises(InvalidReferenceError):
        registry.publish(adapter, AdapterRef.parse("acme/orders@sha256:" + "0" * 64), signer, base)


def test_texts_are_kept_and_long_ones_become_blobs(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy, tmp_path: Path
) -> None:
    (adapter / "README.md").write_bytes(b"r" * 100_000)
    (adapter / "LICENSE").write_text("yes")
    registry.publish(adapter, ORDERS, signer, base)
    resolved = registry.resolve(ORDERS)
    assert [file.name for file in resolved.record.files if file.blob] == ["README.md", WEIGHTS]
    registry.pull(registry.verify(resolved, policy), tmp_path / "out")
    assert (tmp_path / "out/README.md").read_bytes() == b"r" * 100_000
    assert (tmp_path / "out/LICENSE").read_text() == "yes"


def test_a_pulled_directory_can_be_pushed_again_as_the_same_version(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy, tmp_path: Path
) -> None:
    first = registry.publish(adapter, ORDERS, signer, base)
    out = tmp_path / "out"
    registry.pull(registry.verify(registry.resolve(ORDERS), policy), out)
    for name in (CONFIG, WEIGHTS):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    again = registry.publish(out, ORDERS, signer, BaseModel.load(out))
    assert (again.created, again.digest) == (False, first.digest)
    with pytest.raises(ConflictError, match="not an empty directory"):
        registry.pull(registry.verify(registry.resolve(ORDERS), policy), out)


def test_progress_names_its_phases_and_reaches_the_end(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    registry.publish(adapter, ORDERS, signer, base, progress=lambda *state: seen.append(state))
    verified = registry.verify(registry.resolve(ORDERS), policy)
    registry.fetch(verified, tmp_path / "c", base=base, progress=lambda *state: seen.append(state))
    last = {phase: (done, total) for phase, done, total in seen}
    assert set(last) == {"check", "upload", "fetch"}
    assert all(done == total > 0 for done, total in last.values())


# --- tags


def test_a_tag_moves_by_signed_generations_that_chain(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy
) -> None:
    registry.publish(adapter, PROD, signer, base)
    first = registry.resolve(PROD).tag
    registry.publish(builders.make_adapter(adapter, seed=1), PROD, signer, base)
    second = registry.resolve(PROD).tag
    assert first is not None
    assert second is not None
    assert (first.statement.generation, first.statement.prev) == (1, "")
    assert (second.statement.generation, second.statement.prev) == (2, first.statement.sha256)
    assert second.statement.version == 2
    assert registry.verify(registry.resolve(PROD), policy).tag_generation == 2
    rollback = registry.publish(
        builders.make_adapter(adapter, seed=0), ORDERS, signer, base, version=1, tag="prod"
    )
    assert (rollback.created, rollback.tag_moved) == (False, True)
    assert registry.verify(registry.resolve(PROD), policy).manifest.version == 1
    assert list(registry.tags(ORDERS)) == ["prod"]


def test_pushers_of_one_tag_all_get_their_generation(
    registry: Registry, tmp_path: Path, signer: Signer, base: BaseModel
) -> None:
    directories = [builders.make_adapter(tmp_path / f"a{seed}", seed=seed) for seed in range(4)]
    results: list[int] = []

    def push(directory: Path) -> None:
        results.append(registry.publish(directory, PROD, signer, base).version)

    threads = [threading.Thread(target=push, args=(directory,)) for directory in directories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [1, 2, 3, 4]
    tag = registry.resolve(PROD).tag
    assert tag is not None
    assert tag.statement.generation == 4


# --- crashes and lost replies


def calls_of_a_push(local: Store, adapter: Path, signer: Signer, base: BaseModel) -> int:
    flaky = FlakyStore(local)
    Registry(flaky).publish(adapter, AdapterRef.parse("acme/count@prod"), signer, base)
    return len(flaky.calls)


@pytest.mark.parametrize("how", ["crash before", "crash after"])
def test_a_push_that_dies_at_any_call_is_completed_by_the_same_command(
    how: str,
    local: Store,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    for at in range(calls_of_a_push(local, adapter, signer, base)):
        ref = AdapterRef.parse(f"acme/crash-{at}@prod")
        with pytest.raises(CrashError):
            Registry(FlakyStore(local, at=at, how=how)).publish(adapter, ref, signer, base)
        registry = Registry(local)
        try:
            verified = registry.verify(registry.resolve(ref), policy)  # whole, or not there
            registry.fetch(verified, tmp_path / f"{how}-{at}-early", base=base)
        except AdapterNotFoundError:
            pass
        registry.publish(adapter, ref, signer, base)
        verified = registry.verify(registry.resolve(ref), policy)
        registry.fetch(verified, tmp_path / f"{how}-{at}", base=base)
        committed = [entry for entry in registry.versions(ref) if entry.state == "committed"]
        assert len(committed) == 1


def test_a_lost_reply_at_any_write_is_resolved_by_reading_back(
    local: Store, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy
) -> None:
    for how in ("lost reply", "lost request"):
        for at in range(calls_of_a_push(local, adapter, signer, base)):
            ref = AdapterRef.parse(f"acme/{how.replace(' ', '-')}-{at}@prod")
            flaky = FlakyStore(local, at=at, how=how)
            try:
                published = Registry(flaky).publish(adapter, ref, signer, base)
            except StoreUnavailableError:
                assert flaky.calls[at] not in {"create", "swap"}
                published = Registry(local).publish(adapter, ref, signer, base)
            registry = Registry(local)
            assert registry.verify(registry.resolve(ref), policy).digest == published.digest
            states = [entry.state for entry in registry.versions(ref)]
            assert states.count("committed") == 1
            assert "pending" not in states


def test_a_version_left_pending_is_busy_and_after_its_lease_is_taken_over(
    registry: Registry, store: Store, adapter: Path, signer: Signer, base: BaseModel, clock: Clock
) -> None:
    pending = PendingRecord("0" * 32, "f" * 64, int(clock().timestamp()), LEASE_S)
    store.create(layout.version_key(ORDERS, 1), pending.to_bytes())
    with pytest.raises(AdapterNotFoundError):
        registry.resolve(ORDERS)
    with pytest.raises(ConflictError, match="being pushed"):
        registry.publish(adapter, ORDERS, signer, base, version=1)
    assert registry.publish(builders.make_adapter(adapter, seed=1), ORDERS, signer, base).version == 2
    clock.advance(LEASE_S + 1)
    taken = registry.publish(builders.make_adapter(adapter, seed=2), ORDERS, signer, base, version=1)
    assert (taken.version, taken.created) == (1, True)
    with pytest.raises(RegistryError):  # the first pusher comes back from its pause and finds itself fenced
        store.swap(layout.version_key(ORDERS, 1), b"{}", etag="whatever it had")


def test_a_pusher_that_was_overtaken_is_told_and_changes_nothing(
    local: Store, adapter: Path, signer: Signer, base: BaseModel, clock: Clock, tmp_path: Path
) -> None:
    other = builders.make_adapter(tmp_path / "other", seed=1)

    class Overtaken(FlakyStore):
        def put_blob(self, *args: object, **options: object) -> int:
            clock.advance(LEASE_S + 1)
            Registry(local, clock=clock).publish(other, ORDERS, signer, base, version=1)
            return super().put_blob(*args, **options)  # type: ignore[arg-type]

    with pytest.raises(ConflictError, match="took over"):
        Registry(Overtaken(local), clock=clock).publish(adapter, ORDERS, signer, base, version=1)
    record = Registry(local).resolve(ORDERS).record
    expected = hashlib.sha256((other / WEIGHTS).read_bytes()).hexdigest()
    assert record.file(WEIGHTS).sha256 == expected


def test_a_failed_upload_frees_its_version_at_once(
    local: Store, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    with pytest.raises(StoreUnavailableError):
        Registry(FlakyStore(local, at=2, how="lost request")).publish(
            adapter, ORDERS, signer, base, version=1
        )
    body = local.get(layout.version_key(ORDERS, 1), limit_bytes=1000).body
    assert json.loads(body)["state"] == "aborted"
    assert read_record(body, version=1, where="x")
    assert Registry(local).publish(adapter, ORDERS, signer, base, version=1).created


# --- fetching


def test_the_staged_directory_is_read_only_and_its_configuration_is_ours(
    local_registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    local_registry.publish(adapter, ORDERS, signer, base)
    verified = local_registry.verify(local_registry.resolve(ORDERS), policy)
    staged = local_registry.fetch(verified, tmp_path / "cache", base=base)
    assert staged.path.stat().st_mode & 0o777 == 0o555
    assert {file.stat().st_mode & 0o777 for file in staged.path.iterdir()} == {0o444}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    config = json.loads((staged.path / CONFIG).read_bytes())
    assert config["r"] == 4
    assert "base_model_name_or_path" not in config


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_damaged_staged_copy_is_fetched_again(
    name: str,
    local_registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    local_registry.publish(adapter, ORDERS, signer, base)
    verified = local_registry.verify(local_registry.resolve(ORDERS), policy)
    staged = local_registry.fetch(verified, tmp_path / "cache", base=base)
    good = (staged.path / name).read_bytes()
    (staged.path / name).chmod(0o644)
    (staged.path / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    again = local_registry.fetch(verified, tmp_path / "cache", base=base)
    assert (again.path / name).read_bytes() == good


def test_a_strange_file_in_a_staged_copy_makes_it_wrong(
    local_registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    local_registry.publish(adapter, ORDERS, signer, base)
    verified = local_registry.verify(local_registry.resolve(ORDERS), policy)
    staged = local_registry.fetch(verified, tmp_path / "cache", base=base)
    staged.path.chmod(0o755)
    (staged.path / "adapter_model.bin").write_bytes(b"evil")
    assert sorted(os.listdir(local_registry.fetch(verified, tmp_path / "cache", base=base).path)) == [
        CONFIG,
        WEIGHTS,
    ]


def test_a_good_staged_copy_needs_no_store(
    local: Store, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy, tmp_path: Path
) -> None:
    registry = Registry(local)
    registry.publish(adapter, ORDERS, signer, base)
    verified = registry.verify(registry.resolve(ORDERS), policy)
    registry.fetch(verified, tmp_path / "cache", base=base)
    shutil.rmtree(tmp_path / "local")
    registry.fetch(verified, tmp_path / "cache", base=base)
    with pytest.raises(StoreUnavailableError):
        registry.fetch(verified, tmp_path / "empty", base=base)


def test_a_fetch_that_fails_leaves_nothing(
    local: Store, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy, tmp_path: Path
) -> None:
    Registry(local).publish(adapter, ORDERS, signer, base)
    flaky = FlakyStore(local, at=1, how="down")
    registry = Registry(flaky)
    verified = registry.verify(registry.resolve(AdapterRef.parse("acme/orders@1")), policy)
    with pytest.raises(StoreUnavailableError):
        registry.fetch(verified, tmp_path / "cache", base=base)
    assert os.listdir(tmp_path / "cache") == []


def test_the_left_over_of_a_killed_fetch_is_swept(
    local_registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    (tmp_path / "cache/.tmp-dead").mkdir(parents=True)
    (tmp_path / "cache/.tmp-dead/half").write_bytes(b"x")
    local_registry.publish(adapter, ORDERS, signer, base)
    staged = local_registry.fetch(
        local_registry.verify(local_registry.resolve(ORDERS), policy), tmp_path / "cache", base=base
    )
    assert os.listdir(tmp_path / "cache") == [staged.path.name]


def test_many_fetches_of_one_digest_agree(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy, tmp_path: Path
) -> None:
    registry.publish(adapter, ORDERS, signer, base)
    verified = registry.verify(registry.resolve(ORDERS), policy)
    paths: list[Path] = []

    def fetch_one() -> None:
        paths.append(registry.fetch(verified, tmp_path / "cache", base=base).path)

    threads = [threading.Thread(target=fetch_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert len(set(paths)) == 1
    assert os.listdir(tmp_path / "cache") == [paths[0].name]


def test_a_fetch_for_another_base_or_below_the_rank_is_refused_before_any_download(
    local: Store, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy, tmp_path: Path
) -> None:
    Registry(local).publish(adapter, ORDERS, signer, base)
    flaky = FlakyStore(local)
    registry = Registry(flaky)
    verified = registry.verify(registry.resolve(ORDERS), policy)
    flaky.calls.clear()
    other = BaseModel("other", "sha256:" + "0" * 64, base.layers, base.vocab_size, base.hidden_size, 0)
    with pytest.raises(BaseMismatchError):
        registry.fetch(verified, tmp_path / "cache", base=other)
    with pytest.raises(RankTooLargeError):
        registry.fetch(verified, tmp_path / "cache", base=base, limits=Limits(max_rank=3))
    with pytest.raises(UnsupportedAdapterError):
        registry.fetch(verified, tmp_path / "cache", base=base, limits=Limits(max_bytes=100))
    assert flaky.calls == []


def test_a_blob_that_is_gone_is_damage(
    local_registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    local_registry.publish(adapter, ORDERS, signer, base)
    verified = local_registry.verify(local_registry.resolve(ORDERS), policy)
    shutil.rmtree(tmp_path / "local/t/acme/a/orders/b")
    with pytest.raises(DamagedError, match="gone"):
        local_registry.fetch(verified, tmp_path / "cache", base=base)


def test_listing_shows_what_was_published_and_nothing_else(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    registry.initialise()
    assert not registry.initialise()
    for text in ("acme/orders", "acme/orders2", "acme2/orders"):
        registry.publish(adapter, AdapterRef.parse(text), signer, base)
    assert list(registry.tenants()) == ["acme", "acme2"]
    assert list(registry.adapters("acme")) == ["orders", "orders2"]
    assert list(registry.tags(ORDERS)) == []
    (state,) = registry.versions(ORDERS)
    assert (state.version, state.state) == (1, "committed")


def test_a_wrong_copy_among_many_fetches_is_replaced_and_no_good_copy_is_lost(
    local_registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    local_registry.publish(adapter, ORDERS, signer, base)
    verified = local_registry.verify(local_registry.resolve(ORDERS), policy)
    cache = tmp_path / "cache"
    final = cache / verified.digest.replace(":", "-")
    for _ in range(5):
        if final.exists():
            final.chmod(0o755)
            (final / WEIGHTS).unlink()
        seen: list[bool] = []
        barrier = threading.Barrier(6)

        def fetch_one(seen: list[bool] = seen, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            staged = local_registry.fetch(verified, cache, base=base)
            seen.append((staged.path / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes())

        threads = [threading.Thread(target=fetch_one) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [True] * 6
        assert os.listdir(cache) == [final.name]


@pytest.mark.parametrize("kind", ["file", "link", "empty directory"])
def test_whatever_took_the_place_of_a_staged_copy_is_replaced(
    kind: str,
    local_registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    local_registry.publish(adapter, ORDERS, signer, base)
    verified = local_registry.verify(local_registry.resolve(ORDERS), policy)
    final = tmp_path / "cache" / verified.digest.replace(":", "-")
    final.parent.mkdir()
    (tmp_path / "elsewhere").mkdir()
    {
        "file": final.touch,
        "link": lambda: final.symlink_to(tmp_path / "elsewhere"),
        "empty directory": final.mkdir,
    }[kind]()
    staged = local_registry.fetch(verified, tmp_path / "cache", base=base)
    assert sorted(os.listdir(staged.path)) == [CONFIG, WEIGHTS]
    assert not staged.path.is_symlink()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_good_copy_made_meanwhile_is_not_thrown_away(
    local_registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> None:
    local_registry.publish(adapter, ORDERS, signer, base)
    verified = local_registry.verify(local_registry.resolve(ORDERS), policy)
    staged = local_registry.fetch(verified, tmp_path / "cache", base=base)
    inode = staged.path.stat().st_ino
    fetch._discard_wrong(tmp_path / "cache", staged.path, verified, (staged.path / CONFIG).read_bytes())
    assert staged.path.stat().st_ino == inode


# --- versions and their names


def test_semantic_versions_are_named_and_ordered(
    registry: Registry, tmp_path: Path, signer: Signer, base: BaseModel
) -> None:
    for seed, version in enumerate(["1.0.0", "1.0.0-rc.1", "0.9.0"]):
        directory = builders.make_adapter(tmp_path / version, seed=seed)
        assert registry.publish(directory, ORDERS, signer, base, version=version).version == version
    assert [state.version for state in registry.versions(ORDERS)] == ["1.0.0", "1.0.0-rc.1", "0.9.0"]
    assert registry.resolve(ORDERS).version == "1.0.0"
    assert registry.resolve(AdapterRef.parse("acme/orders@1.0.0-rc.1")).version == "1.0.0-rc.1"


def test_after_a_semantic_version_the_next_one_must_be_named(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    registry.publish(adapter, ORDERS, signer, base, version="1.0.0")
    assert not registry.publish(adapter, ORDERS, signer, base).created
    builders.make_adapter(adapter, seed=1)
    with pytest.raises(ConflictError, match=r"acme/orders@1\.0\.1"):
        registry.publish(adapter, ORDERS, signer, base)
    assert registry.publish(adapter, ORDERS, signer, base, version=2).version == 2
    builders.make_adapter(adapter, seed=2)
    assert registry.publish(adapter, ORDERS, signer, base).version == 3


def test_what_was_said_of_the_tag_is_checked_before_anything_is_written(
    local: Store, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    registry = Registry(local)
    flaky = FlakyStore(local)
    with pytest.raises(ConflictError, match="generation 0"):
        Registry(flaky).publish(adapter, PROD, signer, base, expect=3)
    assert flaky.calls == ["get", "get"]  # the root's marker and the tag
    first = registry.publish(adapter, PROD, signer, base, expect="absent")
    builders.make_adapter(adapter, seed=1)
    assert registry.publish(adapter, PROD, signer, base, expect=first.digest).tag_generation == 2


def test_annotations_are_signed_and_make_another_content(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy
) -> None:
    notes = {"licence": "Apache-2.0", "run": "42"}
    registry.publish(adapter, ORDERS, signer, base, annotations=notes)
    verified = registry.verify(registry.resolve(ORDERS), policy)
    assert dict(verified.manifest.annotations) == notes
    assert not registry.publish(adapter, ORDERS, signer, base, annotations=notes).created
    assert registry.publish(adapter, ORDERS, signer, base).version == 2
    with pytest.raises(InvalidReferenceError, match="annotations are refused"):
        registry.publish(adapter, ORDERS, signer, base, annotations={"Bad name": "x"})


def test_what_was_signed_elsewhere_is_published_as_it_is(
    registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy
) -> None:
    """The manifest and its bundle come ready; the registry needs no key."""
    source = MemoryStore()
    Registry(source).publish(adapter, ORDERS, signer, base, version="2.0.0")
    record = Registry(source).resolve(ORDERS).record
    signed = Signed(record.manifest_bytes, record.bundle)
    done = registry.publish(adapter, ORDERS, (), base, signed=signed)
    assert (done.version, done.digest, done.created) == ("2.0.0", record.digest, True)
    assert registry.verify(registry.resolve(ORDERS), policy).digest == record.digest
    assert not registry.publish(adapter, ORDERS, (), base, signed=signed).created
    with pytest.raises(InvalidReferenceError, match="push it there"):
        registry.publish(adapter, AdapterRef.parse("acme/mails"), (), base, signed=signed)
    builders.make_adapter(adapter, seed=5)
    with pytest.raises(ConflictError, match="not what the bundle was made for"):
        registry.publish(adapter, AdapterRef.parse("acme/orders@2.0.0"), (), base, signed=signed)


def test_a_commit_whose_reply_was_lost_and_that_was_changed_since_is_a_success(
    local: Store, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    """Somebody wraps the key anew, or attaches a statement, before we can read back."""

    class Amended(FlakyStore):
        def swap(self, key: str, body: bytes, *, etag: str) -> str:
            new = super().swap(key, body, etag=etag)
            if b'"committed"' in body:
                record = read_record(body, version=1, where="x")
                local.swap(key, dataclasses.replace(record, attest=({"a": 1},)).to_bytes(), etag=new)
                raise StoreUnavailableError("lost", ambiguous=True)
            return new

    done = Registry(Amended(local)).publish(adapter, ORDERS, signer, base, version=1)
    assert done.created
    assert Registry(local).resolve(ORDERS).record.attest == ({"a": 1},)


def test_a_long_upload_has_a_longer_lease(local: Store) -> None:
    reserver = Reserver(local, ORDERS, by="x", now_s=0, size_bytes=10 << 30, is_this=lambda record: False)
    assert not isinstance(reserver.choose(1), Outcome)
    record = read_record(
        local.get(layout.version_key(ORDERS, 1), limit_bytes=1000).body, version=1, where="x"
    )
    assert isinstance(record, PendingRecord)
    assert record.lease_s == LEASE_S + 10 * 1024
