"""The tiers of a whole server: real registry, sealed memory and gRPC, with the deterministic engine."""

import asyncio
import os
import resource
from pathlib import Path

import pytest

from loraplex_client import Sampling, UnavailableError
from loraplex_server.wiring import DESCRIPTORS_PER_ADAPTER
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running, until

LONG = Sampling(max_tokens=60, temperature=0)


def sealed_bytes() -> int:
    """Bytes of sealed weights that this process holds, whoever made them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:adapter_model" in os.readlink(f"/proc/self/fd/{name}"):
                total += Path(f"/proc/self/fd/{name}").stat().st_size
        except FileNotFoundError:  # the descriptor that lists them
            continue
    return total


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_staging_by_call_takes_no_slot_and_a_later_call_needs_no_registry(shop: Shop) -> None:
    shop.publish("acme/orders", tag="prod")
    async with running(shop, registry_section={"tag_ttl_s": 600.0}) as rig, rig.client() as client:
        steps = [step async for step in client.load_adapter("acme/orders@prod", stage_only=True)]
        assert [step.phase for step in steps][-1] == "ready"
        assert "load" not in [step.phase for step in steps]
        assert steps[-1].adapter is not None
        assert steps[-1].adapter.state == "staged"
        assert (await client.get_adapter("acme/orders@prod")).state == "staged"
        assert rig.app.residency.slots_used == 0
        (shop.root / "registry").rename(shop.root / "gone")
        done = await client.generate("x", adapter="acme/orders@prod", sampling=FOUR)
        assert done.header.adapter.startswith("acme/orders@")
        again = [step async for step in client.load_adapter("acme/orders@prod", stage_only=True)]
        assert again[-1].adapter is not None
        assert again[-1].adapter.state == "resident"


async def test_staging_what_does_not_fit_says_so(shop: Shop) -> None:
    shop.publish("acme/orders")
    async with running(shop, adapters={"memory_bytes_max": 100}) as rig, rig.client() as client:
        with pytest.raises(UnavailableError) as caught:
            [step async for step in client.load_adapter("acme/orders", stage_only=True)]
        assert caught.value.code == "ADAPTER_NOT_READY"
        await client.generate("x", adapter="acme/orders", sampling=FOUR)


async def test_adapters_in_memory_never_hold_more_than_half_of_the_descriptors(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2 * DESCRIPTORS_PER_ADAPTER * (2 + 1)  # room for two slots and one more adapter
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    names = [f"acme/a{number}" for number in range(4)]
    for number, name in enumerate(names):
        shop.publish(name, seed=number)
    async with running(shop) as rig, rig.client() as client:
        before = open_files()
        for name in names:
            await client.generate("x", adapter=name, sampling=FOUR)
        there = ["staged", "resident", "resident"]  # the one before them is let go of in the background
        await until(lambda: [status.state for status in rig.app.residency.statuses()] == there)
        await until(lambda: open_files() - before <= limit // 2 + 2)  # and the connection of this client


async def test_unloading_gives_back_slot_bytes_and_descriptors_of_every_tier(shop: Shop) -> None:
    names = [f"acme/a{number}" for number in range(4)]
    for number, name in enumerate(names):
        shop.publish(name, seed=number)
    async with running(shop) as rig, rig.client() as client:
        await client.generate("x", sampling=FOUR)
        files, held = open_files(), sealed_bytes()
        for name in names:
            await client.generate("x", adapter=name, sampling=FOUR)
        listed = {adapter.adapter: adapter.state async for adapter in client.list_adapters()}
        assert listed == {"a0": "staged", "a1": "staged", "a2": "resident", "a3": "resident"}
        assert sealed_bytes() > held
        for name in names:
            assert await client.unload_adapter(name)
        assert rig.engine.adapters == {}
        assert (open_files(), sealed_bytes()) == (files, held)
        assert [adapter async for adapter in client.list_adapters()] == []


async def test_over_an_engine_that_keeps_the_bytes_the_server_holds_none_and_a_slot_for_every_call(
    shop: Shop,
) -> None:
    names = [f"acme/a{number}" for number in range(4)]
    for number, name in enumerate(names):
        shop.publish(name, seed=number)
    one = {"adapters": {"slots": 0}, "model": {"batch_requests": 1}}
    async with running(shop, keeps_bytes=True, **one) as rig, rig.client() as client:
        await client.generate("x", sampling=FOUR)
        files, held = open_files(), sealed_bytes()
        for name in names:
            await client.generate("x", adapter=name, sampling=FOUR)
        listed = {adapter.adapter: adapter.state async for adapter in client.list_adapters()}
        assert listed == {"a0": "staged", "a1": "resident", "a2": "resident", "a3": "resident"}
        assert rig.app.residency.slots_total == 3, "one call in the batch, two that wait to follow it"
        assert rig.counts.get_sample_value("loraplex_adapter_slots") == 3
        assert len(rig.engine.adapters) == 4
        assert sealed_bytes() == held
        assert (await client.validate_adapter(names[0])).slot_bytes == 0
        for name in names:
            assert await client.unload_adapter(name)
        assert rig.engine.adapters == {}
        assert (open_files(), sealed_bytes()) == (files, held)


async def test_an_adapter_of_a_call_that_waits_for_its_turn_is_fetched_meanwhile(shop: Shop) -> None:
    shop.publish("acme/orders")
    async with running(shop, model={"batch_requests": 1}) as rig, rig.client() as client:
        rig.engine.may_go_on.clear()
        running_calls = [asyncio.create_task(client.generate("x", sampling=LONG)) for _ in range(3)]
        await until(lambda: rig.engine.running == 3)  # all places
        waits = asyncio.create_task(client.generate("x", adapter="acme/orders", sampling=FOUR))
        await until(lambda: [s.state for s in rig.app.residency.statuses()] == ["staged"])
        assert not waits.done()
        rig.engine.may_go_on.set()
        await asyncio.gather(waits, *running_calls)
        assert rig.counts.get_sample_value("loraplex_adapter_prefetches_total", {"result": "started"}) == 1
        assert rig.counts.get_sample_value("loraplex_adapter_cache_requests_total", {"result": "staged"}) == 1
