"""What every call passes before and after its method: identity, deadline, errors, one line in the access log.

Promises: a method runs only with a checked principal that has the right to call it; every call has a deadline;
whatever a method raises becomes a status with `google.rpc.ErrorInfo` (unknown methods and undecodable messages too); an
error of ours shows the caller an id, and the log the rest. Health and reflection are open to everybody.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from loraplex_server.errors import ForbiddenError, InvalidRequestError
from loraplex_server.identity.authenticator import Authenticator
from loraplex_server.identity.principals import RIGHTS, Principal, may_call
from loraplex_server.metrics import Metrics
from loraplex_server.status import Failure, failure, failure_of

_log = logging.getLogger(__name__)
_access = logging.getLogger("loraplex.access")

OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call in progress.

    Attributes:
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
    """The call that this task answers."""
    return _CALL.get()


class _Undecodable:
    """Stands for a message that is not of the method's type."""


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every method of our services; see the module's promises."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        metrics: Metrics,
        default_deadline_s: float,
    ) -> None:
        self._authenticator = authenticator
        self._metrics = metrics
        self._default_deadline_s = default_deadline_s

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(details)
        if handler is not None and details.method.startswith(OPEN_SERVICES):
            return handler
        if handler is None:
            return grpc.unary_unary_rpc_method_handler(self._unimplemented(details.method))
        authorization = dict(details.invocation_metadata or ()).get("authorization")
        if handler.unary_stream:
            make, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        return make(
            self._guarded(behaviour, method=details.method, authorization=authorization),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guarded(
        self, behaviour: Callable[..., Awaitable[Any]], *, method: str, authorization: object
    ) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            arrived = time.monotonic()
            call_id = secrets.token_hex(8)
            who, reason = "-", "OK"
            try:
                principal = self._authenticator.principal(
                    authorization if isinstance(authorization, str) else None, context.auth_context()
                )
                who = f"{principal.tenant}/{principal.name}"
                if not may_call(principal, method):
                    raise ForbiddenError(
                        f"a {principal.role} may not {RIGHTS.get(method, 'do this')} adapters"
                    )
                if isinstance(request, _Undecodable):
                    raise InvalidRequestError("message", f"cannot be decoded as the request of {method}")
                deadline = asyncio.get_running_loop().time() + self._budget(context)
                _CALL.set(
                    Call(id=call_id, method=method, principal=principal, arrived=arrived, deadline=deadline)
                )
                return await _by(deadline, behaviour(request, context))
            except asyncio.CancelledError:
                reason = "CANCELLED"
                raise
            except Exception as error:
                failed = self._failed(error, call_id=call_id, method=method)
                reason = failed.reason
                await _abort(context, failed)
            finally:
                self._log_access(method, who, reason, call_id, time.monotonic() - arrived)

        return call

    def _budget(self, context: Any) -> float:
        remaining = context.time_remaining()
        return self._default_deadline_s if remaining is None else min(remaining, 86_400.0)

    def _failed(self, error: Exception, *, call_id: str, method: str) -> Failure:
        failed = failure_of(error, error_id=call_id)
        self._metrics.call_failed(method.rpartition("/")[2], failed.reason)
        if failed.reason == "INTERNAL":
            _log.error("call %s of %s failed", call_id, method, exc_info=error)
        return failed

    def _unimplemented(self, method: str) -> Callable[..., Awaitable[None]]:
        async def call(_request: Any, context: Any) -> None:
            failed = failure("UNIMPLEMENTED", f"this server has no method {method[:200]}")
            self._metrics.call_failed("unknown", failed.reason)
            await _abort(context, failed)

        return call

    @staticmethod
    def _log_access(method: str, who: str, reason: str, call_id: str, seconds: float) -> None:
        _access.info(
            "method=%s who=%s reason=%s call=%s ms=%.1f", method, who, reason, call_id, seconds * 1000
        )


class DeadlineExceededError(Exception):
    """The call's own deadline passed."""

    code = "DEADLINE_EXCEEDED"


async def _by(deadline: float, work: Awaitable[Any]) -> Any:
    """Await work until a moment of the loop's clock."""
    timeout = asyncio.timeout_at(deadline)
    try:
        async with timeout:
            return await work
    except TimeoutError:
        if timeout.expired():
            raise DeadlineExceededError("the deadline of this call passed") from None
        raise


async def abort_with(context: Any, reason: str, message: str) -> NoReturn:
    """End a call with a status of the table in `status`."""
    await _abort(context, failure(reason, message))
    raise AssertionError("abort returned")


async def _abort(context: Any, failed: Failure) -> None:
    trailer = (("grpc-status-details-bin", failed.proto.SerializeToString()),)
    await context.abort(_STATUS_CODES[failed.code], failed.message, trailer)


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Decode, or say so: left to itself gRPC answers an undecodable message with INTERNAL."""

    def attempt(data: bytes) -> Any:
        try:
            return decode(data)
        except Exception:  # protobuf's implementations raise different types here
            return _Undecodable()

    return attempt
