"""The synchronous client against a running server, from a thread as its users do."""

import asyncio

import pytest

from loraplex_client import (
    AdapterNotFoundError,
    ChatMessage,
    Client,
    InvalidRequestError,
    OverloadedError,
    Sampling,
    ServerFaultError,
    TokenIds,
    UnavailableError,
)
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running, until
from tests.sim.engine import answer


async def test_streams_lists_and_manages_adapters(shop: Shop) -> None:
    published = shop.publish("acme/orders", tag="prod")
    name = f"acme/orders@{published.digest}"

    def use(target: str) -> None:
        with Client(target, timeout_s=20) as client:
            assert client.is_ready()
            steps = list(client.load_adapter("acme/orders@prod"))
            assert steps[-1].phase == "ready"
            with client.stream(TokenIds((1, 2)), adapter="acme/orders@prod", sampling=FOUR) as stream:
                pieces = [piece.token_ids for piece in stream]
                assert stream.header is not None
                assert stream.header.adapter == name
            assert pieces == [(answer(name, (1, 2), n),) for n in range(4)]
            assert stream.completion.token_ids == tuple(token for piece in pieces for token in piece)
            assert [adapter.name for adapter in client.list_adapters()] == [name]
            assert client.pin_adapter("acme/orders").pinned
            assert not client.unpin_adapter("acme/orders").pinned
            assert client.unload_adapter("acme/orders")
            assert client.get_adapter("acme/orders").state == "absent"
            assert client.generate([ChatMessage("user", "x")], sampling=FOUR).finish_reason == "length"

    async with running(shop) as rig:
        await asyncio.to_thread(use, f"127.0.0.1:{rig.app.port}")


async def test_errors_are_typed_and_carry_what_the_server_said(shop: Shop) -> None:
    def use(target: str) -> None:
        with Client(target, timeout_s=20) as client:
            with pytest.raises(AdapterNotFoundError) as missing:
                client.generate("x", adapter="acme/none")
            assert missing.value.code == "ADAPTER_NOT_FOUND"
            assert missing.value.metadata == {"adapter": "acme/none"}
            with pytest.raises(InvalidRequestError) as wrong:
                list(client.stream("x", sampling=Sampling(top_p=2.0)))
            assert [field for field, _ in wrong.value.fields] == ["sampling.top_p"]

    async with running(shop) as rig:
        await asyncio.to_thread(use, f"127.0.0.1:{rig.app.port}")


async def test_leaving_the_stream_ends_the_call_on_the_server(shop: Shop) -> None:
    def leave(target: str) -> None:
        with (
            Client(target, timeout_s=20) as client,
            client.stream("x", sampling=Sampling(max_tokens=60)) as stream,
        ):
            next(iter(stream))
            with pytest.raises(ServerFaultError, match="before its last message"):
                _ = stream.completion

    async with running(shop) as rig:
        rig.engine.step_s = 0.01
        await asyncio.to_thread(leave, f"127.0.0.1:{rig.app.port}")
        await until(lambda: rig.engine.running == 0 and rig.outcomes()["cancelled"] == 1)


def test_nobody_listening_is_unavailable_and_worth_a_retry() -> None:
    with Client("127.0.0.1:1", timeout_s=2) as client:
        assert not client.is_ready(timeout_s=1)
        with pytest.raises(UnavailableError) as caught:
            client.generate("x")
        assert caught.value.retryable
        assert not issubclass(AdapterNotFoundError, OverloadedError)


def test_a_value_that_does_not_fit_the_wire_is_refused_before_it_is_sent() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequestError, match="cannot be sent"):
        client.generate("x", sampling=Sampling(max_tokens=-1))
