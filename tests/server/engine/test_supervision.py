"""When the engine dies: calls end, a fresh one takes its place with the same adapters, and not for ever."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from loraplex_client import AdapterRefusedError, AsyncClient, Sampling, UnavailableError
from loraplex_server import app
from loraplex_server.config import parse_config
from loraplex_server.engine.supervision import Supervisor
from loraplex_server.errors import EngineUnavailableError
from loraplex_server.metrics import Metrics
from tests.server.adapters.test_reconsider import WITH_REVOKERS, revoke
from tests.server.conftest import Shop
from tests.server.rig import FOUR, Rig, running, until
from tests.sim.engine import SimEngine

LONG = Sampling(max_tokens=60, temperature=0)


@asynccontextmanager
async def watched(shop: Shop, **sections: Any) -> AsyncIterator[tuple[Rig, AsyncClient]]:
    """A server that keeps its engine alive, and a client."""
    async with running(shop, **sections) as rig, rig.client() as client:
        watching = asyncio.create_task(rig.app.wait())
        try:
            yield rig, client
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def health(client: AsyncClient) -> int:
    stub: Any = health_pb2_grpc.HealthStub(client._channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest())).status)


async def until_serving(client: AsyncClient) -> None:
    async with asyncio.timeout(5):
        # Asked over the wire, so nothing here could set an event.
        while await health(client) != health_pb2.HealthCheckResponse.SERVING:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_calls_end_unavailable_and_the_same_server_answers_again_with_the_same_adapters(
    shop: Shop,
) -> None:
    for seed, name in enumerate(["acme/orders", "acme/mail"]):
        shop.publish(name, seed=seed)
    async with watched(shop, adapters={"slots": 3}) as (rig, client):
        before = [
            await client.generate("x", adapter=name, sampling=FOUR)
            for name in ("acme/orders", "acme/mail", "")
        ]
        await client.pin_adapter("acme/mail")
        rig.engine.step_s = 0.02
        streams = [
            asyncio.create_task(client.generate("x", adapter=name, sampling=LONG))
            for name in ("acme/orders", "acme/mail", "")
        ]
        await until(lambda: rig.engine.running == 3)
        rig.engine.dead = True
        ended = await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 2)
        assert [getattr(error, "code", None) for error in ended] == ["ENGINE_UNAVAILABLE"] * 3
        await until(lambda: len(rig.engines) == 2 and len(rig.engine.adapters) == 2)
        (shop.root / "registry").rename(shop.root / "gone")  # nothing is fetched
        await until_serving(client)
        assert rig.app.residency.pins == 1
        assert len(rig.engines) == 2
        (shop.root / "gone").rename(shop.root / "registry")
        after = [
            await client.generate("x", adapter=name, sampling=FOUR)
            for name in ("acme/orders", "acme/mail", "")
        ]
        assert [done.token_ids for done in after] == [done.token_ids for done in before]
        assert [done.header.adapter_was_resident for done in after] == [True, True, False]
        await rig.app.residency.check()
        assert rig.counts.get_sample_value("loraplex_engine_restarts_total") == 1


async def test_while_there_is_no_engine_health_says_so_and_calls_are_refused(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start = asyncio.Event()

    async def start_slowly(_: SimEngine) -> None:
        await may_start.wait()

    async with watched(shop) as (rig, client):
        monkeypatch.setattr(SimEngine, "start", start_slowly)
        rig.engine.dead = True
        await until(lambda: len(rig.engines) == 2)
        assert await health(client) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(UnavailableError) as caught:
            await client.generate("x", sampling=FOUR)
        assert caught.value.code == "ENGINE_UNAVAILABLE"
        may_start.set()
        await until_serving(client)
        await client.generate("x", sampling=FOUR)


async def test_an_adapter_that_was_revoked_meanwhile_stays_out(shop: Shop) -> None:
    shop.policy.write_text(WITH_REVOKERS)
    bad, good = shop.publish("acme/orders"), shop.publish("acme/mail", seed=1)
    # Lists are asked for every time, rounds of reconsidering come once a minute.
    settings = {"registry_section": {"revocations_ttl_s": 60.0}}
    async with watched(shop, **settings) as (rig, client):
        for name in ("acme/orders", "acme/mail"):
            await client.generate("x", adapter=name, sampling=FOUR)
        assert rig.app._versions is not None
        rig.app._versions._verifier._refresh_s = 0.0
        revoke(shop, bad.digest)
        rig.engine.dead = True
        await until(lambda: len(rig.engines) == 2 and bool(rig.engine.adapters))
        await until_serving(client)
        assert [adapter.name for adapter in rig.engine.adapters.values()] == [f"acme/mail@{good.digest}"]
        with pytest.raises(AdapterRefusedError):
            await client.generate("x", adapter="acme/orders", sampling=FOUR)


async def test_a_storage_that_hangs_does_not_keep_the_engine_from_coming_back(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(app, "RECONSIDER_S_MAX", 0.05)
    shop.publish("acme/orders")
    async with watched(shop) as (rig, client):
        await client.generate("x", adapter="acme/orders", sampling=FOUR)
        monkeypatch.setattr(rig.app._versions, "reconsider", hangs)
        rig.engine.dead = True
        await until(lambda: len(rig.engines) == 2)
        await until_serving(client)
        assert len(rig.engine.adapters) == 1


async def test_a_server_told_to_stop_while_its_engine_restarts_stops_at_once(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: SimEngine) -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(5):
        async with watched(shop) as (rig, _):
            monkeypatch.setattr(SimEngine, "start", never)
            rig.engine.dead = True
            await until(lambda: len(rig.engines) == 2)


class Deaths:
    """Counts restarts, on a clock that is set by hand."""

    def __init__(self) -> None:
        self.restarts, self.now = 0, 0.0

    def engine_restarted(self) -> None:
        self.restarts += 1


async def test_restarts_are_bounded_within_a_window_and_go_on_after_it(shop: Shop) -> None:
    deaths, engines = Deaths(), list[SimEngine]()

    def make() -> SimEngine:
        engines.append(SimEngine(shop.base, slots=2))
        return engines[-1]

    supervisor = Supervisor(make, restarts_max=2, window_s=60, events=deaths, clock=lambda: deaths.now)

    async def lost(error: EngineUnavailableError) -> None:
        assert "dead" in str(error)

    async def back(engine: Any) -> None:
        assert engine is engines[-1]

    await supervisor.start()
    watching = asyncio.create_task(supervisor.watch(lost, back))
    for number, now in enumerate((0.0, 10.0, 61.0)):  # at 61 the first one is out of the window
        deaths.now = now
        engines[-1].dead = True
        await until(lambda wanted=number + 2: len(engines) == wanted)  # type: ignore[misc]
    engines[-1].dead = True
    with pytest.raises(EngineUnavailableError, match="2 restarts within 60 s"):
        await asyncio.wait_for(watching, 5)
    assert deaths.restarts == 3


async def test_an_engine_that_dies_while_it_comes_back_is_replaced_too(shop: Shop) -> None:
    deaths, engines, told = Deaths(), list[SimEngine](), list[str]()

    def make() -> SimEngine:
        engines.append(SimEngine(shop.base, slots=2))
        return engines[-1]

    async def lost(_: EngineUnavailableError) -> None:
        told.append("lost")

    async def back(_: Any) -> None:
        told.append("back")
        if len(engines) == 2:
            engines[-1].dead = True
            await asyncio.Event().wait()
        told.append("there")

    supervisor = Supervisor(make, restarts_max=5, window_s=60, events=deaths, clock=lambda: 0.0)
    watching = asyncio.create_task(supervisor.watch(lost, back))
    engines[0].dead = True
    await until(lambda: told[-1:] == ["there"])
    assert told == ["lost", "back", "lost", "back", "there"]
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_another_base_model_under_the_same_path_is_not_served(shop: Shop) -> None:
    from dataclasses import replace

    bases = [shop.base, replace(shop.base, digest="sha256:" + "1" * 64)]
    engines: list[SimEngine] = []

    def make() -> SimEngine:
        engines.append(SimEngine(bases[len(engines)], slots=2))
        return engines[-1]

    async def nothing(_: Any) -> None:
        pass

    supervisor = Supervisor(make, restarts_max=5, window_s=60, events=Deaths(), clock=lambda: 0.0)
    engines[0].dead = True
    with pytest.raises(EngineUnavailableError, match="base model"):
        await asyncio.wait_for(supervisor.watch(nothing, nothing), 5)


@pytest.mark.parametrize("moment", ["starting", "restarting", "draining", "died while draining"])
async def test_a_signal_ends_the_server_with_status_0_whatever_it_is_doing(
    shop: Shop, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, may_start = list[SimEngine](), asyncio.Event()
    may_start.set()

    def make(*_: Any, **__: Any) -> SimEngine:
        engines.append(SimEngine(shop.base, slots=2))
        return engines[-1]

    async def start(_: SimEngine) -> None:
        await may_start.wait()

    monkeypatch.setattr(app, "VllmEngine", make)
    monkeypatch.setattr(SimEngine, "start", start)
    monkeypatch.setattr(app, "Metrics", lambda **_: Metrics(tenants_max=1, registry=CollectorRegistry()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = {"listen": f"127.0.0.1:{port}", "metrics_listen": "127.0.0.1:0", "drain_s": 0.3}
    document = {"model": {"path": "sim"}, "server": server, "adapters": {"cache_dir": "cache"}}
    if moment == "starting":
        may_start.clear()
    serving = asyncio.create_task(app.serve(parse_config(document, origin=shop.root / "server.toml")))
    await until(lambda: bool(engines))
    async with AsyncClient(f"127.0.0.1:{port}", timeout_s=10) as client:
        if moment == "starting":
            await asyncio.sleep(0.05)
        else:
            await until_serving(client)
            engines[0].step_s = 0.02
            call = asyncio.create_task(client.generate("x", sampling=LONG))
            await until(lambda: engines[0].running == 1)
        if moment == "restarting":
            may_start.clear()
            engines[0].dead = True
            await until(lambda: len(engines) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        if "draining" in moment:
            await asyncio.sleep(0.05)
            engines[0].dead = moment == "died while draining"
            os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(serving, 5) == 0
        if moment != "starting":
            with pytest.raises(UnavailableError):
                await call
