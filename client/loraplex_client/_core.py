"""What the sync and the async client share: building requests, reading replies, naming errors. No I/O."""

import json
import random
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from loraplex_client import errors
from loraplex_client.types import (
    AdapterCheck,
    AdapterInfo,
    Candidate,
    ChatMessage,
    Choice,
    Completion,
    ConnectionSettings,
    Delta,
    Embedding,
    Form,
    Grammar,
    Header,
    JsonSchema,
    LoadProgress,
    OneOf,
    Prompt,
    Regex,
    RolloutArm,
    Sampling,
    Timings,
    Tls,
    TokenIds,
    TokenLogprobs,
    Tokens,
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
    "UNSUPPORTED_BY_BASE": errors.UnsupportedByBaseError,
    "REQUEST_ID_REUSED": errors.RequestIdReusedError,
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


RETRY_S = 0.25
"""Seconds before the first retry, at most; twice as long before each further one."""


def new_request_id() -> str:
    """Return an id that no other call has."""
    return secrets.token_hex(16)


def retry_wait_s(
    error: errors.LoraplexError, *, tried: int, retries: int, remaining_s: float
) -> float | None:
    """Say how long to wait before trying a call again, in seconds; None when it is not to be tried again.

    Args:
        error: why it failed.
        tried: tries so far.
        retries: tries allowed after the first.
        remaining_s: what is left of the call's time.
    """
    if not error.retryable or tried > retries:
        return None
    # Random, so that callers who were refused together do not come back together.
    backoff_s = RETRY_S * 2 ** (tried - 1) * (0.5 + random.random() / 2)  # noqa: S311  (no secret)
    wait_s = max(backoff_s, error.retry_after_s or 0.0)
    return wait_s if wait_s < remaining_s else None


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
    with _fitting():
        request = gpb.GenerateRequest(
            adapter=adapter, request_id=request_id, priority=priority, session=session
        )
        _fill_prompt(request, prompt)
        for name, value in vars(sampling).items():
            if name == "form":
                _fill_form(request.sampling.structured_output, value)
            elif isinstance(value, tuple):
                getattr(request.sampling, name).extend(value)
            elif value is not None:
                setattr(request.sampling, name, value)
    return request


def tokenize_request(prompt: str | Iterable[ChatMessage]) -> gpb.TokenizeRequest:
    """Build the wire request; raises as `generate_request`."""
    with _fitting():
        request = gpb.TokenizeRequest()
        _fill_prompt(request, prompt)
    return request


def embed_request(prompt: str | TokenIds, *, adapter: str) -> gpb.EmbedRequest:
    """Build the wire request; raises as `generate_request`."""
    with _fitting():
        request = gpb.EmbedRequest(adapter=adapter)
        _fill_prompt(request, prompt)
    return request


@contextmanager
def _fitting() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        raise errors.InvalidRequestError(
            f"the request cannot be sent: {error}", code="INVALID_ARGUMENT"
        ) from error


def _fill_prompt(request: Any, prompt: Prompt | Iterable[ChatMessage]) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, TokenIds):
        request.token_ids.ids.extend(prompt.ids)
    else:
        request.chat.messages.extend(gpb.ChatMessage(role=m.role, content=m.content) for m in prompt)


def _fill_form(output: gpb.StructuredOutput, form: Form | None) -> None:
    if isinstance(form, JsonSchema):
        output.json_schema = form.schema if isinstance(form.schema, str) else json.dumps(form.schema)
    elif isinstance(form, Regex):
        output.regex = form.pattern
    elif isinstance(form, Grammar):
        output.grammar = form.ebnf
    elif isinstance(form, OneOf):
        output.choice.SetInParent()
        output.choice.texts.extend(form.texts)
    elif form is not None:
        raise TypeError(f"{form!r} is no form of an answer")


class Collector:
    """Reads the messages of one Generate call in order, and puts the completion together."""

    def __init__(self) -> None:
        self.header: Header | None = None
        self.completion: Completion | None = None
        self._deltas: dict[int, list[Delta]] = {}

    def read(self, message: gpb.GenerateResponse) -> Delta | None:
        """Take one message; gives the delta when it is one."""
        event = message.WhichOneof("event")
        if event == "header":
            self.header = header_of(message.header)
        elif event == "end":
            self.completion = self._complete(message.end)
        elif event == "delta":
            delta = _delta_of(message.delta)
            self._deltas.setdefault(delta.index, []).append(delta)
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
        reasons = end.finish_reasons or [end.finish_reason]  # a server of before there were several has one
        choices = tuple(self._choice(index, reason) for index, reason in enumerate(reasons))
        return Completion(
            text=choices[0].text,
            token_ids=choices[0].token_ids,
            finish_reason=choices[0].finish_reason,
            choices=choices,
            usage=_usage_of(end.usage),
            timings=_timings_of(end.timings),
            header=self.header,
        )

    def _choice(self, index: int, reason: gpb.FinishReason.ValueType) -> Choice:
        deltas = self._deltas.get(index, [])
        return Choice(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            finish_reason=_FINISH.get(reason, "unknown"),
            logprobs=tuple(position for delta in deltas for position in delta.logprobs),
        )


def _delta_of(delta: gpb.GenerationDelta) -> Delta:
    logprobs = tuple(
        TokenLogprobs(
            each.text, each.logprob, tuple(Candidate(c.token_id, c.text, c.logprob) for c in each.top)
        )
        for each in delta.logprobs
    )
    return Delta(delta.text, tuple(delta.token_ids), delta.index, logprobs)


def _usage_of(usage: gpb.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _timings_of(timings: gpb.Timings) -> Timings:
    return Timings(adapter_s=timings.adapter_s, first_token_s=timings.first_token_s, total_s=timings.total_s)


def embedding_of(message: gpb.EmbedResponse) -> Embedding:
    """Turn the wire vector into ours."""
    return Embedding(
        vector=tuple(message.embedding),
        usage=_usage_of(message.usage),
        timings=_timings_of(message.timings),
        header=header_of(message.header),
    )


def tokens_of(message: gpb.TokenizeResponse) -> Tokens:
    """Turn the wire tokens into ours."""
    return Tokens(tuple(message.token_ids), message.context_tokens)


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
