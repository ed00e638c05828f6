"""What the sync and the async client share: building requests, reading replies, naming errors. No I/O."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from loraplex_client import errors
from loraplex_client.types import (
    AdapterCheck,
    AdapterInfo,
    ChatMessage,
    Completion,
    ConnectionSettings,
    Delta,
    Header,
    LoadProgress,
    Prompt,
    RolloutArm,
    Sampling,
    Timings,
    Tls,
    TokenIds,
    Usage,
    Validation,
)
from loraplex_protos.v1 import adapters_pb2 as apb
from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_protos.v1 import status_pb2

_DETAILS = "grpc-status-details-bin"

_ERROR_OF_REASON: dict[str, type[errors.LoraplexError]] = {
    "INVALID_ARGUMENT": errors.InvalidRequestError,
    "CONTEXT_TOO_LONG": errors.ContextTooLongError,
    "UNAUTHENTICATED": errors.UnauthenticatedError,
    "ADAPTER_NOT_FOUND": errors.AdapterNotFoundError,
    "POLICY_REFUSED": errors.PermissionDeniedError,
    "SIGNATURE_INVALID": errors.AdapterRefusedError,
    "DIGEST_MISMATCH": errors.AdapterRefusedError,
    "BASE_MISMATCH": errors.AdapterRefusedError,
    "UNSUPPORTED_ADAPTER": errors.AdapterRefusedError,
    "RANK_TOO_LARGE": errors.AdapterRefusedError,
    "REVOKED": errors.AdapterRefusedError,
    "EXPIRED": errors.AdapterRefusedError,
    "ROLLBACK": errors.AdapterRefusedError,
    "QUEUE_FULL": errors.OverloadedError,
    "TENANT_QUOTA": errors.OverloadedError,
    "ADAPTER_NOT_READY": errors.UnavailableError,
    "STORE_UNAVAILABLE": errors.UnavailableError,
    "ENGINE_UNAVAILABLE": errors.UnavailableError,
    "DEADLINE_EXCEEDED": errors.DeadlineExceededError,
    "INTERNAL": errors.ServerFaultError,
}
# For statuses that no server of ours made: the network's, a proxy's, gRPC's own.
_ERROR_OF_STATUS: dict[grpc.StatusCode, type[errors.LoraplexError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    # Not the caller's doing: gRPC ends so what reaches a server in the moment it closes its port.
    grpc.StatusCode.CANCELLED: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
}

_FINISH = {gpb.FINISH_REASON_STOP: "stop", gpb.FINISH_REASON_LENGTH: "length"}


def call_metadata(settings: ConnectionSettings) -> tuple[tuple[str, str], ...]:
    """Metadata of every call."""
    pairs = dict(settings.metadata)
    if settings.api_key is not None:
        pairs["authorization"] = f"Bearer {settings.api_key}"
    return tuple(pairs.items())


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Read the files of an encrypted connection.

    Raises:
        OSError: one cannot be read.
    """

    def pem(name: str) -> bytes | None:
        return Path(name).read_bytes() if name else None

    return grpc.ssl_channel_credentials(pem(tls.ca), pem(tls.key), pem(tls.certificate))


def generate_request(
    prompt: Prompt | Iterable[ChatMessage],
    *,
    adapter: str,
    sampling: Sampling,
    request_id: str,
    priority: int = 0,
    session: str = "",
) -> gpb.GenerateRequest:
    """Build the wire request.

    Raises:
        InvalidRequestError: a value that does not even fit its wire type.
    """
    try:
        request = gpb.GenerateRequest(
            adapter=adapter, request_id=request_id, priority=priority, session=session
        )
        if isinstance(prompt, str):
            request.text = prompt
        elif isinstance(prompt, TokenIds):
            request.token_ids.ids.extend(prompt.ids)
        else:
            request.chat.messages.extend(gpb.ChatMessage(role=m.role, content=m.content) for m in prompt)
        for name, value in vars(sampling).items():
            if isinstance(value, tuple):
                getattr(request.sampling, name).extend(value)
            elif value is not None:
                setattr(request.sampling, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise errors.InvalidRequestError(
            f"the request cannot be sent: {error}", code="INVALID_ARGUMENT"
        ) from error
    return request


class Collector:
    """Reads the messages of one Generate call in order, and puts the completion together."""

    def __init__(self) -> None:
        self.header: Header | None = None
        self.completion: Completion | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []

    def read(self, message: gpb.GenerateResponse) -> Delta | None:
        """Take one message; gives the delta when it is one."""
        event = message.WhichOneof("event")
        if event == "header":
            self.header = header_of(message.header)
        elif event == "end":
            self.completion = self._complete(message.end)
        elif event == "delta":
            delta = Delta(text=message.delta.text, token_ids=tuple(message.delta.token_ids))
            self._texts.append(delta.text)
            self._token_ids.extend(delta.token_ids)
            return delta
        return None

    def result(self) -> Completion:
        """The whole answer.

        Raises:
            ServerFaultError: the stream ended well but without its last message.
        """
        if self.completion is None:
            raise errors.ServerFaultError("the server ended the stream before its last message")
        return self.completion

    def _complete(self, end: gpb.GenerationEnd) -> Completion:
        if self.header is None:
            raise errors.ServerFaultError("the server sent the end before the header")
        usage, timings = end.usage, end.timings
        return Completion(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=_FINISH.get(end.finish_reason, "unknown"),
            usage=Usage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
            ),
            timings=Timings(
                adapter_s=timings.adapter_s,
                first_token_s=timings.first_token_s,
                total_s=timings.total_s,
            ),
            header=self.header,
        )


def header_of(header: gpb.GenerationHeader) -> Header:
    """Turn the wire header into ours."""
    return Header(
        request_id=header.request_id,
        base_model=header.base_model,
        base_digest=header.base_digest,
        adapter=header.adapter,
        adapter_digest=header.adapter_digest,
        adapter_was_resident=header.adapter_was_resident,
        adapter_tag=header.adapter_tag,
    )


def adapter_of(message: apb.Adapter) -> AdapterInfo:
    """Turn the wire adapter into ours."""
    return AdapterInfo(
        name=message.name,
        tenant=message.tenant,
        adapter=message.adapter,
        version=message.version,
        digest=message.digest,
        state=_short(apb.AdapterState.Name(message.state), "ADAPTER_STATE_"),
        rank=message.rank,
        size_bytes=message.size_bytes,
        pinned=message.pinned,
        active_requests=message.active_requests,
    )


def arms_of(message: apb.Rollout) -> tuple[RolloutArm, ...]:
    """Turn the wire rollout's arms into ours."""
    return tuple(
        RolloutArm(**{item.name: getattr(arm, item.name) for item in fields(RolloutArm)})
        for arm in message.arms
    )


def validation_of(message: apb.ValidateAdapterResponse) -> Validation:
    """Turn the wire report into ours."""
    forecast = message.forecast
    return Validation(
        valid=message.valid,
        checks=tuple(
            AdapterCheck(
                name=check.name,
                outcome=_short(apb.CheckOutcome.Name(check.outcome), "CHECK_OUTCOME_"),
                reason=check.reason,
                detail=check.detail,
            )
            for check in message.checks
        ),
        adapter=adapter_of(message.adapter) if message.HasField("adapter") else None,
        staged_bytes=forecast.staged_bytes,
        slot_bytes=forecast.slot_bytes,
        slot_at_once=forecast.slot_at_once,
        evicts=forecast.evicts,
    )


def progress_of(message: apb.LoadAdapterResponse) -> LoadProgress:
    """Turn one message of LoadAdapter into ours."""
    return LoadProgress(
        phase=_short(apb.LoadPhase.Name(message.phase), "LOAD_PHASE_"),
        done_bytes=message.done_bytes,
        total_bytes=message.total_bytes,
        elapsed_s=message.elapsed_s,
        adapter=adapter_of(message.adapter) if message.HasField("adapter") else None,
    )


def _short(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()


def error_of(failed: Any) -> errors.LoraplexError:
    """Name the error of a failed call: by the server's ErrorInfo, else by the status alone.

    Args:
        failed: a `grpc.RpcError` of a sync call or a `grpc.aio.AioRpcError`.
    """
    details = _status_details(failed.trailing_metadata())
    info, retry, fields = status_pb2.ErrorDetail(), None, []
    for detail in details.details:
        kind = detail.type_url.rpartition("/")[2]
        if kind == "google.rpc.ErrorInfo":
            info = status_pb2.ErrorDetail.FromString(detail.value)
        elif kind == "google.rpc.RetryInfo":
            delay = status_pb2.RetryDetail.FromString(detail.value).retry_delay
            retry = delay.seconds + delay.nanos / 1e9
        elif kind == "google.rpc.BadRequest":
            violations = status_pb2.FieldDetail.FromString(detail.value).violations
            fields = [(violation.field, violation.description) for violation in violations]
    by_status = _ERROR_OF_STATUS.get(failed.code(), errors.ServerFaultError)
    kind_of_error = _ERROR_OF_REASON.get(info.reason, by_status)
    return kind_of_error(
        failed.details() or failed.code().name,
        code=info.reason,
        retry_after_s=retry,
        metadata=info.metadata,
        fields=tuple(fields),
    )


def _status_details(trailers: Any) -> status_pb2.StatusDetails:
    for key, value in trailers or ():
        if key == _DETAILS:
            try:
                return status_pb2.StatusDetails.FromString(value)
            except DecodeError:
                break
    return status_pb2.StatusDetails()


# grpc.health.v1 without its package: an empty HealthCheckRequest is no bytes at all, and a
# HealthCheckResponse with status = SERVING is field 1, varint 1.
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_SERVING = b"\x08\x01"
