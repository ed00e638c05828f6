"""Vectors: what a generation passes, they pass too."""

import asyncio

import openai
import pytest

from loraplex_client import (
    AdapterNotFoundError,
    ContextTooLongError,
    InvalidRequestError,
    OverloadedError,
    TokenIds,
    UnsupportedByBaseError,
)
from loraplex_server.identity.api_keys import make_key
from tests.server.conftest import Shop
from tests.server.ports.test_http_api import HTTP, asking
from tests.server.rig import FOUR, running, until
from tests.sim.engine import vector

EMBED = {"model": {"task": "embed"}}


async def test_an_adapters_vector_is_its_own_and_counted_as_a_call(shop: Shop) -> None:
    published = shop.publish("acme/orders", tag="prod")
    async with running(shop, **EMBED) as rig, rig.client() as client:
        name = f"acme/orders@{published.digest}"
        mine = await client.embed(TokenIds((1, 2)), adapter="acme/orders@prod")
        assert mine.vector == pytest.approx(vector(name, (1, 2)))
        assert (mine.header.adapter, mine.header.base_digest) == (name, shop.base.digest)
        assert not mine.header.adapter_was_resident
        assert mine.usage.prompt_tokens == 2
        assert 0 < mine.timings.adapter_s <= mine.timings.total_s
        base = await client.embed("ab")
        assert base.vector == pytest.approx(vector("", (97, 98)))
        assert rig.outcomes() == {"completed": 2, "failed": 0, "cancelled": 0, "expired": 0}
        first, second = rig.engine.embedded
        assert first.cache_salt != second.cache_salt, "another tenant's"


async def test_embedding_passes_the_same_doors_as_generating(shop: Shop) -> None:
    shop.publish("acme/orders")
    key, entry = make_key("rival", "globex")
    limits = {"requests_max": 2}
    async with running(shop, keys=entry, limits=limits, **EMBED) as rig, rig.client(key) as client:
        with pytest.raises(AdapterNotFoundError):
            await client.embed("ab", adapter="acme/orders")
        with pytest.raises(ContextTooLongError):
            await client.embed("x" * 65)
        with pytest.raises(InvalidRequestError):
            await client.embed(TokenIds((5000,)))
        rig.engine.may_go_on.clear()
        calls = [asyncio.create_task(client.embed("ab")) for _ in range(2)]
        await until(lambda: rig.engine.running == 2)
        with pytest.raises(OverloadedError):
            await client.embed("ab")
        calls[0].cancel()
        await until(lambda: rig.outcomes()["cancelled"] == 1)
        rig.engine.may_go_on.set()
        await calls[1]
        assert rig.outcomes() == {"completed": 1, "failed": 4, "cancelled": 1, "expired": 0}
        assert rig.app._gate.backend.scheduler.held == rig.engine.running == 0


@pytest.mark.parametrize("task", ["embed", "generate"])
async def test_a_base_is_asked_only_for_what_it_is_served_for(shop: Shop, task: str) -> None:
    async with running(shop, model={"task": task}, **HTTP) as rig, rig.client() as client:
        wrong = client.embed("x") if task == "generate" else client.generate("x", sampling=FOUR)
        with pytest.raises(
            UnsupportedByBaseError, match=f"is served for {'text' if task == 'generate' else 'vec'}"
        ):
            await wrong
        async with asking(rig) as http:
            vectors, text = http.embeddings.create, http.completions.create
            with pytest.raises(openai.UnprocessableEntityError) as refused:
                await (
                    vectors(model="sim", input="x") if task == "generate" else text(model="sim", prompt="x")
                )
            assert refused.value.code == "UNSUPPORTED_BY_BASE"


async def test_openais_client_gets_vectors_of_one_text_or_many(shop: Shop) -> None:
    published = shop.publish("acme/orders")
    async with running(shop, **EMBED, **HTTP) as rig, asking(rig) as http:
        name = f"acme/orders@{published.digest}"
        many = await http.embeddings.create(model="acme/orders", input=["ab", "c"])
        assert [row.index for row in many.data] == [0, 1]
        for row, ids in zip(many.data, [(97, 98), (99,)], strict=True):
            assert row.embedding == pytest.approx(vector(name, ids), abs=1e-6)
        assert many.usage.prompt_tokens == 3
        for given in ("ab", [97, 98], [[97, 98]]):
            one = await http.embeddings.create(model="sim", input=given, encoding_format="float")  # type: ignore[arg-type]
            assert one.data[0].embedding == pytest.approx(vector("", (97, 98)))
        assert rig.outcomes()["completed"] == 4
        for wrong in (
            {"input": []},
            {"input": ["x"] * 65},
            {"input": {}},
            {"input": ["a", 3]},
            {"dimensions": 2},
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await http.embeddings.create(**{"model": "sim", "input": "x", **wrong})  # type: ignore[arg-type]
            assert caught.value.code == "INVALID_ARGUMENT"
