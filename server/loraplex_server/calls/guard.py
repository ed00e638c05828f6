"""What every call passes before and after its work, over gRPC and over HTTP: one guard for both.

Promises: work runs only for a checked principal that has the right to do it; every call has a deadline; whatever the
work raises becomes one `Failure` with a reason of the table in `status`; an error of ours shows the caller an id, and
the log the rest; every call leaves one line in the access log, which never holds a credential or a prompt.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar

from loraplex_server.calls.status import Failure, failure_of
from loraplex_server.errors import ForbiddenError
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.identity.principals import RIGHTS, Principal, may_call
from loraplex_server.metrics import Metrics
from loraplex_server.observability.access_log import AccessLog
from loraplex_server.observability.journey import Journey, parse_traceparent

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

DEADLINE_S_MAX = 86_400.0
"""Longest time a call may take, whatever its caller allows, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call in progress.

    Attributes:
        method: full name of the RPC, or of the one that an HTTP request stands for.
        arrived: `time.monotonic()` in seconds: uvloop's own clock counts whole milliseconds.
        deadline: of the event loop's clock, in seconds.
        journey: what happens to it, for the access log and for tracing.
    """

    id: str
    method: str
    principal: Principal
    arrived: float
    deadline: float
    journey: Journey


_CALL: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """Return the call that this task answers."""
    return _CALL.get()


class DeadlineExceededError(Exception):
    """The call's own deadline passed."""

    code = "DEADLINE_EXCEEDED"


class FailedCallError(Exception):
    """A call failed; `failure` is what its caller is told."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Recorder(Protocol):
    """Makes traces of journeys; see `tracing`, which is imported only when it is on."""

    def record(self, journey: Journey) -> str:
        """Record a call that has ended; return its trace id."""


class Guard:
    """See the module. One per server, for all its ports."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        metrics: Metrics,
        default_deadline_s: float,
        access_log: AccessLog,
        tracing: Recorder | None = None,
    ) -> None:
        """Guard calls; `default_deadline_s` is for those that bring no deadline."""
        self._authenticator = authenticator
        self._metrics = metrics
        self._default_deadline_s = default_deadline_s
        self._access_log = access_log
        self._tracing = tracing

    async def run(
        self,
        work: Callable[[], Awaitable[_T]],
        *,
        method: str,
        authorization: str | None,
        peer: Mapping[str, Iterable[bytes]],
        remaining_s: float | None,
        traceparent: str | None = None,
    ) -> _T:
        """Do the work of one call; `current_call` tells it whose it is.

        Args:
            work: what to do.
            method: full name of the RPC.
            authorization: the metadata or header of that name.
            peer: gRPC's authentication context, or what stands for it over HTTP.
            remaining_s: seconds the caller waits; None when it did not say.
            traceparent: the metadata or header of that name (W3C Trace Context).

        Raises:
            FailedCallError: it was refused or failed.
        """
        journey = Journey(method=method, call_id=secrets.token_hex(8), parent=parse_traceparent(traceparent))
        try:
            call = self._admit(journey, authorization, peer, remaining_s)
            _CALL.set(call)
            return await _by(call.deadline, work())
        except asyncio.CancelledError:
            journey.reason = "CANCELLED"
            raise
        except Exception as error:
            failed = self._failed(error, call_id=journey.call_id, method=method)
            journey.reason = failed.reason
            raise FailedCallError(failed) from error
        finally:
            journey.ended = time.monotonic()
            self._tell(journey)

    def _admit(
        self,
        journey: Journey,
        authorization: str | None,
        peer: Mapping[str, Iterable[bytes]],
        remaining_s: float | None,
    ) -> Call:
        principal = self._authenticator.principal(authorization, peer)
        journey.who, journey.tenant = f"{principal.tenant}/{principal.name}", principal.tenant
        if not may_call(principal, journey.method):
            raise ForbiddenError(
                f"a {principal.role} may not {RIGHTS.get(journey.method, 'do this')} adapters"
            )
        budget_s = self._default_deadline_s if remaining_s is None else min(remaining_s, DEADLINE_S_MAX)
        return Call(
            id=journey.call_id,
            method=journey.method,
            principal=principal,
            arrived=journey.arrived,
            deadline=asyncio.get_running_loop().time() + budget_s,
            journey=journey,
        )

    def _tell(self, journey: Journey) -> None:
        """Trace and log a call that has ended; what goes wrong here is not the caller's."""
        trace_id = journey.parent.trace_id if journey.parent else ""
        try:
            if self._tracing is not None:
                trace_id = self._tracing.record(journey)
        except Exception:
            _log.exception("call %s could not be traced", journey.call_id)
        self._access_log.write(journey, trace_id=trace_id)

    def _failed(self, error: Exception, *, call_id: str, method: str) -> Failure:
        failed = failure_of(error, error_id=call_id)
        self._metrics.call_failed(method.rpartition("/")[2], failed.reason)
        if failed.reason == "INTERNAL":
            _log.error("call %s of %s failed", call_id, method, exc_info=error)
        return failed


async def _by(deadline: float, work: Awaitable[_T]) -> _T:
    """Await work until a moment of the loop's clock."""
    timeout = asyncio.timeout_at(deadline)
    try:
        async with timeout:
            return await work
    except TimeoutError:
        if timeout.expired():
            raise DeadlineExceededError("the deadline of this call passed") from None
        raise
