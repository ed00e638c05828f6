"""Our server with a second gRPC port that leaves out authentication, admission and metrics, to see what they cost.

`python -m benchmarks.bare_port --config server.toml` is `loraplex serve` in every respect, and prints `bare: PORT`
before its ready line. Behind both ports are the same process, event loop and engine, and the same services; a call on
the bare port has no guard (credential, rights, deadline, access log, trace), no scheduler (bounds, quotas, fairness)
and counts nothing. So rounds on one port and the other, in turn, differ by exactly those. A measuring device: loopback
only.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

from loraplex_server import app
from loraplex_server.calls import guard
from loraplex_server.calls.gate import Gate
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.identity.principals import LOCAL_ADMIN
from loraplex_server.metrics import Metrics
from loraplex_server.observability.journey import Journey
from loraplex_server.ports.ports import Ports
from loraplex_server.scheduling.scheduler import Scheduler

DEADLINE_S = 300.0
_T = TypeVar("_T")


class _Nothing:
    """Stands for metrics, for a turn and for whatever their methods give: takes every call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        setattr(self, name, _nothing)  # found at once from now on: asking must not cost more than doing
        return _nothing


_NOTHING = _Nothing()


def _nothing(*_arguments: Any, **_named: Any) -> _Nothing:
    return _NOTHING


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


class _NoGuard(guard.Guard):
    """Stands for the guard: everybody is the local admin, and nothing is checked or told."""

    def __init__(self) -> None:
        """It needs nothing."""

    async def run(self, work: Callable[[], Awaitable[_T]], *, method: str, **_named: Any) -> _T:
        """See `Guard.run`."""
        call_id, deadline = secrets.token_hex(8), asyncio.get_running_loop().time() + DEADLINE_S
        guard._CALL.set(
            guard.Call(
                id=call_id,
                method=method,
                principal=LOCAL_ADMIN,
                arrived=time.monotonic(),
                deadline=deadline,
                journey=Journey(method=method, call_id=call_id),
            )
        )
        return await work()


class BareApp(app.App):
    """The server, and the bare port beside it."""

    _bare: Ports | None = None

    async def start(self) -> None:
        """See `App.start`."""
        await super().start()
        assert self._backend is not None
        gate = Gate()
        gate.open(replace(self._backend, scheduler=cast(Scheduler, _NoTurns())))
        server = replace(self._config.server, listen="127.0.0.1:0", http_listen="", reflection=False)
        self._bare = Ports(
            replace(self._config, server=server),
            gate=gate,
            guard=_NoGuard(),
            authenticator=Authenticator.from_settings(self._config.auth),
            metrics=cast(Metrics, _NOTHING),
        )
        await self._bare.open()
        print(f"bare: {self._bare.port}", flush=True)

    async def stop(self, *, drain_s: float) -> None:
        """See `App.stop`."""
        if self._bare is not None:
            await self._bare.close(drain_s=0)
        await super().stop(drain_s=drain_s)


if __name__ == "__main__":
    app.App = BareApp  # type: ignore[misc]
    sys.exit(app.main())
