"""Two servers that differ by one tenant: in one of them tenant globex exists and acts, in the other it never did.

What tenant acme is told by each is recorded as `Seen`, without what differs from call to call anyway (ids and times).
Both registries hold the same signed records of acme; nothing is shared while the servers run.
"""

import asyncio
import copy
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex_protos.v1 import adapters_pb2 as apb
from loraplex_protos.v1 import adapters_pb2_grpc, generation_pb2_grpc
from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_registry.registry import Registry
from loraplex_registry.storage.store import open_store
from loraplex_server.identity.api_keys import make_key
from tests.server.conftest import Shop
from tests.server.rig import Rig, running

_T = TypeVar("_T")
OWN = ("acme/a0", "acme/a1", "acme/a0@prod")
THEIRS = ("globex/b0", "globex/b0@prod", "globex/b0@1", "globex/b1")
NOBODYS = ("acme/absent", "globex/absent", "nobody/x")
SLOTS = 6  # enough for everybody: how full the engine is, is felt by everybody
_UNIQUE = ("request_id", "adapter_s", "first_token_s", "total_s", "elapsed_s")


@dataclass(frozen=True)
class Seen:
    """What a caller was told: messages, status and every piece of metadata, as text."""

    messages: tuple[str, ...] = ()
    status: str = "OK"
    metadata: tuple[tuple[str, str], ...] = ()


class World:
    """One server with the callers acme (a tenant), globex (a tenant) and an admin."""

    def __init__(self, rig: Rig, keys: dict[str, str], channel: Any) -> None:
        self.rig, self._keys = rig, keys
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        self._adapters: Any = adapters_pb2_grpc.AdapterServiceStub(channel)
        self._health: Any = health_pb2_grpc.HealthStub(channel)

    async def generate(self, who: str, adapter: str, prompt: tuple[int, ...]) -> Seen:
        """Three tokens."""
        request = gpb.GenerateRequest(
            adapter=adapter,
            token_ids=gpb.TokenIds(ids=prompt),
            sampling=gpb.SamplingParams(max_tokens=3, temperature=0),
        )
        return await self._seen(self._generation.Generate(request, **self._as(who)))

    async def load(self, who: str, adapter: str) -> Seen:
        """LoadAdapter; of its phases the last, for how many there are depends on the clock."""
        seen = await self._seen(
            self._adapters.LoadAdapter(apb.LoadAdapterRequest(adapter=adapter), **self._as(who))
        )
        return Seen(seen.messages[-1:], seen.status, seen.metadata)

    async def get(self, who: str, adapter: str) -> Seen:
        """GetAdapter."""
        return await self._seen(
            self._adapters.GetAdapter(apb.GetAdapterRequest(adapter=adapter), **self._as(who))
        )

    async def pin(self, who: str, adapter: str) -> Seen:
        """PinAdapter."""
        return await self._seen(
            self._adapters.PinAdapter(apb.PinAdapterRequest(adapter=adapter), **self._as(who))
        )

    async def unload(self, who: str, adapter: str) -> Seen:
        """UnloadAdapter."""
        return await self._seen(
            self._adapters.UnloadAdapter(apb.UnloadAdapterRequest(adapter=adapter), **self._as(who))
        )

    async def validate(self, who: str, adapter: str) -> Seen:
        """ValidateAdapter."""
        request = apb.ValidateAdapterRequest(adapter=adapter)
        return await self._seen(self._adapters.ValidateAdapter(request, **self._as(who)))

    async def rollout(self, who: str, adapter: str) -> Seen:
        """GetRollout, of the adapter without its tag."""
        request = apb.GetRolloutRequest(adapter=adapter.partition("@")[0])
        return await self._seen(self._adapters.GetRollout(request, **self._as(who)))

    async def embed(self, who: str, adapter: str) -> Seen:
        """Embed, which this base model refuses."""
        request = gpb.EmbedRequest(adapter=adapter, text="x")
        return await self._seen(self._generation.Embed(request, **self._as(who)))

    async def health_of(self, who: str, adapter: str) -> Seen:
        """The health of an adapter."""
        request = health_pb2.HealthCheckRequest(service=f"adapter/{adapter}")
        return await self._seen(self._health.Check(request, **self._as(who)))

    async def list(self, who: str) -> Seen:
        """ListAdapters."""
        return await self._seen(self._adapters.ListAdapters(apb.ListAdaptersRequest(), **self._as(who)))

    async def health(self) -> Seen:
        """The health of everything."""
        return await self._seen(self._health.Check(health_pb2.HealthCheckRequest()))

    def series(self, tenant: str) -> Seen:
        """The metric series that carry a tenant's name, as far as they count and do not measure time."""
        lines = [
            f"{sample.name} {sorted(sample.labels.items())} {sample.value}"
            for metric in self.rig.counts.collect()
            for sample in metric.samples
            if sample.labels.get("tenant") == tenant and sample.name.endswith(("_total", "_count"))
        ]
        return Seen(tuple(sorted(lines)))

    async def reset(self) -> None:
        """Empty the engine and its prefix cache; nothing fails on order any more."""
        self.rig.engine.refuse_names.clear()
        for status in self.rig.app.residency.statuses():
            await self.rig.app.residency.unload(status.version.digest)
        self.rig.engine.prefixes.clear()

    def _as(self, who: str) -> dict[str, Any]:
        return {"metadata": (("authorization", f"Bearer {self._keys[who]}"),), "timeout": 20}

    async def _seen(self, call: Any) -> Seen:
        messages: list[str] = []
        try:
            if hasattr(call, "__aiter__"):
                async for message in call:
                    messages.append(_text(message))
            else:
                messages.append(_text(await call))
        except grpc.aio.AioRpcError as failed:
            return Seen(tuple(messages), failed.code().name, _metadata(failed.trailing_metadata()))
        return Seen(tuple(messages), "OK", _metadata(await call.trailing_metadata()))


class Worlds:
    """Both servers, in an event loop of their own; `shop` is the registry of the second one, where globex is."""

    def __init__(self, shop: Shop, loop: asyncio.AbstractEventLoop, alone: World, shared: World) -> None:
        self.shop, self.alone, self.shared = shop, alone, shared
        self._loop = loop

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Have the event loop do it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def both(self, ask: Callable[[World], Coroutine[Any, Any, Seen]]) -> tuple[Seen, Seen]:
        """Ask both servers the same."""
        return self.run(ask(self.alone)), self.run(ask(self.shared))


@contextmanager
def two_worlds(root: Path) -> Iterator[Worlds]:
    """Publish acme's adapters, copy the registry, add globex's to the copy, and run a server on each."""
    (root / "alone").mkdir()
    alone = Shop(root / "alone")
    for number in range(2):
        alone.publish(f"acme/a{number}", seed=number, tag="prod")
    shutil.copytree(alone.root, root / "shared")
    shared = _moved(alone, root / "shared")
    shared.publish("globex/b0", seed=7, tag="prod")
    keys, entries = {}, ""
    for name, tenant, admin in (("acme", "acme", False), ("globex", "globex", False), ("admin", "ops", True)):
        keys[name], entry = make_key(name, tenant, admin=admin)
        entries += entry
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="two worlds")
    thread.start()
    stack = AsyncExitStack()

    async def start(shop: Shop) -> World:
        rig = await stack.enter_async_context(running(shop, keys=entries, adapters={"slots": SLOTS}))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.port}"))
        return World(rig, keys, channel)

    def wait(work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    try:
        yield Worlds(shared, loop, wait(start(alone)), wait(start(shared)))
    finally:
        wait(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _moved(shop: Shop, root: Path) -> Shop:
    found = copy.copy(shop)
    found.root, found.policy, found.url = root, root / "policy.toml", (root / "registry").as_uri()
    found.registry = Registry(open_store(found.url))
    return found


def _text(message: Any) -> str:
    """A message without what is new in every call."""
    message = copy.deepcopy(message)
    for part in (message, *(getattr(message, name) for name in ("header", "end") if _has(message, name))):
        for name in _UNIQUE:
            if name in part.DESCRIPTOR.fields_by_name:
                part.ClearField(name)
    if _has(message, "end"):
        message.end.ClearField("timings")
    if isinstance(message, apb.ValidateAdapterResponse):
        for check in message.checks:
            if check.name == "clock":  # what the server's clock shows
                check.ClearField("detail")
    return str(message)


def _has(message: Any, name: str) -> bool:
    return name in message.DESCRIPTOR.fields_by_name and bool(message.HasField(name))


def _metadata(pairs: Any) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key, str(status_pb2.Status.FromString(value)) if key.endswith("-bin") else str(value))
        for key, value in pairs or ()
    )
