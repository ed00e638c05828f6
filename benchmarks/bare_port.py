"""Our server with a second gRPC port that leaves out authentication, admission and metrics, to see what they cost.

`python -m benchmarks.bare_port --config server.toml` is `loraplex serve` in every respect, and prints `bare: PORT`
before its ready line. Behind both ports are the same process, event loop, engine and `Generation`; a call on the bare
port has no guard (credential, rights, deadline, access log), no scheduler (bounds, quotas, fairness) and counts
nothing. So rounds on one port and the other, in turn, differ by exactly those. A measuring device: loopback only.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, cast

import grpc

from loraplex_protos.v1 import generation_pb2, generation_pb2_grpc
from loraplex_server import app, calls
from loraplex_server.gate import Gate
from loraplex_server.generation import Generation
from loraplex_server.generation_service import GenerationService
from loraplex_server.identity.principals import LOCAL_ADMIN
from loraplex_server.metrics import Metrics
from loraplex_server.scheduling.scheduler import Scheduler

DEADLINE_S = 300.0


class _Nothing:
    """Stands for metrics and for a turn: takes every call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        setattr(self, name, _nothing)  # found at once from now on: asking must not cost more than doing
        return _nothing


def _nothing(*_arguments: Any, **_named: Any) -> None:
    return None


_NOTHING = _Nothing()


class _NoTurns:
    """Stands for the scheduler: nobody waits and nobody is refused."""

    @contextmanager
    def hold(self, *_arguments: Any, **_named: Any) -> Iterator[None]:
        """See `Scheduler.hold`."""
        yield

    @asynccontextmanager
    async def turn(self, *_arguments: Any, **_named: Any) -> AsyncIterator[_Nothing]:
        """See `Scheduler.turn`."""
        yield _NOTHING


class _BareService(GenerationService):
    """The method without its guard: everybody is the local admin."""

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> None:
        calls._CALL.set(
            calls.Call(
                id=secrets.token_hex(8),
                method="/loraplex.v1.GenerationService/Generate",
                principal=LOCAL_ADMIN,
                arrived=time.monotonic(),
                deadline=asyncio.get_running_loop().time() + DEADLINE_S,
            )
        )
        await super().Generate(request, context)


class BareApp(app.App):
    """The server, and the bare port beside it."""

    async def start(self) -> None:
        """See `App.start`."""
        await super().start()
        gate = Gate()
        gate.open(replace(self._gate.backend, scheduler=cast(Scheduler, _NoTurns())))
        self._bare = grpc.aio.server()
        service = _BareService(Generation(gate, cast(Metrics, _NOTHING)))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, self._bare)
        port = self._bare.add_insecure_port("127.0.0.1:0")
        await self._bare.start()
        print(f"bare: {port}", flush=True)

    async def stop(self, *, drain_s: float) -> None:
        """See `App.stop`."""
        await self._bare.stop(0)
        await super().stop(drain_s=drain_s)


if __name__ == "__main__":
    app.App = BareApp  # type: ignore[misc]
    sys.exit(app.main())
