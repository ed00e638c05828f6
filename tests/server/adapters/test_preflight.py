"""ValidateAdapter: the verdict of a load without one, through a running server."""

import pytest

from loraplex_client import AdapterNotFoundError, AsyncClient, UnavailableError, Validation
from loraplex_registry.trust.verdict import CHECKS
from loraplex_server.adapters.preflight import slot_bytes
from loraplex_server.identity.api_keys import make_key
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running

EVERY_CHECK = (*CHECKS, "weights")


def failed(report: Validation) -> tuple[str, str]:
    """The one check that failed; those before it passed, those behind it were not made."""
    outcomes = [check.outcome for check in report.checks]
    assert [check.name for check in report.checks] == list(EVERY_CHECK)
    where = outcomes.index("failed")
    assert set(outcomes[:where]) <= {"passed"}
    assert set(outcomes[where + 1 :]) <= {"not_made"}
    assert not report.valid
    return report.checks[where].name, report.checks[where].reason


async def reason_of_load(client: AsyncClient, adapter: str) -> str:
    with pytest.raises(Exception) as refused:
        _ = [step async for step in client.load_adapter(adapter)]
    return str(refused.value.code)  # type: ignore[attr-defined]


async def test_a_good_adapter_passes_every_check_and_nothing_is_loaded(shop: Shop) -> None:
    shop.publish("acme/orders", rank=4)
    async with running(shop) as rig, rig.client() as client:
        report = await client.validate_adapter("acme/orders")
        assert report.valid
        assert [(check.name, check.outcome) for check in report.checks] == [
            (name, "passed") for name in EVERY_CHECK
        ]
        assert report.adapter is not None
        assert (report.adapter.rank, report.adapter.state) == (4, "absent")
        assert report.adapter.size_bytes == report.staged_bytes > 0
        assert rig.engine.slot_ids_seen == []
        assert [adapter async for adapter in client.list_adapters()] == []


async def test_the_forecast_follows_the_slots(shop: Shop) -> None:
    for name in ("orders", "support", "billing"):
        shop.publish(f"acme/{name}")

    async def forecast(name: str) -> tuple[bool, bool]:
        report = await client.validate_adapter(f"acme/{name}")
        return report.slot_at_once, report.evicts

    async with running(shop) as rig, rig.client() as client:  # two slots
        assert await forecast("orders") == (True, False)
        await client.generate("x", adapter="acme/orders", sampling=FOUR)
        await client.pin_adapter("acme/support")
        assert await forecast("orders") == (True, False)
        assert await forecast("billing") == (True, True)
        rig.engine.may_go_on.clear()
        async with client.stream("x", adapter="acme/orders", sampling=FOUR):
            while rig.engine.running == 0:
                await client.is_ready()
            assert await forecast("billing") == (False, True)
            rig.engine.may_go_on.set()


def untrusted(shop: Shop) -> str:
    shop.publish("acme/orders", signer="globex")
    return "signature"


def too_large(shop: Shop) -> str:
    shop.publish("acme/orders", rank=32)
    return "weights"


def damaged(shop: Shop) -> str:
    shop.publish("acme/orders")
    files = (path for path in (shop.root / "registry").rglob("*") if path.is_file())
    blob = next(
        path for path in files if b"lora_A" in path.read_bytes()[8:4096] and path.read_bytes()[8:9] == b"{"
    )
    body = bytearray(blob.read_bytes())
    body[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(body)
    return "weights"


@pytest.mark.parametrize("harm", [untrusted, too_large, damaged], ids=lambda harm: harm.__name__)
async def test_a_bad_adapter_fails_the_check_a_load_would_fail_by(harm, shop: Shop) -> None:  # type: ignore[no-untyped-def]
    check = harm(shop)
    async with running(shop) as rig, rig.client() as client:
        name, reason = failed(await client.validate_adapter("acme/orders"))
        assert (name, reason) == (check, await reason_of_load(client, "acme/orders"))
        assert rig.engine.adapters == {}


async def test_what_a_caller_may_not_see_is_not_examined(shop: Shop) -> None:
    shop.publish("acme/orders")
    key, entry = make_key("rival", "globex")
    async with running(shop, keys=entry) as rig, rig.client(key) as client:
        for name in ("acme/orders", "acme/absent", "globex/absent"):
            with pytest.raises(AdapterNotFoundError, match=name):
                await client.validate_adapter(name)


async def test_a_silent_storage_says_nothing_about_an_adapter(shop: Shop) -> None:
    shop.publish("acme/orders")
    async with running(shop) as rig, rig.client() as client:
        (shop.root / "registry").rename(shop.root / "elsewhere")
        with pytest.raises(UnavailableError):
            await client.validate_adapter("acme/orders")


def test_a_slot_takes_a_and_b_of_every_layer(shop: Shop) -> None:
    inner = {name: shape for name, shape in shop.base.layers.items() if shop.base.vocab_size not in shape}
    assert 0 < len(inner) < len(shop.base.layers)
    expected = sum(16 * 2 * (width_in + width_out) for width_in, width_out in inner.values())
    assert slot_bytes(shop.base, rank=16, element_bytes=2, embeddings=False) == expected
    assert slot_bytes(shop.base, rank=16, element_bytes=2, embeddings=True) > expected
