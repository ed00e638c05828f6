"""Damage to bytes and engine that nobody caused on purpose, found while nothing else happens."""

import asyncio
import os
from pathlib import Path

import pytest

from loraplex_registry.errors import DigestMismatchError
from loraplex_registry.refs import AdapterRef
from loraplex_server.adapters import integrity
from loraplex_server.adapters.integrity import CPU_SHARE_MAX, PAUSE_S_MIN, Patrol
from tests.server.adapters.residency_rig import make_rig, use, version
from tests.server.adapters.test_versions import Clock, make_versions, silent
from tests.server.conftest import Shop
from tests.server.rig import FOUR, Rig, running, until


def patrol_of(rig: Rig) -> Patrol:
    assert rig.app._versions is not None
    return Patrol(rig.app.residency, rig.app._versions, clock=Clock())


async def around(patrol: Patrol) -> None:
    """One whole round: a step begins it, the others end it."""
    await patrol.step()
    while patrol._left:
        await patrol.step()


def flip(path: Path) -> None:
    """Change one byte, as a failing disk would: the file itself stays."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


@pytest.mark.parametrize("tier", ["slot", "memory"])
async def test_an_adapter_whose_file_was_changed_leaves_and_is_fetched_again(shop: Shop, tier: str) -> None:
    shop.publish("acme/orders")
    async with running(shop, adapters={"handoff": "directory"}) as rig, rig.client() as client:
        async for _ in client.load_adapter("acme/orders", stage_only=tier == "memory"):
            pass
        before = await client.get_adapter("acme/orders")
        patrol = patrol_of(rig)
        await around(patrol)
        assert (await client.get_adapter("acme/orders")) == before
        (weights,) = (shop.root / "cache").glob("sha256-*/adapter_model.safetensors")
        flip(weights)
        await around(patrol)
        assert (await client.get_adapter("acme/orders")).state == "absent"
        labels = {"tier": tier, "cause": "integrity"}
        assert rig.counts.get_sample_value("loraplex_adapter_removals_total", labels) == 1
        await client.generate("x", adapter="acme/orders", sampling=FOUR)
        await rig.app.residency.check()
        await around(patrol)


async def test_every_piece_of_sealed_bytes_is_looked_at(shop: Shop) -> None:
    versions = make_versions(shop)
    shop.publish("acme/orders", tag="prod")
    staged = await versions.stage(await versions.resolve(AdapterRef.parse("acme/orders@prod")), silent)
    assert versions.pieces(staged) == 1
    assert await versions.recheck(staged, 0) >= 0
    handoff = versions._handoffs[staged.digest]
    handoff._config += b" "
    with pytest.raises(DigestMismatchError):
        await versions.recheck(staged, 0)
    await versions.discard(staged)
    assert versions.pieces(staged) == 0
    with pytest.raises(DigestMismatchError):
        handoff.recheck(0)


async def test_an_adapter_that_the_engine_lost_is_found_by_the_running_server(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(integrity, "AUDIT_INTERVAL_S", 0.0)
    monkeypatch.setattr(integrity, "PAUSE_S_MIN", 0.01)
    shop.publish("acme/orders")
    async with running(shop) as rig, rig.client() as client:
        await client.generate("x", adapter="acme/orders", sampling=FOUR)
        rig.engine.adapters.clear()
        await until(lambda: "the engine has lost acme/orders" in caplog.text)
        assert rig.app.residency.statuses() == []
        await client.generate("x", adapter="acme/orders", sampling=FOUR)


async def test_nothing_is_looked_at_while_adapters_come(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    rig.engine.load_s = 0.02
    coming = asyncio.create_task(use(rig, "a"))
    await until(lambda: bool(rig.engine.slot_ids_seen))
    patrol = Patrol(rig.residency, rig.source, clock=Clock())
    await patrol.step()
    assert rig.source.rechecked == []
    await coming
    await patrol.step()
    assert rig.source.rechecked == [("a", 0)]


async def test_the_rest_after_a_piece_keeps_hashing_within_its_share_of_a_core(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    await use(rig, "a")
    patrol = Patrol(rig.residency, rig.source, clock=Clock())
    for spent_s in (0.0, 0.001, 0.02, 3.0):
        rig.source.recheck_s = spent_s
        rest_s = await patrol.step()
        assert rest_s >= PAUSE_S_MIN
        assert spent_s / (spent_s + rest_s) <= CPU_SHARE_MAX * 1.000001


async def test_bytes_that_left_while_they_were_looked_at_are_not_called_damaged(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    await use(rig, "a")
    (staged,) = rig.residency.at_rest()
    await rig.residency.unload(version("a").digest)
    await use(rig, "a")
    assert not await rig.residency.damaged(staged)
    assert rig.states() == {"a": "resident"}
