"""Adapters in memory without a slot, fetches ahead of calls, and what is left when the engine dies or errs."""

import asyncio
from pathlib import Path

import pytest

from loraplex_registry.errors import RevokedError, StoreUnavailableError, UnsupportedAdapterError
from loraplex_server.adapters.residency import State
from loraplex_server.engine.protocol import EngineAdapter
from loraplex_server.errors import AdapterNotReadyError, EngineUnavailableError
from tests.server.adapters.residency_rig import SIZE, make_rig, use, version
from tests.server.rig import until
from tests.sim.engine import COPY_BYTES


async def test_an_evicted_adapter_stays_in_memory_and_comes_back_without_a_fetch(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    for name in ("a", "b", "c", "a"):
        await use(rig, name)
    assert rig.source.staged == {"a": 1, "b": 1, "c": 1}
    assert rig.states() == {"a": "resident", "b": "staged", "c": "resident"}
    assert rig.events.gone == {"slot evicted_for_slot": 2}
    assert rig.events.requested == {"miss": 3, "staged": 1}
    assert rig.residency.memory_bytes == SIZE
    await rig.residency.check()


async def test_memory_is_freed_least_recently_used_first_and_never_beyond_its_bound(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    for name in "abcdef":
        await use(rig, name)
    await until(lambda: rig.directories() == set("cdef"))
    assert rig.states() == {"c": "staged", "d": "staged", "e": "resident", "f": "resident"}
    assert rig.events.gone == {"slot evicted_for_slot": 4, "memory evicted_for_memory": 2}
    assert rig.residency.memory_bytes == 2 * SIZE


@pytest.mark.parametrize("name", ["a", "c"])  # in memory, in a slot
async def test_unload_frees_every_tier(tmp_path: Path, name: str) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    for each in "abc":
        await use(rig, each)
    assert await rig.residency.unload(version(name).digest)
    assert name not in rig.states()
    assert name not in rig.directories()
    assert rig.events.gone[f"{'memory' if name == 'a' else 'slot'} unloaded"] == 1
    await rig.residency.check()


async def test_an_adapter_that_leaves_for_a_slot_while_it_is_unloaded_is_not_kept_in_memory(
    tmp_path: Path,
) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    for name in "ab":
        await use(rig, name)
    coming = asyncio.create_task(use(rig, "c"))
    while rig.states()["a"] != State.DRAINING:  # noqa: ASYNC110  (it lasts for a few steps of the loop only)
        await asyncio.sleep(0)
    assert await rig.residency.unload(version("a").digest)
    await coming
    assert rig.states() == {"b": "resident", "c": "resident"}
    assert rig.directories() == {"b", "c"}


async def test_an_expelled_adapter_leaves_memory_too(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    await rig.residency.stage(version("a"))
    await rig.residency.expel(version("a").digest, RevokedError("leaked"))
    assert rig.directories() == set()
    assert rig.events.gone == {"memory expelled": 1}
    with pytest.raises(RevokedError):
        await rig.residency.stage(version("a"))
    rig.residency.prefetch(version("a"))
    assert rig.states() == {}


async def test_bytes_fetched_ahead_are_there_when_the_call_comes_and_took_no_slot(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    rig.residency.prefetch(version("a"))
    rig.residency.prefetch(version("a"))
    await until(lambda: rig.states() == {"a": "staged"})
    assert rig.residency.slots_used == 0
    await use(rig, "a")
    rig.residency.prefetch(version("a"))
    assert rig.source.staged == {"a": 1}
    assert rig.events.ahead == {"started": 1, "here": 2}


async def test_a_call_joins_the_fetch_ahead_of_it_and_both_are_one_flight(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    rig.source.delay_s = 0.01
    rig.residency.prefetch(version("a"))
    await use(rig, "a")
    assert rig.source.staged == {"a": 1}
    assert rig.events.ended == {"ok": 1}
    assert rig.residency.memory_bytes == 0


async def test_a_fetch_ahead_that_fails_is_told_to_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    rig.source.errors["a"] = StoreUnavailableError("no store")
    rig.residency.prefetch(version("a"))
    await until(lambda: rig.states() == {})
    assert (rig.directories(), rig.residency.memory_bytes) == (set(), 0)
    rig.source.errors.clear()
    await use(rig, "a")


async def test_fetches_ahead_are_bounded_in_number_and_bytes_and_displace_nothing_that_waits_for_its_call(
    tmp_path: Path,
) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=3, ahead_max=2)
    rig.source.delay_s = 0.01
    for name in "abc":
        rig.residency.prefetch(version(name))
    assert rig.events.ahead == {"started": 2, "full": 1}  # the third beyond ahead_max
    assert rig.residency.memory_bytes == 2 * SIZE  # reserved before a byte is here
    await until(lambda: rig.states() == {"a": "staged", "b": "staged"})
    rig.residency.prefetch(version("c"))
    rig.residency.prefetch(version("d"))  # beyond the bytes: a, b and c wait for their calls
    assert rig.events.ahead == {"started": 3, "full": 2}
    await until(lambda: rig.states() == dict.fromkeys("abc", "staged"))
    await use(rig, "a")
    rig.residency.prefetch(version("d"))
    await until(lambda: rig.states() == {"a": "resident", **dict.fromkeys("bcd", "staged")})


async def test_without_a_memory_tier_nothing_is_fetched_ahead_and_loads_go_on(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2)
    rig.residency.prefetch(version("a"))
    with pytest.raises(AdapterNotReadyError, match="does not fit"):
        await rig.residency.stage(version("a"))
    for name in "abc":
        await use(rig, name)
    assert rig.directories() == {"b", "c"}


async def test_a_load_that_the_engine_only_pretends_harms_its_own_callers_alone(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    rig.engine.lie_names.add(version("a").name)
    results = await asyncio.gather(use(rig, "a"), use(rig, "b"), use(rig, "a"), return_exceptions=True)
    assert [type(result) for result in results] == [AdapterNotReadyError, type(None), AdapterNotReadyError]
    assert rig.states() == {"b": "resident"}
    await rig.residency.check()
    rig.engine.lie_names.clear()
    await use(rig, "a")


async def test_a_staged_adapter_that_the_engine_refuses_leaves_memory(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    await rig.residency.stage(version("a"))
    rig.engine.refuse_names.add(version("a").name)
    with pytest.raises(UnsupportedAdapterError):
        await use(rig, "a")
    assert rig.directories() == set()
    assert rig.events.gone == {"memory failed": 1}


async def test_what_was_resident_comes_back_with_the_next_engine_most_recently_used_first(
    tmp_path: Path,
) -> None:
    rig = make_rig(tmp_path, slots=3)  # and without a memory tier
    await rig.residency.pin(version("a"))
    for name in "bcb":
        await use(rig, name)
    await rig.restart()
    assert [adapter.name for adapter in rig.engine.adapters.values()] == [version(n).name for n in "bca"]
    assert rig.residency.pins == 1
    assert rig.source.staged == {"a": 1, "b": 1, "c": 1}
    assert rig.events.gone == {"slot engine_died": 3}
    await rig.residency.check()
    await use(rig, "d")
    assert set(rig.states()) == set("abd")


async def test_calls_of_a_dead_engine_end_and_new_ones_are_refused_until_the_next(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2)
    rig.engine.hang_names.add(version("b").name)

    async def hold() -> None:
        async with rig.residency.lease(version("a")):
            await asyncio.Event().wait()

    holding, loading = asyncio.create_task(hold()), asyncio.create_task(use(rig, "b"))
    await until(lambda: len(rig.engine.slot_ids_seen) == 2)
    rig.engine.dead = True
    losing = asyncio.create_task(rig.residency.engine_lost(EngineUnavailableError("the engine stopped")))
    await asyncio.sleep(0)
    with pytest.raises(EngineUnavailableError):
        await use(rig, "a")
    await losing
    for call in (holding, loading):
        with pytest.raises(EngineUnavailableError):
            await asyncio.wait_for(call, 1)
    assert rig.states() == {"a": "loading", "b": "loading"}  # for the next engine


async def test_an_adapter_revoked_between_two_engines_stays_out(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2)
    for name in "ab":
        await use(rig, name)
    rig.engine.dead = True
    await rig.residency.engine_lost(EngineUnavailableError("the engine stopped"))
    await rig.residency.expel(version("a").digest, RevokedError("leaked"))
    engine = type(rig.engine)(rig.engine.base, slots=2)
    await rig.residency.restore(engine)
    assert [adapter.name for adapter in engine.adapters.values()] == [version("b").name]
    assert rig.directories() == {"b"}


async def test_what_does_not_come_back_with_the_engine_leaves_and_harms_nobody(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, load_timeout_s=0.1)
    for name in "ab":
        await use(rig, name)
    rig.engine.dead = True
    await rig.residency.engine_lost(EngineUnavailableError("the engine stopped"))
    rig.engine = type(rig.engine)(rig.engine.base, slots=2)
    rig.engine.hang_names.add(version("a").name)
    await rig.residency.restore(rig.engine)
    assert rig.states() == {"b": "resident"}
    await rig.residency.check()


async def test_an_audit_mends_what_differs_between_books_and_engine(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2)
    for name in "ab":
        await use(rig, name)
    assert await rig.residency.audit() == []
    lost, kept = rig.engine.adapters
    del rig.engine.adapters[lost]
    rig.engine.adapters[77] = EngineAdapter(name="stray", slot_id=77, path=tmp_path)
    found = await rig.residency.audit()
    assert [line.split(" ")[2] for line in found] == ["held", "has"]
    assert set(rig.engine.adapters) == {kept}
    assert rig.states() == {"b": "resident"}
    assert rig.events.gone == {"slot integrity": 2}
    await use(rig, "a")
    await rig.residency.check()


@pytest.mark.parametrize("meanwhile", ["comes", "goes"])
async def test_an_adapter_that_comes_or_goes_while_the_engine_is_asked_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    rig = make_rig(tmp_path, slots=2)
    await use(rig, "a")
    engine = rig.engine

    async def slowly() -> frozenset[int]:
        before = frozenset(engine.adapters)
        monkeypatch.undo()
        await (use(rig, "b") if meanwhile == "comes" else rig.residency.unload(version("a").digest))
        return frozenset(engine.adapters) if meanwhile == "comes" else before

    monkeypatch.setattr(engine, "loaded", slowly)
    assert await rig.residency.audit() == []
    assert rig.states() == ({"a": "resident", "b": "resident"} if meanwhile == "comes" else {})
    await rig.residency.check()


async def test_an_audit_says_nothing_while_adapters_come_and_go(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2)
    rig.engine.load_s = 0.02
    coming = asyncio.create_task(use(rig, "a"))
    await until(lambda: bool(rig.engine.slot_ids_seen))
    rig.engine.adapters[77] = EngineAdapter(name="stray", slot_id=77, path=tmp_path)
    assert await rig.residency.audit() == []
    await coming
    assert len(await rig.residency.audit()) == 1


async def test_an_engine_that_dies_again_while_adapters_come_back_loses_none_of_them(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2)
    for name in "ab":
        await use(rig, name)
    rig.engine.dead = True
    await rig.residency.engine_lost(EngineUnavailableError("the engine stopped"))
    second = type(rig.engine)(rig.engine.base, slots=2)
    second.hang_names = {version(name).name for name in "ab"}
    restoring = asyncio.create_task(rig.residency.restore(second))
    await until(lambda: len(second.slot_ids_seen) == 2)
    await rig.residency.engine_lost(EngineUnavailableError("the engine stopped"))
    await restoring
    assert rig.states() == {"a": "loading", "b": "loading"}
    rig.engine = type(rig.engine)(rig.engine.base, slots=2)
    await rig.residency.restore(rig.engine)
    assert rig.states() == {"a": "resident", "b": "resident"}
    assert rig.source.staged == {"a": 1, "b": 1}
    await rig.residency.check()


async def test_where_the_engine_keeps_the_bytes_a_slot_is_lost_and_won_without_asking_it(
    tmp_path: Path,
) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2, keeps_bytes=True)
    for name in "abca":
        await use(rig, name)
    assert rig.states() == {"a": "resident", "b": "staged", "c": "resident"}
    assert len(rig.engine.slot_ids_seen) == 3, "each was handed over once"
    assert len(rig.engine.adapters) == 3
    assert rig.directories() == set(), "and its bytes are held once"
    assert rig.residency.memory_bytes == COPY_BYTES
    assert rig.residency.at_rest() == []
    await rig.residency.check()


async def test_a_copy_goes_when_its_adapter_leaves_memory(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2, keeps_bytes=True)
    for name in "abcdef":
        await use(rig, name)
    await until(lambda: len(rig.engine.adapters) == 4)
    assert rig.states() == {"c": "staged", "d": "staged", "e": "resident", "f": "resident"}
    assert await rig.residency.unload(version("c").digest)
    assert len(rig.engine.adapters) == 3
    await rig.residency.check()


async def test_what_is_fetched_ahead_is_a_copy_already_when_the_call_comes(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, staged_max=2, keeps_bytes=True)
    rig.residency.prefetch(version("a"))
    await until(lambda: rig.states() == {"a": "staged"})
    assert [adapter.name for adapter in rig.engine.adapters.values()] == [version("a").name]
    assert rig.directories() == set()
    rig.engine.load_s = 10.0  # it is not asked again
    async with asyncio.timeout(1), rig.residency.lease(version("a")) as lease:
        assert lease.adapter.slot_id in rig.engine.adapters


async def test_copies_of_a_dead_engine_are_made_again_in_slots_at_once_and_in_memory_when_asked_for(
    tmp_path: Path,
) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2, keeps_bytes=True)
    for name in "abc":
        await use(rig, name)
    await rig.restart()
    assert rig.states() == {"a": "staged", "b": "resident", "c": "resident"}
    assert {adapter.name for adapter in rig.engine.adapters.values()} == {
        version("b").name,
        version("c").name,
    }
    await rig.residency.check()
    await use(rig, "a")
    assert rig.source.staged == {"a": 2, "b": 2, "c": 2}
    assert len(rig.engine.adapters) == 3
    await rig.residency.check()


async def test_an_engine_that_dies_while_a_copy_is_made_for_memory_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    rig = make_rig(tmp_path, staged_max=2, keeps_bytes=True)
    rig.engine.hang_names.add(version("a").name)
    rig.residency.prefetch(version("a"))
    await until(lambda: len(rig.engine.slot_ids_seen) == 1)
    await rig.restart()
    await until(lambda: rig.states() == {})
    assert rig.directories() == set()
    await use(rig, "a")
    await rig.residency.check()


async def test_a_copy_that_the_engine_has_lost_is_found_in_memory_too(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, slots=2, staged_max=2, keeps_bytes=True)
    for name in "abc":
        await use(rig, name)
    lost = next(each for each in rig.engine.adapters.values() if each.name == version("a").name)
    await rig.engine.unload(lost.slot_id)
    assert await rig.residency.audit() == [f"the engine has lost {version('a').name}"]
    assert "a" not in rig.states()
    await rig.residency.check()
