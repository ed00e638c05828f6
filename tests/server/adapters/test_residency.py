"""Residency, driven through the deterministic engine."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_registry.errors import DigestMismatchError, StoreUnavailableError, UnsupportedAdapterError
from loraplex_server.adapters.residency import State
from loraplex_server.errors import AdapterNotReadyError
from tests.server.adapters.residency_rig import make_rig, use, version


async def test_a_hundred_callers_of_one_cold_adapter_cause_one_fetch_and_one_load(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    await asyncio.gather(*(use(rig, "a") for _ in range(100)))
    assert rig.source.staged == {"a": 1}
    assert len(rig.engine.slot_ids_seen) == 1
    assert rig.events.requested == {"miss": 1, "joined": 99}


async def test_the_least_recently_used_idle_adapter_is_evicted(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2)
    for name in ("a", "b", "a", "c"):
        await use(rig, name)
    assert {status.version.adapter for status in rig.residency.statuses()} == {"a", "c"}
    assert rig.directories() == {"a", "c"}
    assert rig.events.gone == {"slot evicted_for_slot": 1}
    await rig.residency.check()


async def test_a_leased_adapter_is_not_evicted_and_the_waiter_gets_the_slot_afterwards(
    tmp_path: Path,
) -> None:
    rig = make_rig(tmp_path, slots=2)
    async with rig.residency.lease(version("a")):
        async with rig.residency.lease(version("b")):
            third = asyncio.create_task(use(rig, "c"))
            await asyncio.sleep(0.01)
            assert not third.done()
            assert {s.version.adapter: s.state for s in rig.residency.statuses()} == {
                "a": State.RESIDENT,
                "b": State.RESIDENT,
                "c": State.LOADING,
            }
        await third
    assert {s.version.adapter for s in rig.residency.statuses()} == {"a", "c"}


async def test_a_pinned_adapter_stays_and_one_slot_is_always_left_unpinned(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2)
    assert (await rig.residency.pin(version("a"))).pinned
    with pytest.raises(AdapterNotReadyError, match="pinned already"):
        await rig.residency.pin(version("b"))
    for name in ("c", "d", "e"):
        await use(rig, name)
    assert rig.residency.status(version("a").digest) is not None
    await rig.residency.unpin(version("a").digest)
    await use(rig, "f")
    await use(rig, "g")
    assert rig.residency.status(version("a").digest) is None


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailableError("no store"),
        DigestMismatchError("flipped"),
        UnsupportedAdapterError("pickle"),
    ],
)
async def test_a_failed_fetch_reaches_every_waiter_and_leaves_nothing(
    tmp_path: Path, error: Exception
) -> None:
    rig = make_rig(tmp_path)
    rig.source.errors["bad"] = error
    rig.source.delay_s = 0.01
    results = await asyncio.gather(
        *(use(rig, "bad") for _ in range(5)), use(rig, "good"), return_exceptions=True
    )
    assert results == [error] * 5 + [None]
    assert rig.directories() == {"good"}
    assert rig.residency.status(version("bad").digest) is None
    await rig.residency.check()


async def test_a_load_the_engine_refuses_frees_its_slot_and_can_be_tried_again(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    rig.engine.refuse_names.add(version("bad").name)
    with pytest.raises(UnsupportedAdapterError):
        await use(rig, "bad")
    assert rig.residency.slots_used == 0
    assert rig.directories() == set()
    rig.engine.refuse_names.clear()
    await use(rig, "bad")
    await rig.residency.check()


async def test_what_was_swapped_while_the_engine_read_it_is_unloaded_and_never_used(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    rig.source.swapped.add("bad")
    with pytest.raises(DigestMismatchError, match="swapped"):
        await use(rig, "bad")
    assert rig.engine.adapters == {}
    assert rig.residency.slots_used == 0
    assert rig.directories() == set()
    assert rig.events.ended == {"DIGEST_MISMATCH": 1}


async def test_a_hanging_load_ends_by_its_time_and_harms_nobody_else(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, load_timeout_s=0.05)
    rig.engine.hang_names.add(version("stuck").name)
    stuck = asyncio.create_task(use(rig, "stuck"))
    await asyncio.sleep(0)
    await use(rig, "good")
    with pytest.raises(AdapterNotReadyError, match=r"stuck.*not ready"):
        await stuck
    assert rig.directories() == {"good"}
    assert rig.residency.slots_used == 1


async def test_a_caller_that_leaves_does_not_stop_the_load_others_wait_for(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    rig.source.delay_s = 0.02
    leaving, staying = asyncio.create_task(use(rig, "a")), asyncio.create_task(use(rig, "a"))
    await asyncio.sleep(0.005)
    leaving.cancel()
    await staying
    assert rig.source.staged == {"a": 1}


async def test_unload_waits_for_running_requests_and_later_callers_bring_it_in_again(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    async with rig.residency.lease(version("a")):
        unloading = asyncio.create_task(rig.residency.unload(version("a").digest))
        await asyncio.sleep(0.01)
        assert not unloading.done()
        again = asyncio.create_task(use(rig, "a"))
        await asyncio.sleep(0.01)
        assert not again.done()
    assert await unloading
    await again
    assert rig.source.staged == {"a": 2}
    assert not await rig.residency.unload("sha256:" + "f" * 64)


async def test_progress_is_told_to_everybody_who_waits(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    seen: list[tuple[str, int, int]] = []
    rig.source.delay_s = 0.01
    async with rig.residency.lease(version("a"), lambda *step: seen.append(step)):
        pass
    assert seen == [("fetch", 5, 10), ("load", 10, 10)]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(2, 4))
def test_any_schedule_keeps_books_engine_and_disk_in_step(
    tmp_path_factory: pytest.TempPathFactory, seed: int, slots: int
) -> None:
    """Law: whatever callers, cancellations, refusals and unloads do, the books equal the engine and the disk."""

    async def schedule() -> None:
        rng = random.Random(seed)
        rig = make_rig(tmp_path_factory.mktemp("staging"), slots=slots, load_timeout_s=0.5)
        rig.source.errors["5"] = DigestMismatchError("flipped")
        rig.engine.refuse_names.add(version("6").name)

        async def one(name: str) -> None:
            await asyncio.sleep(rng.random() * 0.01)
            try:
                async with rig.residency.lease(version(name)) as lease:
                    assert lease.adapter.slot_id in rig.engine.adapters
                    await asyncio.sleep(rng.random() * 0.003)
                    assert lease.adapter.slot_id in rig.engine.adapters, "evicted while leased"
            except (DigestMismatchError, UnsupportedAdapterError):
                assert name in "56"
            except AdapterNotReadyError:
                pass

        tasks: list[asyncio.Task[Any]] = []
        for _ in range(60):
            name = str(rng.randrange(7))
            kind = rng.random()
            if kind < 0.85:
                tasks.append(asyncio.create_task(one(name)))
            else:
                tasks.append(asyncio.create_task(rig.residency.unload(version(name).digest)))
            if rng.random() < 0.2:
                rng.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
        for _ in range(200):  # flights whose callers all left may still be landing
            if all(status.state is State.RESIDENT for status in rig.residency.statuses()):
                break
            await asyncio.sleep(0.005)
        await rig.residency.check()
        assert rig.directories() == {status.version.adapter for status in rig.residency.statuses()}
        assert all(status.active_requests == 0 for status in rig.residency.statuses())

    asyncio.run(schedule())
