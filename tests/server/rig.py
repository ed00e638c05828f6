"""A running server with the deterministic engine behind it, for tests over loopback."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import CollectorRegistry

from loraplex_client import AsyncClient, Sampling, Tls
from loraplex_server.app import App
from loraplex_server.config import SLOTS, parse_config
from loraplex_server.metrics import OUTCOMES, Metrics
from tests.server.conftest import Shop
from tests.sim.engine import SimEngine

FOUR = Sampling(max_tokens=4, temperature=0)


class Rig:
    """A running server and what is behind it."""

    def __init__(self, shop: Shop, app: App, engines: list[SimEngine], counts: CollectorRegistry) -> None:
        self.shop, self.app, self.engines, self.counts = shop, app, engines, counts

    @property
    def engine(self) -> SimEngine:
        """The engine of now; the ones before it died."""
        return self.engines[-1]

    @asynccontextmanager
    async def client(
        self, api_key: str | None = None, *, tls: Tls | None = None, host: str = "127.0.0.1"
    ) -> AsyncIterator[AsyncClient]:
        target = f"{host}:{self.app.port}"
        async with AsyncClient(target, api_key=api_key, timeout_s=20, tls=tls) as client:
            yield client

    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return self.app._gate.backend.scheduler.waiting

    def outcomes(self) -> dict[str, float]:
        found = dict.fromkeys(OUTCOMES, 0.0)
        for metric in self.counts.collect():
            for sample in metric.samples:
                if sample.name == "loraplex_requests_total":
                    found[sample.labels["outcome"]] += sample.value
        return found

    def accounts_for(self, calls: int) -> bool:
        """Whether the metrics give every one of so many calls exactly one outcome, with none in flight."""
        in_flight = self.counts.get_sample_value("loraplex_requests_in_flight")
        return sum(self.outcomes().values()) == calls and in_flight == 0


@asynccontextmanager
async def running(
    shop: Shop, *, keys: str = "", registry: bool = True, keeps_bytes: bool = False, **sections: Any
) -> AsyncIterator[Rig]:
    document: dict[str, Any] = {
        "model": {"path": "sim", "name": "sim", **sections.get("model", {})},
        "server": {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", **sections.get("server", {})},
        "adapters": {"slots": 2, "cache_dir": "cache", **sections.get("adapters", {})},
        "limits": sections.get("limits", {}),
        "tls": sections.get("tls", {}),
        "rollouts": sections.get("rollouts", {}),
        "tracing": sections.get("tracing", {}),
    }
    if registry:
        document["registry"] = {
            "url": shop.url,
            "policy": "policy.toml",
            "tag_ttl_s": 0,
            **sections.get("registry_section", {}),
        }
    if keys:
        (shop.root / "keys.toml").write_text(keys)
        document["auth"] = {"keys": "keys.toml"}
    config = parse_config(document, origin=shop.root / "server.toml")
    engines: list[SimEngine] = []

    def make_engine() -> SimEngine:
        slots, task = config.adapters.slots or SLOTS, config.model.task
        engines.append(SimEngine(shop.base, slots=slots, task=task, keeps_bytes=keeps_bytes))
        return engines[-1]

    counts = CollectorRegistry()
    app = App(config, make_engine=make_engine, metrics=Metrics(tenants_max=8, registry=counts))
    await app.start()
    try:
        yield Rig(shop, app, engines, counts)
    finally:
        await app.stop(drain_s=0.1)


def reason_of(failed: grpc.RpcError) -> str:
    """The reason of the one ErrorInfo that every status must carry."""
    trailers: Any = failed.trailing_metadata()  # type: ignore[attr-defined]
    status = status_pb2.Status.FromString(dict(trailers)["grpc-status-details-bin"])
    infos = [d for d in status.details if d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert len(infos) == 1
    info = error_details_pb2.ErrorInfo.FromString(infos[0].value)
    assert info.domain == "loraplex"
    return str(info.reason)


async def until(condition: Callable[[], bool]) -> None:
    """Wait, five seconds at most, for something another task will do."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not come true within 5 s")
