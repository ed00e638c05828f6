"""Canaries through a running server: shares, sticky sessions, replacement, rollback, promotion."""

import asyncio
from pathlib import Path

import pytest

from loraplex_client import (
    AdapterNotFoundError,
    AsyncClient,
    Completion,
    InvalidRequestError,
    PermissionDeniedError,
)
from loraplex_registry.errors import StoreUnavailableError
from loraplex_registry.refs import AdapterRef
from loraplex_server.adapters.versions import AdapterVersion
from loraplex_server.errors import NotFoundError
from loraplex_server.identity.api_keys import make_key
from loraplex_server.rollout.judge import Limits
from loraplex_server.rollout.rollouts import Rollouts
from loraplex_server.rollout.splits import Splits, Target
from tests.server.conftest import Shop
from tests.server.rig import FOUR, Rig, running

HALF = '"acme/*" = "prod=50,canary=50"\n'


async def ask(client: AsyncClient, adapter: str = "acme/orders@prod", session: str = "") -> Completion:
    return await client.generate("hello", adapter=adapter, sampling=FOUR, session=session)


def two_versions(shop: Shop) -> tuple[str, str]:
    """Publish a stable version and a canary; return their digests."""
    stable = shop.publish("acme/orders", seed=1, tag="prod")
    canary = shop.publish("acme/orders", seed=2, tag="canary")
    return stable.digest, canary.digest


def splits(shop: Shop, text: str = HALF) -> dict[str, object]:
    (shop.root / "splits.toml").write_text(text)
    return {"splits": "splits.toml", "requests_min": 5}


async def canary_state(client: AsyncClient) -> tuple[float, str]:
    canary = (await client.get_rollout("acme/orders"))[1]
    return canary.share, canary.rolled_back


async def test_calls_are_split_and_a_session_keeps_its_tag(shop: Shop) -> None:
    stable, canary = two_versions(shop)
    async with running(shop, rollouts=splits(shop)) as rig, rig.client() as client:
        first = {str(n): (await ask(client, session=str(n))).header for n in range(20)}
        again = {str(n): (await ask(client, session=str(n))).header for n in range(20)}
    assert {head.adapter_tag: head.adapter_digest for head in first.values()} == {
        "prod": stable,
        "canary": canary,
    }
    assert {s: head.adapter_digest for s, head in first.items()} == {
        s: head.adapter_digest for s, head in again.items()
    }


async def test_a_caller_may_split_by_the_reference_itself(shop: Shop) -> None:
    _, canary = two_versions(shop)
    async with running(shop) as rig, rig.client() as client:
        assert (await ask(client, "acme/orders@prod=0,canary=1")).header.adapter_digest == canary
        with pytest.raises(InvalidRequestError):
            await ask(client, "acme/orders@prod=0,canary=0")


async def test_calls_that_name_something_else_are_not_split(shop: Shop) -> None:
    stable, canary = two_versions(shop)
    only_canary = splits(shop, '"*" = "prod=0,canary=1"')
    async with running(shop, rollouts=only_canary) as rig, rig.client() as client:
        assert (await ask(client)).header.adapter_digest == canary
        for ref in ("acme/orders@1", f"acme/orders@{stable}"):
            header = (await ask(client, ref)).header
            assert (header.adapter_digest, header.adapter_tag) == (stable, "")


async def test_a_canary_tag_that_is_not_set_gets_no_calls(shop: Shop) -> None:
    stable = shop.publish("acme/orders", seed=1, tag="prod").digest
    async with (
        running(shop, rollouts=splits(shop, '"*" = "prod=1,canary=99"')) as rig,
        rig.client() as client,
    ):
        heads = [(await ask(client)).header for _ in range(5)]
        assert {head.adapter_digest for head in heads} == {stable}
        arms = await client.get_rollout("acme/orders")
        assert [(arm.tag, arm.share, arm.digest) for arm in arms] == [
            ("prod", 1.0, stable),
            ("canary", 0.0, ""),
        ]


async def test_a_canary_the_engine_refuses_fails_no_call_and_is_rolled_back(shop: Shop) -> None:
    stable, canary = two_versions(shop)
    async with running(shop, rollouts=splits(shop)) as rig, rig.client() as client:
        rig.engine.refuse_names.add(f"acme/orders@{canary}")
        heads = [(await ask(client)).header for _ in range(40)]
        assert {head.adapter_digest for head in heads} == {stable}
        assert {head.adapter_tag for head in heads} == {"prod"}
        share, why = await canary_state(client)
        assert share == 0.0
        assert "5 of 5 calls failed" in why
        assert rig.outcomes()["completed"] == 40
        assert value(rig, "loraplex_canary_rollbacks_total") == 1
        assert value(rig, "loraplex_canary_calls_total") == 5


async def test_a_slow_canary_is_rolled_back(shop: Shop) -> None:
    stable, canary = two_versions(shop)
    async with running(shop, rollouts=splits(shop)) as rig, rig.client() as client:
        rig.engine.step_s_of[f"acme/orders@{canary}"] = 0.05
        for _ in range(60):
            head = (await ask(client)).header
        assert "median time" in (await canary_state(client))[1]
        assert head.adapter_digest == stable


async def test_a_moved_tag_gets_its_share_again_and_promotion_ends_the_split(shop: Shop) -> None:
    _, canary = two_versions(shop)
    async with running(shop, rollouts=splits(shop)) as rig, rig.client() as client:
        rig.engine.refuse_names.add(f"acme/orders@{canary}")
        for _ in range(40):
            await ask(client)
        assert (await canary_state(client))[0] == 0.0
        better = shop.publish("acme/orders", seed=3, tag="canary").digest
        assert {(await ask(client)).header.adapter_digest for _ in range(20)} >= {better}
        assert await canary_state(client) == (0.5, "")
        shop.publish("acme/orders", seed=3, tag="prod")  # the same bytes: only the tag moves
        assert {(await ask(client)).header.adapter_digest for _ in range(10)} == {better}


async def test_an_admin_resumes_a_canary_that_was_rolled_back(shop: Shop) -> None:
    _, canary = two_versions(shop)
    async with running(shop, rollouts=splits(shop)) as rig, rig.client() as client:
        rig.engine.refuse_names.add(f"acme/orders@{canary}")
        for _ in range(40):
            await ask(client)
        rig.engine.refuse_names.clear()
        assert (await client.resume_rollout("acme/orders"))[1].share == 0.5
        assert {(await ask(client)).header.adapter_digest for _ in range(20)} >= {canary}


async def test_a_tenant_sees_its_own_rollouts_and_resumes_none(shop: Shop) -> None:
    two_versions(shop)
    acme, acme_entry = make_key("app", "acme")
    globex, globex_entry = make_key("rival", "globex")
    async with running(shop, rollouts=splits(shop), keys=acme_entry + globex_entry) as rig:
        async with rig.client(acme) as client:
            assert len(await client.get_rollout("acme/orders")) == 2
            with pytest.raises(PermissionDeniedError):
                await client.resume_rollout("acme/orders")
            with pytest.raises(InvalidRequestError):
                await client.get_rollout("acme/orders@prod")
        async with rig.client(globex) as client:
            with pytest.raises(AdapterNotFoundError) as forbidden:
                await client.get_rollout("acme/orders")
            with pytest.raises(AdapterNotFoundError) as unknown:
                await client.get_rollout("acme/nothing")
            assert str(forbidden.value).replace("orders", "nothing") == str(unknown.value)


async def test_weights_change_while_the_server_runs(shop: Shop) -> None:
    stable, canary = two_versions(shop)
    async with running(shop, rollouts=splits(shop, '"*" = "prod=1,canary=0"')) as rig, rig.client() as client:
        assert (await ask(client)).header.adapter_digest == stable
        splits(shop, '"*" = "prod=0,canary=1"')
        for _ in range(100):
            if (await ask(client)).header.adapter_digest == canary:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the new weights were not seen within 5 s")


class Noted:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rollbacks = 0

    def canary_call(self, outcome: str) -> None:
        self.calls.append(outcome)

    def canary_rolled_back(self) -> None:
        self.rollbacks += 1


def rollouts(now_s: list[float]) -> tuple[Rollouts, Noted]:
    found, noted = Splits.parse(b'"*" = "prod=0,canary=1"', origin=Path("splits.toml")), Noted()
    return Rollouts(lambda: found, Limits(), absent_s=5.0, events=noted, clock=lambda: now_s[0]), noted


async def test_a_tag_that_is_not_set_is_looked_for_again_after_a_while_only() -> None:
    now_s, asked = [0.0], []

    async def resolve(ref: AdapterRef) -> AdapterVersion:
        asked.append(ref.tag)
        if ref.tag == "canary":
            raise NotFoundError("no adapter here")
        return AdapterVersion("a/b@x", "a", "b", "1", "x", None)  # type: ignore[arg-type]

    split, _ = rollouts(now_s)
    for now_s[0] in (0.0, 1.0, 4.9, 5.1):
        pick = await split.pick(Target.parse("a/b@prod"), resolve, session="s")
        assert pick.tag == "prod"
    assert asked == ["canary", "prod", "prod", "prod", "canary", "prod"]


async def test_a_silent_storage_is_not_the_canarys_fault() -> None:
    async def resolve(ref: AdapterRef) -> AdapterVersion:
        if ref.tag == "canary" and silent:
            raise StoreUnavailableError("silent")
        return AdapterVersion(f"a/b@{ref.tag}", "a", "b", "1", ref.tag or "", None)  # type: ignore[arg-type]

    silent = False
    split, noted = rollouts([0.0])
    assert (await split.pick(Target.parse("a/b@prod"), resolve, session="s")).tag == "canary"
    silent = True
    for _ in range(100):
        assert (await split.pick(Target.parse("a/b@prod"), resolve, session="s")).tag == "prod"
    assert noted.calls == []


def value(rig: Rig, name: str) -> float:
    """Sum of a counter over its labels."""
    return sum(s.value for metric in rig.counts.collect() for s in metric.samples if s.name == name)
