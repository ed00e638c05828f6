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
from typing import TypeVar

from loraplex_server.errors import ForbiddenError
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.identity.principals import RIGHTS, Principal, may_call
from loraplex_server.metrics import Metrics
from loraplex_server.status import Failure, failure_of

_log = logging.getLogger(__name__)
_access = logging.getLogger("loraplex.access")
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
    """

    id: str
    method: str
    principal: Principal
    arrived: float
    deadline: float


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


class Guard:
    """See the module. One per server, for all its ports."""

    def __init__(self, *, authenticator: Authenticator, metrics: Metrics, default_deadline_s: float) -> None:
        """Guard calls; `default_deadline_s` is for those that bring no deadline."""
        self._authenticator = authenticator
        self._metrics = metrics
        self._default_deadline_s = default_deadline_s

    async def run(
        self,
        work: Callable[[], Awaitable[_T]],
        *,
        method: str,
        authorization: str | None,
        peer: Mapping[str, Iterable[bytes]],
        remaining_s: float | None,
    ) -> _T:
        """Do the work of one call; `current_call` tells it whose it is.

        Args:
            work: what to do.
            method: full name of the RPC.
            authorization: the metadata or header of that name.
            peer: gRPC's authentication context, or what stands for it over HTTP.
            remaining_s: seconds the caller waits; None when it did not say.

        Raises:
            FailedCallError: it was refused or failed.
        """
        arrived, call_id = time.monotonic(), secrets.token_hex(8)
        who, reason = "-", "OK"
        try:
            principal = self._authenticator.principal(authorization, peer)
            who = f"{principal.tenant}/{principal.name}"
            if not may_call(principal, method):
                raise ForbiddenError(f"a {principal.role} may not {RIGHTS.get(method, 'do this')} adapters")
            budget_s = self._default_deadline_s if remaining_s is None else min(remaining_s, DEADLINE_S_MAX)
            deadline = asyncio.get_running_loop().time() + budget_s
            _CALL.set(
                Call(id=call_id, method=method, principal=principal, arrived=arrived, deadline=deadline)
            )
            return await _by(deadline, work())
        except asyncio.CancelledError:
            reason = "CANCELLED"
            raise
        except Exception as error:
            failed = self._failed(error, call_id=call_id, method=method)
            reason = failed.reason
            raise FailedCallError(failed) from error
        finally:
            _access.info(
                "method=%s who=%s reason=%s call=%s ms=%.1f",
                *(method, who, reason, call_id, (time.monotonic() - arrived) * 1000),
            )

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
