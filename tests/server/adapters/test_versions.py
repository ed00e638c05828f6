"""From names to verified digests and to bytes on disk, over a real registry in a directory."""

import asyncio
import os
import shutil
import threading
from dataclasses import replace
from typing import Any

import pytest

from loraplex_registry.delivery.cache import CACHE_BYTES_MAX, Cache
from loraplex_registry.encryption.kek_file import generate_encryption_key
from loraplex_registry.encryption.key_providers import KeyRing
from loraplex_registry.errors import (
    AdapterNotFoundError,
    BaseMismatchError,
    DigestMismatchError,
    PolicyRefusedError,
    SignatureInvalidError,
    StoreUnavailableError,
)
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry, StagedAdapter
from loraplex_registry.storage.store import open_store
from loraplex_registry.trust.marks import MemoryMarks
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.trust.verifier import Verifier
from loraplex_registry.validation.weights import Limits
from loraplex_server.adapters.versions import Versions
from tests.server.conftest import Shop
from tests.server.rig import until

ORDERS = AdapterRef.parse("acme/orders@prod")


class GatedRegistry(Registry):
    """A registry whose fetches wait until they may go on."""

    def __init__(self, url: str) -> None:
        super().__init__(open_store(url))
        self.may_go_on = threading.Event()
        self.fetches = 0

    def fetch(self, *arguments: Any, **options: Any) -> StagedAdapter:
        self.fetches += 1
        assert self.may_go_on.wait(10)
        return super().fetch(*arguments, **options)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_versions(
    shop: Shop,
    *,
    registry: Registry | None = None,
    clock: Clock | None = None,
    cache_bytes: int = CACHE_BYTES_MAX,
) -> Versions:
    registry = registry or shop.registry
    return Versions(
        registry=registry,
        verifier=Verifier(registry, TrustPolicy.load(shop.policy), marks=MemoryMarks(), refresh_s=0),
        base=shop.base,
        limits=Limits(max_rank=8),
        cache=Cache(shop.root / "cache", max_bytes=cache_bytes),
        tag_ttl_s=5.0,
        stale_s_max=60.0,
        fetches_max=2,
        clock=clock or Clock(),
    )


def silent(phase: str, done: int, total: int) -> None:
    """Nobody watches."""


class AskedRegistry(Registry):
    """A registry whose answers to names, read already, wait until they may go."""

    def __init__(self, url: str) -> None:
        super().__init__(open_store(url))
        self.may_go_on = threading.Event()
        self.asked = 0

    def resolve(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().resolve(*arguments, **options)
        finally:
            self.asked += 1
            assert self.may_go_on.wait(10)


async def test_callers_of_one_name_at_one_time_ask_once_and_one_that_leaves_harms_nobody(shop: Shop) -> None:
    published = shop.publish("acme/orders", tag="prod")
    registry = AskedRegistry(shop.url)
    versions = make_versions(shop, registry=registry)
    callers = [asyncio.create_task(versions.resolve(ORDERS)) for _ in range(32)]
    await until(lambda: registry.asked == 1)
    callers[0].cancel()
    registry.may_go_on.set()
    found = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert {version.digest for version in found[1:]} == {published.digest}  # type: ignore[union-attr]
    assert registry.asked == 1


async def test_a_failure_reaches_every_caller_and_is_not_remembered(shop: Shop) -> None:
    registry = AskedRegistry(shop.url)
    versions = make_versions(shop, registry=registry)
    callers = [asyncio.create_task(versions.resolve(ORDERS)) for _ in range(3)]
    await until(lambda: registry.asked == 1)
    registry.may_go_on.set()
    found = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(error) for error in found] == [AdapterNotFoundError] * 3
    shop.publish("acme/orders", tag="prod")
    assert (await versions.resolve(ORDERS)).adapter == "orders"


async def test_a_call_does_not_take_an_answer_that_the_store_gave_too_long_before_it_came(shop: Shop) -> None:
    clock, registry = Clock(), AskedRegistry(shop.url)
    versions = make_versions(shop, registry=registry, clock=clock)
    first = shop.publish("acme/orders", seed=1, tag="prod")
    early = asyncio.create_task(versions.resolve(ORDERS))
    await until(lambda: registry.asked == 1)
    second = shop.publish("acme/orders", seed=2, tag="prod")
    clock.now += 4.9
    soon = asyncio.create_task(versions.resolve(ORDERS))
    await asyncio.sleep(0)
    clock.now += 0.2
    late = [asyncio.create_task(versions.resolve(ORDERS)) for _ in range(8)]
    await asyncio.sleep(0)
    registry.may_go_on.set()
    assert (await early).digest == (await soon).digest == first.digest
    assert {version.digest for version in await asyncio.gather(*late)} == {second.digest}
    assert registry.asked == 2


async def test_calls_that_come_while_an_older_question_ends_are_answered(shop: Shop) -> None:
    """One comes in every turn of the loop, so also between the end of a flight and what follows it."""
    clock, registry = Clock(), AskedRegistry(shop.url)
    versions = make_versions(shop, registry=registry, clock=clock)
    published = shop.publish("acme/orders", tag="prod")
    early = asyncio.create_task(versions.resolve(ORDERS))
    await until(lambda: registry.asked == 1)
    registry.may_go_on.set()
    calls = [early]
    while not early.done():
        clock.now += 6
        calls.append(asyncio.create_task(versions.resolve(ORDERS)))
        await asyncio.sleep(0)
    assert {version.digest for version in await asyncio.gather(*calls)} == {published.digest}


async def test_a_call_does_not_take_a_failure_of_before_it_came(shop: Shop) -> None:
    clock, registry = Clock(), AskedRegistry(shop.url)
    versions = make_versions(shop, registry=registry, clock=clock)
    early = asyncio.create_task(versions.resolve(ORDERS))
    await until(lambda: registry.asked == 1)
    published = shop.publish("acme/orders", tag="prod")
    clock.now += 5.1
    late = asyncio.create_task(versions.resolve(ORDERS))
    await asyncio.sleep(0)
    registry.may_go_on.set()
    with pytest.raises(AdapterNotFoundError):
        await early
    assert (await late).digest == published.digest


async def test_while_the_store_is_away_nobody_waits_for_it_twice(shop: Shop) -> None:
    clock, registry = Clock(), AskedRegistry(shop.url)
    versions = make_versions(shop, registry=registry, clock=clock)
    published = shop.publish("acme/orders", tag="prod")
    registry.may_go_on.set()
    await versions.resolve(ORDERS)
    registry.may_go_on.clear()
    shutil.move(shop.root / "registry", shop.root / "away")
    clock.now += 10
    early = asyncio.create_task(versions.resolve(ORDERS))
    await until(lambda: registry.asked == 2)
    clock.now += 10
    late = asyncio.create_task(versions.resolve(ORDERS))
    await asyncio.sleep(0)
    registry.may_go_on.set()
    assert (await early).digest == (await late).digest == published.digest
    assert registry.asked == 2


async def test_a_tag_is_asked_for_again_after_its_time(shop: Shop) -> None:
    clock = Clock()
    versions = make_versions(shop, clock=clock)
    first = shop.publish("acme/orders", seed=1, tag="prod")
    assert (await versions.resolve(ORDERS)).digest == first.digest
    second = shop.publish("acme/orders", seed=2, tag="prod")
    assert (await versions.resolve(ORDERS)).digest == first.digest
    clock.now += 5.1
    assert (await versions.resolve(ORDERS)).digest == second.digest


async def test_known_names_keep_their_meaning_while_the_store_is_away_but_not_for_ever(shop: Shop) -> None:
    clock = Clock()
    versions = make_versions(shop, clock=clock)
    published = shop.publish("acme/orders", tag="prod")
    await versions.resolve(ORDERS)
    shutil.move(shop.root / "registry", shop.root / "away")
    clock.now += 30
    assert (await versions.resolve(ORDERS)).digest == published.digest
    with pytest.raises(StoreUnavailableError):
        await versions.resolve(AdapterRef.parse("acme/other"))
    clock.now += 31
    with pytest.raises(StoreUnavailableError):
        await versions.resolve(ORDERS)


async def test_a_refusal_is_not_remembered(shop: Shop) -> None:
    versions = make_versions(shop)
    with pytest.raises(AdapterNotFoundError):
        await versions.resolve(ORDERS)
    shop.publish("acme/orders", seed=1, signer="globex", tag="prod")
    with pytest.raises(SignatureInvalidError):
        await versions.resolve(ORDERS)
    good = shop.publish("acme/orders", seed=2, tag="prod")
    assert (await versions.resolve(ORDERS)).digest == good.digest


async def test_a_version_for_another_base_is_refused_before_anything_is_fetched(shop: Shop) -> None:
    registry = GatedRegistry(shop.url)
    versions = make_versions(shop, registry=registry)
    shop.base = replace(shop.base, digest="sha256:" + "1" * 64)
    shop.publish("acme/orders", tag="prod")
    with pytest.raises(BaseMismatchError):
        await versions.resolve(ORDERS)
    assert registry.fetches == 0


async def test_a_key_that_the_server_lacks_is_the_operators_to_mend_and_the_caller_learns_no_path(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeyRing([f"file:{shop.root}/{{tenant}}.kek"])
    generate_encryption_key(shop.root / "acme.kek", "acme")
    shop.registry = Registry(open_store(shop.url), keys=keys)
    shop.publish("acme/orders")
    versions = make_versions(shop, registry=shop.registry)
    version = await versions.resolve(AdapterRef.parse("acme/orders"))
    (shop.root / "acme.kek").rename(shop.root / "elsewhere")
    with pytest.raises(PolicyRefusedError) as caught:
        await versions.stage(version, silent)
    assert str(shop.root) not in str(caught.value)
    assert f"{shop.root}/acme.kek cannot be opened" in caplog.text
    (shop.root / "elsewhere").rename(shop.root / "acme.kek")
    staged = await versions.stage(version, silent)
    await versions.discard(staged)


async def test_a_fetch_that_nobody_waits_for_any_more_is_let_go_and_stays_in_the_cache(shop: Shop) -> None:
    registry = GatedRegistry(shop.url)
    versions = make_versions(shop, registry=registry)
    shop.publish("acme/orders", tag="prod")
    version = await versions.resolve(ORDERS)
    waiting = asyncio.create_task(versions.stage(version, silent))
    await until(lambda: registry.fetches == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    registry.may_go_on.set()
    await until(lambda: not versions._left_behind)
    await until(lambda: [entry.leased for entry in Cache(shop.root / "cache").entries()] == [False])
    assert list((shop.root / "cache").glob(".tmp-*")) == []


async def test_the_next_caller_takes_over_a_fetch_that_was_left_behind(shop: Shop) -> None:
    registry = GatedRegistry(shop.url)
    versions = make_versions(shop, registry=registry)
    shop.publish("acme/orders", tag="prod")
    version = await versions.resolve(ORDERS)
    waiting = asyncio.create_task(versions.stage(version, silent))
    await until(lambda: registry.fetches == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    again = asyncio.create_task(versions.stage(version, silent))
    await asyncio.sleep(0)
    registry.may_go_on.set()
    staged = await again
    assert registry.fetches == 1
    assert sorted(path.name for path in staged.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    await versions.discard(staged)
    await versions.discard(staged)
    assert not staged.path.exists()


async def test_a_discarded_adapter_comes_back_from_the_cache_without_the_store(shop: Shop) -> None:
    versions = make_versions(shop)
    shop.publish("acme/orders", tag="prod")
    version = await versions.resolve(ORDERS)
    first = await versions.stage(version, silent)
    await versions.confirm(first)
    await versions.discard(first)
    shutil.move(shop.root / "registry", shop.root / "away")
    again = await versions.stage(version, silent)
    await versions.confirm(again)
    assert (again.path / "adapter_model.safetensors").stat().st_size > 0
    versions.close()
    assert not again.path.exists()


async def test_what_an_engine_holds_a_copy_of_takes_no_memory_here_and_comes_again_from_the_cache(
    shop: Shop,
) -> None:
    versions = make_versions(shop, cache_bytes=0)
    shop.publish("acme/orders", tag="prod")
    version = await versions.resolve(ORDERS)
    files = len(os.listdir("/proc/self/fd"))
    staged = await versions.stage(version, silent)
    await versions.confirm(staged)
    await versions.settle(staged)
    assert len(os.listdir("/proc/self/fd")) == files + 1, "the lease of the cache's entry alone is left"
    assert not staged.path.exists()
    assert versions.pieces(staged) == 0
    (shop.root / "registry").rename(shop.root / "gone")
    again = await versions.stage(version, silent)
    assert (again.path / "adapter_model.safetensors").stat().st_size == version.size_bytes
    assert versions.pieces(again) == 1
    await versions.discard(again)
    assert len(os.listdir("/proc/self/fd")) == files
    with pytest.raises(
        StoreUnavailableError
    ):  # nothing holds the entry any more, and there is no room for it
        await versions.stage(version, silent)


async def test_a_path_changed_while_the_engine_reads_is_told(shop: Shop) -> None:
    versions = make_versions(shop)
    shop.publish("acme/orders", tag="prod")
    staged = await versions.stage(await versions.resolve(ORDERS), silent)
    os.chmod(staged.path, 0o700)
    (staged.path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(DigestMismatchError):
        await versions.confirm(staged)
    await versions.discard(staged)
