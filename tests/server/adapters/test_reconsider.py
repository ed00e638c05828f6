"""Adapters that are revoked while they are in the engine."""

import asyncio
import datetime as dt

import pytest

from loraplex_client import AdapterNotFoundError, AdapterRefusedError, Sampling
from loraplex_registry.refs import AdapterRef
from loraplex_registry.trust.policy import TrustedKey
from loraplex_registry.trust.revocations import Revocation
from loraplex_registry.trust.revoking import append
from loraplex_server.adapters.versions import AdapterVersion
from loraplex_server.identity.api_keys import make_key
from tests.server.conftest import POLICY, Shop
from tests.server.rig import FOUR, running, until

WITH_REVOKERS = POLICY.replace(
    'keys = [{ path = "acme.pub" }]', 'keys = [{ path = "acme.pub" }]\nrevokers = [{ path = "acme.pub" }]'
)
LONG = Sampling(max_tokens=60, temperature=0)
SOON = {"registry_section": {"revocations_ttl_s": 0.0}}


@pytest.fixture
def shop(tmp_path) -> Shop:  # type: ignore[no-untyped-def]
    """A registry whose policy lets acme revoke."""
    made = Shop(tmp_path)
    made.policy.write_text(WITH_REVOKERS)
    return made


def revoke(shop: Shop, digest: str) -> None:
    """Put a version on acme's list."""
    signer = shop.signers["acme"]
    append(
        shop.registry.store,
        "acme",
        [Revocation("leaked", digest=digest)],
        signer,
        revokers=[TrustedKey(signer.public_key)],
        now=dt.datetime.now(dt.UTC),
    )


async def test_a_revoked_adapter_ends_its_streams_leaves_the_engine_and_does_not_come_back(
    shop: Shop,
) -> None:
    bad, good = shop.publish("acme/orders", tag="prod"), shop.publish("acme/mail", seed=1, tag="prod")
    shop.publish("globex/tickets")
    async with running(shop, **SOON) as rig, rig.client() as client:
        rig.engine.step_s = 0.05
        calls = [
            asyncio.create_task(client.generate("x", adapter=name, sampling=LONG))
            for name in ("acme/orders@prod", "acme/orders@prod", "acme/mail@prod")
        ]
        await until(lambda: rig.engine.running == 3)
        revoke(shop, bad.digest)
        found = await asyncio.wait_for(asyncio.gather(*calls[:2], return_exceptions=True), 5)
        assert [getattr(error, "code", None) for error in found] == ["REVOKED", "REVOKED"]
        await until(lambda: rig.app.residency.status(bad.digest) is None)
        rig.engine.step_s = 0.0
        assert (await calls[2]).header.adapter_digest == good.digest  # another adapter of the same tenant
        for name in ("acme/orders@prod", f"acme/orders@{bad.digest}"):
            with pytest.raises(AdapterRefusedError) as caught:
                await client.generate("x", adapter=name, sampling=FOUR)
            assert caught.value.code == "REVOKED"
        await client.generate("x", adapter="globex/tickets", sampling=FOUR)
        await rig.app.residency.check()
        assert rig.outcomes()["failed"] == 4


async def test_a_pinned_and_a_waiting_adapter_are_expelled_as_well(shop: Shop) -> None:
    bad = shop.publish("acme/orders", tag="prod")
    async with running(shop, **SOON) as rig, rig.client() as client:
        version = await rig.app._versions.resolve(AdapterRef.parse("acme/orders@prod"))  # type: ignore[union-attr]
        await client.pin_adapter("acme/orders@prod")
        revoke(shop, bad.digest)
        await until(lambda: rig.app.residency.status(bad.digest) is None)
        assert rig.app.residency.pins == 0
        with pytest.raises(Exception, match="revoked"):  # resolved before, leased after
            async with rig.app.residency.lease(version):
                pass


async def test_an_adapter_that_is_just_being_loaded_is_not_let_in(shop: Shop) -> None:
    bad = shop.publish("acme/orders", tag="prod")
    async with running(shop, **SOON) as rig, rig.client() as client:
        rig.engine.load_s = 3.0
        call = asyncio.create_task(client.generate("x", adapter="acme/orders@prod", sampling=FOUR))
        await until(lambda: bool(rig.engine.slot_ids_seen))
        revoke(shop, bad.digest)
        with pytest.raises(AdapterRefusedError) as caught:
            await call
        assert caught.value.code == "REVOKED"
        assert rig.engine.adapters == {}


async def test_while_the_storage_is_silent_residents_go_on(shop: Shop) -> None:
    shop.publish("acme/orders", tag="prod")
    async with running(shop, **SOON) as rig, rig.client() as client:
        await client.generate("x", adapter="acme/orders@prod", sampling=FOUR)
        (shop.root / "registry").rename(shop.root / "gone")
        await asyncio.sleep(1.2)
        done = await client.generate("x", adapter="acme/orders@prod", sampling=FOUR)
        assert done.header.adapter_was_resident


async def test_a_round_that_breaks_does_not_end_the_rounds(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that nobody foresaw must not leave revoked adapters serving for ever after."""
    bad = shop.publish("acme/orders", tag="prod")
    async with running(shop, **SOON) as rig, rig.client() as client:
        await client.generate("x", adapter="acme/orders@prod", sampling=FOUR)
        versions = rig.app._versions
        assert versions is not None
        kept, broken = versions.reconsider, []

        async def breaks_once(version: AdapterVersion) -> None:
            if not broken:
                broken.append(version)
                raise RuntimeError("on order")
            await kept(version)

        monkeypatch.setattr(versions, "reconsider", breaks_once)
        revoke(shop, bad.digest)
        await until(lambda: rig.app.residency.status(bad.digest) is None)
        assert broken
        assert "on order" in caplog.text


@pytest.mark.parametrize("resident", [True, False])
async def test_a_kept_answer_is_not_told_again_once_its_adapter_is_revoked(
    shop: Shop, resident: bool
) -> None:
    bad, good = shop.publish("acme/orders", tag="prod"), shop.publish("acme/mail", seed=1, tag="prod")
    async with running(shop, **SOON) as rig, rig.client() as client:
        kept = {
            name: await client.generate("x", adapter=name, sampling=FOUR, request_id=name[5:9])
            for name in ("acme/orders@prod", "acme/mail@prod")
        }
        if not resident:
            await client.unload_adapter("acme/orders@prod")
        revoke(shop, bad.digest)
        for _ in range(2):  # before the next round, and again
            stream = client.stream("x", adapter="acme/orders@prod", sampling=FOUR, request_id="orde")
            with pytest.raises(AdapterRefusedError) as caught:
                pytest.fail(f"told {[piece async for piece in stream]}")
            assert caught.value.code == "REVOKED"
        again = await client.generate("x", adapter="acme/mail@prod", sampling=FOUR, request_id="mail")
        assert again == kept["acme/mail@prod"]
        assert again.header.adapter_digest == good.digest
        assert len(rig.engine.requests) == 2, "nothing was generated anew"
        assert rig.outcomes() == {"completed": 2, "failed": 2, "cancelled": 0, "expired": 0}
        assert rig.app._gate.backend.scheduler.held == 0
        fixed = shop.publish("acme/orders", seed=2, tag="prod")
        anew = await client.generate("x", adapter="acme/orders@prod", sampling=FOUR, request_id="orde")
        assert anew.header.adapter_digest == fixed.digest


async def test_a_kept_answer_is_told_again_while_the_storage_is_silent(shop: Shop) -> None:
    shop.publish("acme/orders", tag="prod")
    async with running(shop, **SOON) as rig, rig.client() as client:
        first = await client.generate("x", adapter="acme/orders@prod", sampling=FOUR, request_id="one")
        (shop.root / "registry").rename(shop.root / "gone")
        assert first == await client.generate(
            "x", adapter="acme/orders@prod", sampling=FOUR, request_id="one"
        )
        assert len(rig.engine.requests) == 1


async def test_a_caller_that_lost_its_right_to_an_adapter_is_not_told_its_kept_answer(shop: Shop) -> None:
    shop.publish("globex/tickets")
    admin, admin_entry = make_key("ops", "acme", admin=True)
    tenant, tenant_entry = make_key("ops", "acme")
    async with (
        running(shop, keys=admin_entry + tenant_entry) as rig,
        rig.client(admin) as before,
        rig.client(tenant) as after,
    ):
        await before.generate("x", adapter="globex/tickets", sampling=FOUR, request_id="one")
        with pytest.raises(AdapterNotFoundError):
            await after.generate("x", adapter="globex/tickets", sampling=FOUR, request_id="one")
