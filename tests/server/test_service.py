"""The gRPC services over loopback, with a real registry and the deterministic engine.

What the real engine alone can show is in tests/e2e.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loraplex_client import (
    AdapterNotFoundError,
    AdapterRefusedError,
    ChatMessage,
    ContextTooLongError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    PermissionDeniedError,
    Sampling,
    TokenIds,
    UnauthenticatedError,
    UnavailableError,
)
from loraplex_protos.v1 import adapters_pb2, generation_pb2
from loraplex_server.errors import ConfigError
from loraplex_server.identity.api_keys import make_key
from loraplex_server.identity.principals import RIGHTS, Action
from loraplex_server.ports.ports import SERVICES
from tests.server.conftest import Shop
from tests.server.rig import FOUR, reason_of, running, until
from tests.sim.engine import answer


async def test_the_named_adapter_answers_and_the_header_names_its_digest(shop: Shop) -> None:
    published = shop.publish("acme/orders", tag="prod")
    async with running(shop) as rig, rig.client() as client:
        done = await client.generate(TokenIds((1, 2)), adapter="acme/orders@prod", sampling=FOUR)
        name = f"acme/orders@{published.digest}"
        assert done.header.adapter == name
        assert done.header.adapter_digest == published.digest
        assert done.header.base_digest == shop.base.digest
        assert not done.header.adapter_was_resident
        assert done.token_ids == tuple(answer(name, (1, 2), n) for n in range(4))
        assert done.finish_reason == "length"
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, 4)
        assert 0 <= done.timings.adapter_s <= done.timings.first_token_s <= done.timings.total_s
        again = await client.generate(TokenIds((1, 2)), adapter="acme/orders@prod", sampling=FOUR)
        assert again.header.adapter_was_resident
        base = await client.generate(TokenIds((1, 2)), sampling=FOUR)
        assert base.token_ids == tuple(answer("", (1, 2), n) for n in range(4))
        assert base.header.adapter == ""


async def test_all_three_forms_of_prompt_reach_the_engine(shop: Shop) -> None:
    async with running(shop) as rig, rig.client() as client:
        for prompt in ("ab", [ChatMessage("user", "ab")], TokenIds((97, 98))):
            await client.generate(prompt, sampling=FOUR)
        assert [request.prompt_ids for request in rig.engine.requests] == [(97, 98)] * 3


async def test_tenants_never_share_a_cache_salt(shop: Shop) -> None:
    shop.publish("acme/orders")
    shop.publish("globex/tickets")
    async with running(shop) as rig, rig.client() as client:
        for adapter in ("acme/orders", "globex/tickets", "acme/orders"):
            await client.generate("x", adapter=adapter, sampling=FOUR)
        first, second, third = (request.cache_salt for request in rig.engine.requests)
        assert first == third != second


async def test_a_moved_tag_is_followed_and_the_old_version_still_has_its_digest(shop: Shop) -> None:
    first = shop.publish("acme/orders", seed=1, tag="prod")
    async with running(shop) as rig, rig.client() as client:
        before = await client.generate("x", adapter="acme/orders@prod", sampling=FOUR)
        second = shop.publish("acme/orders", seed=2, tag="prod")
        after = await client.generate("x", adapter="acme/orders@prod", sampling=FOUR)
        pinned = await client.generate("x", adapter=f"acme/orders@{first.digest}", sampling=FOUR)
        assert before.header.adapter_digest == pinned.header.adapter_digest == first.digest
        assert after.header.adapter_digest == second.digest


async def test_another_tenants_adapter_cannot_be_told_from_one_that_is_not_there(shop: Shop) -> None:
    shop.publish("acme/orders")
    globex_key, entry = make_key("globex-app", "globex")
    async with running(shop, keys=entry) as rig, rig.client(globex_key) as client:
        texts = []
        for adapter in ("acme/orders", "acme/absent"):
            for call in (client.generate("x", adapter=adapter), client.get_adapter(adapter)):
                with pytest.raises(AdapterNotFoundError) as caught:
                    await call
                texts.append(str(caught.value).replace(adapter, "NAME"))
        assert len(set(texts)) == 1
        assert [adapter async for adapter in client.list_adapters()] == []
        assert rig.engine.adapters == {}


async def test_a_resident_adapter_of_another_tenant_is_neither_listed_nor_found(shop: Shop) -> None:
    shop.publish("acme/orders")
    shop.publish("globex/tickets")
    acme_key, acme_entry = make_key("acme-app", "acme")
    globex_key, globex_entry = make_key("globex-app", "globex")
    keys = acme_entry + globex_entry
    async with (
        running(shop, keys=keys) as rig,
        rig.client(acme_key) as acme,
        rig.client(globex_key) as globex,
    ):
        await acme.generate("x", adapter="acme/orders", sampling=FOUR)
        await globex.generate("x", adapter="globex/tickets", sampling=FOUR)
        assert [adapter.tenant async for adapter in acme.list_adapters()] == ["acme"]
        assert [adapter.tenant async for adapter in globex.list_adapters()] == ["globex"]
        with pytest.raises(AdapterNotFoundError):
            await globex.get_adapter("acme/orders")


async def test_calls_without_a_known_key_are_refused(shop: Shop) -> None:
    _, entry = make_key("app", "acme")
    async with running(shop, keys=entry) as rig:
        for key in (None, "wrong"):
            async with rig.client(key) as client:
                with pytest.raises(UnauthenticatedError):
                    await client.generate("x")
                with pytest.raises(UnauthenticatedError):
                    _ = [adapter async for adapter in client.list_adapters()]
                assert await client.is_ready()


EXPECTED_OF = {
    # caller -> what a method that needs this right answers about acme/orders, about acme/absent
    "nobody": dict.fromkeys(Action, ("UNAUTHENTICATED", "UNAUTHENTICATED")),
    "tenant": {
        Action.GENERATE: ("OK", "NOT_FOUND"),
        Action.READ: ("OK", "NOT_FOUND"),
        Action.MANAGE: ("PERMISSION_DENIED", "PERMISSION_DENIED"),
    },
    "other tenant": {
        Action.GENERATE: ("NOT_FOUND", "NOT_FOUND"),
        Action.READ: ("NOT_FOUND", "NOT_FOUND"),
        Action.MANAGE: ("PERMISSION_DENIED", "PERMISSION_DENIED"),
    },
    "admin": dict.fromkeys(Action, ("OK", "NOT_FOUND")),
}


@pytest.mark.parametrize("method", sorted(RIGHTS))
async def test_every_method_answers_every_kind_of_caller_as_the_table_says(method: str, shop: Shop) -> None:
    """Every RPC x role x own, other, none; a method whose request names no adapter shows a tenant nothing of others."""
    shop.publish("acme/orders")
    made = {
        "tenant": make_key("app", "acme"),
        "other tenant": make_key("rival", "globex"),
        "admin": make_key("ops", "platform", admin=True),
    }
    credentials: dict[str, str | None] = {"nobody": None} | {who: key for who, (key, _) in made.items()}
    _, service, name = method.split("/")
    described = next(
        file.services_by_name[service.rpartition(".")[2]].methods_by_name[name]
        for file in (adapters_pb2.DESCRIPTOR, generation_pb2.DESCRIPTOR)
        if service.rpartition(".")[2] in file.services_by_name
    )
    request_type = message_factory.GetMessageClass(described.input_type)
    reply_type = message_factory.GetMessageClass(described.output_type)
    task = {"task": "embed" if name == "Embed" else "generate"}
    async with (
        running(shop, keys="".join(entry for _, entry in made.values()), model=task) as rig,
        grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.port}") as channel,
    ):
        stream = channel.unary_stream if described.server_streaming else channel.unary_unary
        call = stream(method, request_type.SerializeToString, reply_type.FromString)
        texts = set()
        for who, key in credentials.items():
            for number, adapter in enumerate(("acme/orders", "acme/absent")):
                request = request_type()
                names_one = "adapter" in described.input_type.fields_by_name
                if names_one:
                    request.adapter = adapter
                if name in ("Generate", "Embed", "Tokenize"):
                    request.text = "x"
                if name == "Generate":
                    request.sampling.max_tokens = 1
                metadata = None if key is None else (("authorization", f"Bearer {key}"),)
                status, text = "OK", ""
                try:
                    answer = call(request, metadata=metadata, timeout=10)
                    replies = (
                        [each async for each in answer] if described.server_streaming else [await answer]
                    )
                    if not names_one and who == "other tenant":
                        assert "acme" not in str(replies)
                except grpc.RpcError as failed:
                    status, text = failed.code().name, str(failed.details())  # type: ignore[attr-defined]
                expected = EXPECTED_OF[who][RIGHTS[method]][number]
                if not names_one and expected == "NOT_FOUND":
                    expected = "OK"
                assert (who, adapter, status) == (who, adapter, expected)
                if status == "NOT_FOUND":
                    texts.add(text.replace(adapter, "NAME"))
        assert len(texts) <= 1  # absent and forbidden are told in the same words


async def test_only_admins_unload_and_pin(shop: Shop) -> None:
    shop.publish("acme/orders")
    tenant_key, tenant_entry = make_key("app", "acme")
    admin_key, admin_entry = make_key("ops", "platform", admin=True)
    async with running(shop, keys=tenant_entry + admin_entry) as rig:
        async with rig.client(tenant_key) as client:
            for call in (client.pin_adapter, client.unpin_adapter, client.unload_adapter):
                with pytest.raises(PermissionDeniedError, match="tenant may not manage"):
                    await call("acme/orders")
        async with rig.client(admin_key) as client:
            assert (await client.pin_adapter("acme/orders")).pinned
            assert not (await client.unpin_adapter("acme/orders")).pinned
            assert await client.unload_adapter("acme/orders")
            assert not await client.unload_adapter("acme/orders")


async def test_load_streams_its_phases_and_ends_ready(shop: Shop) -> None:
    published = shop.publish("acme/orders")
    async with running(shop) as rig, rig.client() as client:
        assert (await client.get_adapter("acme/orders")).state == "absent"
        steps = [step async for step in client.load_adapter("acme/orders")]
        phases = list(dict.fromkeys(step.phase for step in steps))
        assert phases == ["resolve", "verify", "fetch", "check", "load", "ready"]
        assert steps[-1].adapter is not None
        assert steps[-1].adapter.digest == published.digest
        assert steps[-1].adapter.state == "resident"
        assert steps[-1].adapter.size_bytes > 0
        again = [step.phase async for step in client.load_adapter("acme/orders")]
        assert "fetch" not in again
        assert again[-1] == "ready"
        listed = [adapter async for adapter in client.list_adapters()]
        assert [adapter.name for adapter in listed] == [f"acme/orders@{published.digest}"]


async def test_lists_come_in_pages_and_lose_nothing(shop: Shop) -> None:
    names = [f"acme/a{number}" for number in range(3)]
    for number, name in enumerate(names):
        shop.publish(name, seed=number)
    async with running(shop, adapters={"slots": 4}) as rig, rig.client() as client:
        for name in names:
            await client.generate("x", adapter=name, sampling=FOUR)
        stub: Any = client._adapters
        seen, token = [], ""
        for _ in range(4):
            page = await stub.ListAdapters(adapters_pb2.ListAdaptersRequest(page_size=2, page_token=token))
            seen += [adapter.adapter for adapter in page.adapters]
            token = page.next_page_token
            if not token:
                break
        assert seen == ["a0", "a1", "a2"]
        assert (page.slots_total, page.slots_used) == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "code"),
    [
        ({"prompt": "x" * 65}, ContextTooLongError, "CONTEXT_TOO_LONG"),
        ({"prompt": "x", "sampling": Sampling(max_tokens=64)}, ContextTooLongError, "CONTEXT_TOO_LONG"),
        ({"prompt": "x", "sampling": Sampling(max_tokens=0)}, InvalidRequestError, "INVALID_ARGUMENT"),
        (
            {"prompt": "x", "sampling": Sampling(temperature=float("nan"))},
            InvalidRequestError,
            "INVALID_ARGUMENT",
        ),
        ({"prompt": TokenIds((5000,))}, InvalidRequestError, "INVALID_ARGUMENT"),
        ({"prompt": "x", "adapter": "acme/none"}, AdapterNotFoundError, "ADAPTER_NOT_FOUND"),
        ({"prompt": "x", "adapter": "../x"}, InvalidRequestError, "INVALID_ARGUMENT"),
    ],
)
async def test_bad_requests_get_their_reason_and_the_server_goes_on(
    shop: Shop, arguments: dict[str, Any], error: type[Exception], code: str
) -> None:
    async with running(shop) as rig, rig.client() as client:
        with pytest.raises(error) as caught:
            await client.generate(**arguments)
        assert caught.value.code == code  # type: ignore[attr-defined]
        assert (await client.generate("x", sampling=FOUR)).usage.completion_tokens == 4
        assert rig.outcomes() == {"completed": 1, "failed": 1, "cancelled": 0, "expired": 0}


async def test_an_adapter_signed_with_another_tenants_key_never_reaches_the_engine(shop: Shop) -> None:
    shop.publish("acme/forged", signer="globex")
    async with running(shop) as rig, rig.client() as client:
        with pytest.raises(AdapterRefusedError) as caught:
            await client.generate("x", adapter="acme/forged")
        assert caught.value.code == "SIGNATURE_INVALID"
        assert rig.engine.slot_ids_seen == []


async def test_a_full_server_says_when_to_come_back(shop: Shop) -> None:
    async with running(shop, limits={"requests_max": 1}) as rig, rig.client() as client:
        rig.engine.may_go_on.clear()
        running_call = asyncio.create_task(client.generate("x", sampling=FOUR))
        await until(lambda: rig.engine.running == 1)
        with pytest.raises(OverloadedError) as caught:
            await client.generate("x", sampling=FOUR)
        assert caught.value.code == "QUEUE_FULL"
        assert caught.value.retry_after_s == 1.0
        rig.engine.may_go_on.set()
        assert (await running_call).usage.completion_tokens == 4


async def test_cancelling_frees_the_engine_the_lease_and_the_place(shop: Shop) -> None:
    shop.publish("acme/orders")
    async with running(shop) as rig, rig.client() as client:
        rig.engine.step_s = 0.01
        async with client.stream("x", adapter="acme/orders", sampling=Sampling(max_tokens=50)) as stream:
            async for _ in stream:
                break
        await until(lambda: rig.engine.running == 0)
        await until(lambda: all(s.active_requests == 0 for s in rig.app.residency.statuses()))
        await until(lambda: rig.outcomes()["cancelled"] == 1)


async def test_a_deadline_ends_the_call_and_is_counted_as_expired(shop: Shop) -> None:
    async with running(shop) as rig, rig.client() as client:
        rig.engine.may_go_on.clear()
        with pytest.raises(DeadlineExceededError):
            await client.generate("x", timeout_s=0.2)
        await until(lambda: rig.engine.running == 0)
        await until(lambda: sum(rig.outcomes().values()) == 1)
        assert rig.outcomes()["cancelled"] + rig.outcomes()["expired"] == 1


async def test_calls_without_a_deadline_get_the_servers(shop: Shop) -> None:
    async with running(shop, server={"default_deadline_s": 1}) as rig:
        rig.engine.may_go_on.clear()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.port}") as channel:
            call = channel.unary_stream(
                f"/{SERVICES[0]}/Generate",
                generation_pb2.GenerateRequest.SerializeToString,
                generation_pb2.GenerateResponse.FromString,
            )(generation_pb2.GenerateRequest(text="x"))
            with pytest.raises(grpc.RpcError) as caught:
                _ = [message async for message in call]
        assert reason_of(caught.value) == "DEADLINE_EXCEEDED"
        assert rig.outcomes()["expired"] == 1


async def test_an_engine_that_dies_and_must_not_be_replaced_ends_the_server(shop: Shop) -> None:
    async with running(shop, server={"engine_restarts_max": 0}) as rig, rig.client() as client:
        rig.engine.dead = True
        with pytest.raises(UnavailableError) as caught:
            await client.generate("x")
        assert caught.value.code == "ENGINE_UNAVAILABLE"
        with pytest.raises(Exception, match="died"):
            await asyncio.wait_for(rig.app.wait(), 5)
        rig.engine.dead = False


async def test_unknown_methods_and_undecodable_messages_carry_error_info_too(shop: Shop) -> None:
    async with running(shop) as rig, grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.port}") as channel:
        cases = {
            f"/{SERVICES[0]}/Nothing": (b"", "UNIMPLEMENTED"),
            "/other.Service/Method": (b"", "UNIMPLEMENTED"),
            f"/{SERVICES[1]}/GetAdapter": (b"\xff\xff\xff", "INVALID_ARGUMENT"),
            "/grpc.health.v1.Health/Check": (b"\x0a\x04nope", "NOT_FOUND"),
        }
        for method, (body, reason) in cases.items():
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary(method)(body)
            assert reason_of(caught.value) == reason, method


async def test_a_stranger_finds_the_services_by_reflection(shop: Shop) -> None:
    async with running(shop) as rig, grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asks = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[0]),
        ]
        replies = [reply async for reply in stub.ServerReflectionInfo(iter(asks))]
        names = {service.name for service in replies[0].list_services_response.service}
        assert {*SERVICES, "grpc.health.v1.Health"} <= names
        assert replies[1].file_descriptor_response.file_descriptor_proto


async def test_without_a_registry_the_base_serves_and_adapters_are_not_found(shop: Shop) -> None:
    async with running(shop, registry=False) as rig, rig.client() as client:
        await client.generate("x", sampling=FOUR)
        with pytest.raises(AdapterNotFoundError):
            await client.generate("x", adapter="acme/orders")


@pytest.mark.parametrize("handoff", ["sealed", "directory"])
async def test_two_servers_share_a_cache(shop: Shop, handoff: str) -> None:
    shop.publish("acme/orders", tag="prod")
    settings = {"handoff": handoff, "cache_bytes_max": 0}
    async with running(shop, adapters=settings) as one, running(shop, adapters=settings) as other:
        for rig in (one, other):
            async with rig.client() as client:
                await client.generate("x", adapter="acme/orders@prod", sampling=FOUR)
        assert len(list((shop.root / "cache").glob("sha256-*"))) == 1
    assert list((shop.root / "cache").iterdir()) == []


async def test_what_an_earlier_process_left_unfinished_is_removed_at_start(shop: Shop) -> None:
    (shop.root / "cache").mkdir(mode=0o700)
    left = shop.root / "cache" / ".tmp-old"
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"x")
    os.chmod(left, 0o500)
    async with running(shop):
        assert not left.exists()


async def test_a_cache_that_others_may_enter_is_refused_at_start(shop: Shop) -> None:
    (shop.root / "cache").mkdir()
    (shop.root / "cache").chmod(0o755)
    with pytest.raises(ConfigError, match=r"adapters\.cache_dir.*chmod 700"):
        async with running(shop):
            pass


async def test_stopping_lets_running_calls_finish_within_the_drain(shop: Shop) -> None:
    async with running(shop) as rig, rig.client() as client:
        rig.engine.step_s = 0.05
        call = asyncio.create_task(client.generate("x", sampling=FOUR))
        await until(lambda: rig.engine.running == 1)
        await rig.app.stop(drain_s=5)
        assert (await call).usage.completion_tokens == 4


def test_the_cache_is_private(tmp_path: Path, shop: Shop) -> None:
    async def check() -> None:
        async with running(shop):
            assert (shop.root / "cache").stat().st_mode & 0o077 == 0

    asyncio.run(check())


async def test_priorities_order_the_waiting_calls_of_one_tenant(shop: Shop) -> None:
    async with running(shop, model={"batch_requests": 1}) as rig, rig.client() as client:
        rig.engine.may_go_on.clear()

        async def call(priority: int) -> None:
            name = f"p{priority}" if priority else ""
            await client.generate("x", sampling=FOUR, priority=priority, request_id=name)

        first = [asyncio.create_task(call(0)) for _ in range(3)]  # one to decode, two more than that
        await until(lambda: rig.engine.running == 3)
        waiting = [asyncio.create_task(call(priority)) for priority in (-1, 5, 2)]
        await until(lambda: rig.waiting() == 3)
        rig.engine.may_go_on.set()
        await asyncio.gather(*first, *waiting)
        started = [request.request_id.partition("-")[0] for request in rig.engine.requests[3:]]
        assert started == ["p5", "p2", "p"]  # the last is p-1
        with pytest.raises(InvalidRequestError, match="priority"):
            await client.generate("x", sampling=FOUR, priority=101)
