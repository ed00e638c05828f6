"""The health service (grpc.health.v1): of the server, of its services, and of adapters.

Names are "", the services, and `adapter/<tenant>/<adapter>[@tag]`. The first two are SERVING from the moment calls are
let through until the server drains. An adapter is SERVING while the version that its name means may be used: it is
verified now, by the trust policy and the revocation list, and it is in the engine or can be brought there; it is
NOT_SERVING while it is refused, cannot be known, or is leaving the engine under calls that still use it, and while the
server is not up.

Everybody may ask for the first two. Adapters exist only for callers that may see them: without a credential, or with
another tenant's, an adapter's name is answered like any other unknown name (NOT_FOUND by Check, SERVICE_UNKNOWN by
Watch); a credential that is wrong is refused.

At most WATCHERS_MAX watch services and as many watch adapters. When the server drains, every watcher is told before
`drain` returns, and its stream ends.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Final

from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex_registry.errors import RegistryError
from loraplex_server.adapters.residency import State
from loraplex_server.calls.gate import Gate
from loraplex_server.errors import (
    EngineUnavailableError,
    NotFoundError,
    RequestError,
    UnauthenticatedError,
)
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.identity.principals import Principal, may_see
from loraplex_server.ports.interceptors import abort_with, text_of
from loraplex_server.requests.messages import parse_ref

WATCHERS_MAX: Final = 128
WATCH_INTERVAL_S: Final = 1.0
"""Seconds after which a watched adapter is looked at again."""

LOOK_S_MAX: Final = 5.0
"""Seconds that looking at an adapter may take; after them it is NOT_SERVING."""

TELL_S_MAX: Final = 1.0
"""Seconds that watchers have to take the last message when the server drains."""

ADAPTER: Final = "adapter/"
_SHOWN_CHARS: Final = 200

SERVING: Final[int] = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final[int] = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN: Final[int] = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """See the module."""

    def __init__(self, gate: Gate, authenticator: Authenticator, services: Sequence[str]) -> None:
        """Begin NOT_SERVING."""
        self._gate = gate
        self._authenticator = authenticator
        self._services = frozenset(("", *services))
        self._status = NOT_SERVING
        self._draining = False
        self._changed = asyncio.Event()  # replaced at each change
        self._watchers = {False: 0, True: 0}  # by whether they watch an adapter
        self._told = asyncio.Event()
        self._told.set()

    def set_serving(self, serving: bool) -> None:
        """Say whether calls are let through from now on; nothing happens when the server drains already."""
        if not self._draining:
            self._turn(SERVING if serving else NOT_SERVING)

    async def drain(self) -> None:
        """Be NOT_SERVING for good; return when watchers know it, or after TELL_S_MAX. Call it before ports close."""
        self._draining = True
        if any(self._watchers.values()):
            self._told.clear()
        self._turn(NOT_SERVING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TELL_S_MAX):
                await self._told.wait()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See grpc.health.v1; an unknown name is NOT_FOUND with our reason."""
        status = await self._look(request.service, context)
        if status == UNKNOWN:
            await abort_with(context, "NOT_FOUND", f"no service {request.service[:_SHOWN_CHARS]!r} here")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        """See grpc.health.v1: the server and its services; adapters are not listed."""
        answer = health_pb2.HealthCheckResponse(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, answer))

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """See grpc.health.v1; the stream ends when the server drains."""
        of_adapter = request.service.startswith(ADAPTER)
        if self._watchers[of_adapter] >= WATCHERS_MAX:
            await abort_with(context, "QUEUE_FULL", f"{WATCHERS_MAX} callers watch already")
        self._watchers[of_adapter] += 1
        try:
            await self._watch(request.service, context, interval_s=WATCH_INTERVAL_S if of_adapter else None)
        finally:
            self._watchers[of_adapter] -= 1
            if not any(self._watchers.values()):
                self._told.set()

    async def _watch(self, name: str, context: Any, *, interval_s: float | None) -> None:
        last = None
        while True:
            changed, is_last = self._changed, self._draining
            status = await self._look(name, context)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
            if is_last:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await changed.wait()

    def _turn(self, status: int) -> None:
        self._status = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _look(self, name: str, context: Any) -> int:
        """Return the status of a name for a caller."""
        if name in self._services:
            return self._status
        if not name.startswith(ADAPTER):
            return UNKNOWN
        principal = await self._principal(context)
        return UNKNOWN if principal is None else await self._adapter(name.removeprefix(ADAPTER), principal)

    async def _principal(self, context: Any) -> Principal | None:
        """Return who asks; None for one that brings nothing. Ends the call of one whose credential is wrong."""
        metadata = dict(context.invocation_metadata() or ())
        try:
            return self._authenticator.principal(text_of(metadata, "authorization"), context.auth_context())
        except UnauthenticatedError as error:
            if "authorization" in metadata:
                await abort_with(context, "UNAUTHENTICATED", str(error))
            return None

    async def _adapter(self, text: str, principal: Principal) -> int:
        try:
            ref = parse_ref(text)
        except RequestError:
            return UNKNOWN
        if not may_see(principal, ref.tenant):
            return UNKNOWN
        try:
            async with asyncio.timeout(LOOK_S_MAX):
                version = await self._gate.resolve(ref, principal)
            found = self._gate.backend.residency.status(version.digest)
        except NotFoundError:
            return UNKNOWN
        except (RegistryError, EngineUnavailableError, TimeoutError):
            return NOT_SERVING
        # One that nobody uses any more may come back at once: that it makes room for others is no fault of it.
        leaving = found is not None and found.state is State.DRAINING and found.active_requests > 0
        return NOT_SERVING if leaving or self._draining else SERVING
