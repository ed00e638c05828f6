"""From names to verified digests and to bytes on disk, over a real registry in a directory."""

import asyncio
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraplex_registry.errors import (
    AdapterNotFoundError,
    BaseMismatchError,
    SignatureInvalidError,
    StoreUnavailableError,
)
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry, StagedAdapter
from loraplex_registry.store import open_store
from loraplex_registry.trust import TrustPolicy
from loraplex_registry.weights import Limits
from loraplex_server.versions import Versions, clear_staging
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


def make_versions(shop: Shop, *, registry: Registry | None = None, clock: Clock | None = None) -> Versions:
    return Versions(
        registry=registry or shop.registry,
        policy=TrustPolicy.load(shop.policy),
        base=shop.base,
        limits=Limits(max_rank=8),
        staging_dir=shop.root / "staging",
        tag_ttl_s=5.0,
        stale_s_max=60.0,
        fetches_max=2,
        clock=clock or Clock(),
    )


def silent(phase: str, done: int, total: int) -> None:
    """Nobody watches."""


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


async def test_a_fetch_that_nobody_waits_for_any_more_leaves_no_directory(shop: Shop) -> None:
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
    assert list((shop.root / "staging").iterdir()) == []


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


def test_clearing_a_staging_directory_removes_read_only_leftovers(tmp_path: Path) -> None:
    left = tmp_path / "staging" / "sha256-old"
    left.mkdir(parents=True)
    (left / "file").write_bytes(b"x")
    (tmp_path / "staging" / "stray").write_bytes(b"x")
    left.chmod(0o500)
    clear_staging(tmp_path / "staging")
    assert list((tmp_path / "staging").iterdir()) == []
