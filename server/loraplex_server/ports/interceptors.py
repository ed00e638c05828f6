"""The guard of `calls` around every gRPC method, and its failures as statuses.

Promises: whatever a method raises becomes a status with `google.rpc.ErrorInfo`, unknown methods and undecodable
messages too. Health and reflection are open to everybody.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc

from loraplex_server.calls.guard import FailedCallError, Guard
from loraplex_server.calls.status import Failure, failure
from loraplex_server.errors import InvalidRequestError
from loraplex_server.metrics import Metrics

OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


class _Undecodable:
    """Stands for a message that is not of the method's type."""


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every method of our services; see the module's promises."""

    def __init__(self, guard: Guard, metrics: Metrics) -> None:
        self._guard = guard
        self._metrics = metrics

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(details)
        if handler is not None and details.method.startswith(OPEN_SERVICES):
            return handler
        if handler is None:
            return grpc.unary_unary_rpc_method_handler(self._unimplemented(details.method))
        metadata = dict(details.invocation_metadata or ())
        if handler.unary_stream:
            make, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        return make(
            self._guarded(behaviour, method=details.method, metadata=metadata),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guarded(
        self, behaviour: Callable[..., Awaitable[Any]], *, method: str, metadata: Mapping[str, object]
    ) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            async def work() -> Any:
                if isinstance(request, _Undecodable):
                    raise InvalidRequestError("message", f"cannot be decoded as the request of {method}")
                return await behaviour(request, context)

            try:
                return await self._guard.run(
                    work,
                    method=method,
                    authorization=text_of(metadata, "authorization"),
                    peer=context.auth_context(),
                    remaining_s=context.time_remaining(),
                    traceparent=text_of(metadata, "traceparent"),
                )
            except FailedCallError as failed:
                await _abort(context, failed.failure)

        return call

    def _unimplemented(self, method: str) -> Callable[..., Awaitable[None]]:
        async def call(_request: Any, context: Any) -> None:
            failed = failure("UNIMPLEMENTED", f"this server has no method {method[:200]}")
            self._metrics.call_failed("unknown", failed.reason)
            await _abort(context, failed)

        return call


def text_of(metadata: Mapping[str, object], name: str) -> str | None:
    """Return a value of a call's metadata; None when it is absent or not text."""
    value = metadata.get(name)
    return value if isinstance(value, str) else None


async def abort_with(context: Any, reason: str, message: str) -> NoReturn:
    """End a call with a status of the table in `status`."""
    await _abort(context, failure(reason, message))
    raise AssertionError("abort returned")


async def _abort(context: Any, failed: Failure) -> None:
    trailer = (("grpc-status-details-bin", failed.proto.SerializeToString()),)
    try:
        await context.abort(_STATUS_CODES[failed.code], failed.message, trailer)
    except grpc.aio.AbortError:
        raise  # how `abort` ends a method
    except Exception as error:
        if failed.reason != "DEADLINE_EXCEEDED":
            raise
        # The caller's own clock was first: gRPC has ended the call, and there is nobody to tell.
        raise asyncio.CancelledError from error


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Decode, or say so: left to itself gRPC answers an undecodable message with INTERNAL."""

    def attempt(data: bytes) -> Any:
        try:
            return decode(data)
        except Exception:  # protobuf's implementations raise different types here
            return _Undecodable()

    return attempt
