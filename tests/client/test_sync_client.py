"""The synchronous client against a running server, from a thread as its users do."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from loraplex_client import (
    AdapterNotFoundError,
    AsyncClient,
    ChatMessage,
    Client,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    Sampling,
    ServerFaultError,
    TokenIds,
    UnavailableError,
)
from loraplex_client._core import retry_wait_s
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
            assert sum(pieces, ()) == tuple(answer(name, (1, 2), n) for n in range(4))
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


async def test_a_call_that_finds_no_room_is_tried_again_under_one_id_within_its_time(shop: Shop) -> None:
    async with running(shop, limits={"requests_max": 1}) as rig:
        hold = rig.app._gate.backend.scheduler.hold
        with Client(f"127.0.0.1:{rig.app.port}", timeout_s=20, retries=3) as client:
            with hold("other"):
                call = asyncio.create_task(asyncio.to_thread(client.generate, "x", sampling=FOUR))
                await until(lambda: rig.outcomes()["failed"] == 1)
            assert (await call).finish_reason == "length"
            assert not rig.engine.requests[0].request_id.startswith("request-"), "an id of the client's"
            with hold("other"), pytest.raises(OverloadedError):  # a second's wait is more than it has
                await asyncio.to_thread(client.generate, "x", sampling=FOUR, timeout_s=0.5)
            with pytest.raises(InvalidRequestError):
                await asyncio.to_thread(client.generate, "x", sampling=Sampling(top_p=2.0))
        assert rig.outcomes() == {"completed": 1, "failed": 3, "cancelled": 0, "expired": 0}
        async with AsyncClient(f"127.0.0.1:{rig.app.port}", timeout_s=20, retries=1) as other:
            with hold("other"):
                call = asyncio.create_task(other.generate("x", sampling=FOUR))
                await until(lambda: rig.outcomes()["failed"] == 4)
            assert (await call).header.request_id == rig.engine.requests[1].request_id.partition("-")[0]
            with hold("other"), pytest.raises(OverloadedError):
                await other.generate("x", sampling=FOUR)
        assert rig.outcomes()["failed"] == 6, "one try after the first, and no more"


@pytest.mark.parametrize(
    ("error", "tried", "left_s", "waits"),
    [
        (OverloadedError("x", retry_after_s=2.0), 1, 10.0, True),
        (OverloadedError("x", retry_after_s=2.0), 1, 1.5, False),
        (UnavailableError("x"), 2, 10.0, True),
        (UnavailableError("x"), 3, 10.0, False),
        (ServerFaultError("x"), 1, 10.0, False),
        (InvalidRequestError("x"), 1, 10.0, False),
    ],
)
def test_what_is_tried_again_and_when(error: LoraplexError, tried: int, left_s: float, waits: bool) -> None:
    wait_s = retry_wait_s(error, tried=tried, retries=2, remaining_s=left_s)
    assert (wait_s is not None) == waits
    if wait_s is not None:
        assert (error.retry_after_s or 0) <= wait_s <= left_s


async def test_the_command_asks_for_choices_forms_and_ids(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "any.json").write_text('{"type":"object"}')

    async def told(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loraplex_client.cli", "generate", "x"),
            *("--server", f"127.0.0.1:{rig.app.port}", *arguments),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        return out.decode()

    async with running(shop) as rig:
        several, form, chosen = await asyncio.gather(
            told("-n", "2", "--seed", "7", "--max-tokens", "1"),
            told("--json-schema", str(tmp_path / "any.json")),
            told("--choice", "yes", "--choice", "yes", "--json", "--logprobs", "1", "--request-id", "mine"),
        )
        first, second = (answer("", (120,), 0, seed) for seed in (7, 8))
        assert several == f"[0] {first} \n[1] {second} \n"
        assert form == "{}\n"
        assert json.loads(chosen)["choices"][0]["text"] == "yes"
        assert len(json.loads(chosen)["choices"][0]["logprobs"]) == 3
        assert any(request.request_id.startswith("mine-") for request in rig.engine.requests)
