"""The health service: of the server, its services and adapters, asked once or watched."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex_registry.refs import AdapterRef
from loraplex_server.adapters.residency import State
from loraplex_server.identity.api_keys import make_key
from loraplex_server.ports import health
from loraplex_server.ports.ports import SERVICES
from tests.server.conftest import Shop
from tests.server.rig import FOUR, Rig, reason_of, running, until

Status = health_pb2.HealthCheckResponse
SERVING, NOT_SERVING, UNKNOWN = Status.SERVING, Status.NOT_SERVING, Status.SERVICE_UNKNOWN
ORDERS = "adapter/acme/orders"


class Probe:
    """Asks for health with a credential, or without."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._stub = health_pb2_grpc.HealthStub(channel)
        self._metadata = [("authorization", f"Bearer {key}")] if key else None

    async def check(self, name: str) -> int | str:
        try:
            reply = await self._stub.Check(self._request(name), metadata=self._metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            return reason_of(error)
        return int(reply.status)

    async def list(self) -> dict[str, int]:
        reply = await self._stub.List(health_pb2.HealthListRequest(), metadata=self._metadata, timeout=10)
        return {name: int(one.status) for name, one in reply.statuses.items()}

    def watch(self, name: str) -> Any:
        return self._stub.Watch(self._request(name), metadata=self._metadata)

    def _request(self, name: str) -> health_pb2.HealthCheckRequest:
        return health_pb2.HealthCheckRequest(service=name)


@asynccontextmanager
async def probing(rig: Rig, key: str = "") -> AsyncIterator[Probe]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.port}") as channel:
        yield Probe(channel, key)


async def read(watch: Any) -> int:
    return int((await asyncio.wait_for(watch.read(), 10)).status)


async def test_the_server_and_its_services_are_open_to_everybody(shop: Shop) -> None:
    _, entry = make_key("app", "acme")
    async with running(shop, keys=entry) as rig, probing(rig) as probe:
        for name in ("", *SERVICES):
            assert await probe.check(name) == SERVING
        assert await probe.check("nonsense") == "NOT_FOUND"
        assert await probe.list() == dict.fromkeys(("", *SERVICES), SERVING)


async def test_an_adapter_serves_when_it_is_loaded_and_when_it_could_be(shop: Shop) -> None:
    shop.publish("acme/orders", tag="prod")
    async with running(shop) as rig, rig.client() as client, probing(rig) as probe:
        for name in (ORDERS, f"{ORDERS}@prod"):
            assert await probe.check(name) == SERVING
        await client.generate("x", adapter="acme/orders", sampling=FOUR)
        assert await probe.check(ORDERS) == SERVING
        for name in ("adapter/acme/absent", "adapter/acme", "adapter/", "adapter/../etc", "adapter/a/b/c"):
            assert await probe.check(name) == "NOT_FOUND", name


async def test_an_adapter_whose_signature_does_not_count_is_not_serving(shop: Shop) -> None:
    shop.publish("acme/forged", signer="globex")
    async with running(shop) as rig, probing(rig) as probe:
        assert await probe.check("adapter/acme/forged") == NOT_SERVING


async def test_adapters_exist_only_for_those_who_may_see_them(shop: Shop) -> None:
    shop.publish("acme/orders")
    acme, acme_entry = make_key("app", "acme")
    globex, globex_entry = make_key("app", "globex")
    admin, admin_entry = make_key("ops", "ops", admin=True)
    async with running(shop, keys=acme_entry + globex_entry + admin_entry) as rig:
        answers = {}
        for who, key in (
            ("nobody", ""),
            ("acme", acme),
            ("globex", globex),
            ("admin", admin),
            ("wrong", "lpx_no"),
        ):
            async with probing(rig, key) as probe:
                answers[who] = [await probe.check(name) for name in (ORDERS, "adapter/acme/absent")]
                if who in ("nobody", "globex"):
                    texts = set()
                    for name in (ORDERS, "adapter/acme/absent"):
                        watch = probe.watch(name)
                        texts.add(await read(watch))
                        watch.cancel()
                    assert texts == {UNKNOWN}
        assert answers == {
            "nobody": ["NOT_FOUND"] * 2,
            "acme": [SERVING, "NOT_FOUND"],
            "globex": ["NOT_FOUND"] * 2,
            "admin": [SERVING, "NOT_FOUND"],
            "wrong": ["UNAUTHENTICATED"] * 2,
        }


async def test_while_nothing_can_be_known_adapters_still_do_not_exist_for_others(shop: Shop) -> None:
    shop.publish("acme/orders")
    acme, acme_entry = make_key("app", "acme")
    globex, globex_entry = make_key("app", "globex")
    async with running(shop, keys=acme_entry + globex_entry) as rig:
        rig.app._gate.close()
        async with probing(rig, acme) as ours, probing(rig, globex) as theirs, probing(rig) as nobodys:
            assert await ours.check(ORDERS) == NOT_SERVING
            assert await theirs.check(ORDERS) == await nobodys.check(ORDERS) == "NOT_FOUND"


async def test_a_watch_follows_an_adapter_that_comes_and_is_refused(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WATCH_INTERVAL_S", 0.05)
    async with running(shop) as rig, probing(rig) as probe:
        watch = probe.watch(ORDERS)
        assert await read(watch) == UNKNOWN
        shop.publish("acme/orders", signer="globex")
        assert await read(watch) == NOT_SERVING
        shop.publish("acme/orders", seed=1)
        assert await read(watch) == SERVING
        watch.cancel()


async def test_an_adapter_that_leaves_the_engine_while_it_is_used_is_not_serving(shop: Shop) -> None:
    shop.publish("acme/orders")
    async with running(shop) as rig, rig.client() as client, probing(rig) as probe:
        rig.engine.may_go_on.clear()
        call = asyncio.create_task(client.generate("x", adapter="acme/orders", sampling=FOUR))
        await until(lambda: rig.engine.running == 1)
        version = await rig.app._gate.backend.versions.resolve(AdapterRef.parse("acme/orders"))  # type: ignore[union-attr]
        leaving = asyncio.create_task(rig.app.residency.unload(version.digest))
        await asyncio.sleep(0)
        assert await probe.check(ORDERS) == NOT_SERVING
        rig.engine.may_go_on.set()
        await asyncio.gather(call, leaving)
        assert await probe.check(ORDERS) == SERVING


async def test_an_adapter_that_makes_room_for_another_goes_on_serving(shop: Shop) -> None:
    for adapter in ("acme/orders", "acme/mail", "acme/late"):
        shop.publish(adapter)
    async with running(shop) as rig, rig.client() as client, probing(rig) as probe:
        unload, may_leave = rig.engine.unload, asyncio.Event()

        async def slowly(slot_id: int) -> None:
            await may_leave.wait()
            await unload(slot_id)

        rig.engine.unload = slowly  # type: ignore[method-assign]
        for adapter in ("acme/orders", "acme/mail"):
            await client.generate("x", adapter=adapter, sampling=FOUR)
        late = asyncio.create_task(client.generate("x", adapter="acme/late", sampling=FOUR))
        await until(lambda: any(one.state is State.DRAINING for one in rig.app.residency.statuses()))
        assert await probe.check(ORDERS) == SERVING
        may_leave.set()
        assert (await late).text


async def test_watchers_hear_of_the_drain_before_the_port_refuses_and_are_let_go(shop: Shop) -> None:
    shop.publish("acme/orders")
    async with running(shop) as rig, probing(rig) as probe:
        watches = [probe.watch(name) for name in ("", SERVICES[0], ORDERS, "nonsense")]
        assert [await read(watch) for watch in watches] == [SERVING, SERVING, SERVING, UNKNOWN]
        watchers, left = rig.app._ports.health._watchers, []
        stop = rig.app._ports._grpc.stop

        async def stopping(grace: float) -> None:
            left.append(sum(watchers.values()))
            await stop(grace)

        rig.app._ports._grpc.stop = stopping

        async def heard(watch: Any) -> None:
            assert await read(watch) == NOT_SERVING
            assert await watch.read() is grpc.aio.EOF

        hearing = [asyncio.create_task(heard(watch)) for watch in watches[:3]]
        nonsense = asyncio.create_task(watches[3].read())
        started = asyncio.get_running_loop().time()
        await rig.app.stop(drain_s=30)
        assert asyncio.get_running_loop().time() - started < 10, "watchers do not hold the end up"
        await asyncio.gather(*hearing)
        assert left == [0], "all were told when the port closed"
        assert await nonsense is grpc.aio.EOF


async def test_checks_during_the_drain_say_not_serving(shop: Shop) -> None:
    shop.publish("acme/orders")
    async with running(shop) as rig, probing(rig) as probe:
        await rig.app._ports.health.drain()
        assert [await probe.check(name) for name in ("", SERVICES[1], ORDERS)] == [NOT_SERVING] * 3
        rig.app._ports.health.set_serving(True)
        assert await probe.check("") == NOT_SERVING, "for good"


async def test_a_pause_is_seen_by_watchers_and_ends(shop: Shop) -> None:
    async with running(shop) as rig, probing(rig) as probe:
        watch = probe.watch(SERVICES[0])
        assert await read(watch) == SERVING
        for serving, seen in ((False, NOT_SERVING), (True, SERVING)):
            rig.app._ports.health.set_serving(serving)
            assert await read(watch) == seen
        watch.cancel()


async def test_watchers_are_bounded_and_those_of_adapters_do_not_use_up_those_of_services(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WATCHERS_MAX", 2)
    async with running(shop) as rig, probing(rig) as probe:
        watches = [probe.watch(name) for name in (ORDERS, ORDERS, "", "nonsense")]
        assert [await read(watch) for watch in watches] == [UNKNOWN, UNKNOWN, SERVING, UNKNOWN]
        for name in (ORDERS, ""):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await read(probe.watch(name))
            assert reason_of(refused.value) == "QUEUE_FULL"
        watches[0].cancel()
        watchers = rig.app._ports.health._watchers
        await until(lambda: watchers[True] == 1)
        assert await read(probe.watch(ORDERS)) == UNKNOWN
