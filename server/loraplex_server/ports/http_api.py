"""OpenAI-compatible HTTP beside gRPC: `/v1/completions`, `/chat/completions`, `/embeddings`, `/models`, and `/health`.

`model` is an adapter reference, `tenant/adapter[@tag]`, or the base model's name. Requests pass the same guard, the
same scheduler and the same residency as gRPC calls; an API key or a token is the credential that OpenAI clients send.
Every answer names the digests of base and adapter in headers. A header `Idempotency-Key` is the request's id. A caller
that hangs up frees the engine within a step. aiohttp, because it lives in an event loop that others use as well, and
cancels what a lost caller had asked for.
"""

import asyncio
import contextlib
import json
import math
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import web

from loraplex_server.calls.embedding import Embedding
from loraplex_server.calls.events import Ended, Event, Piece, Started
from loraplex_server.calls.gate import Gate
from loraplex_server.calls.guard import FailedCallError, Guard, current_call
from loraplex_server.calls.replays import Replays
from loraplex_server.calls.status import Failure, failure
from loraplex_server.errors import EngineUnavailableError, InvalidRequestError
from loraplex_server.identity.authenticator import ALTERNATIVE_NAMES
from loraplex_server.identity.principals import may_see
from loraplex_server.ports.openai_answers import HTTP_STATUS, Answer, embeddings, error_object
from loraplex_server.ports.openai_wire import (
    OpenAiRequest,
    parse_embeddings,
    parse_idempotency_key,
    parse_json,
    parse_request,
)
from loraplex_server.requests.messages import parse_embed, parse_generate

GENERATE = "/loraplex.v1.GenerationService/Generate"
EMBED = "/loraplex.v1.GenerationService/Embed"
LIST = "/loraplex.v1.AdapterService/ListAdapters"
HEADER_BYTES_MAX = 16 << 10  # of one line of a request's head


class HttpApi:
    """See the module. `start`, then `stop`; in the server's event loop."""

    def __init__(
        self,
        guard: Guard,
        gate: Gate,
        replays: Replays,
        embedding: Embedding,
        *,
        body_bytes_max: int,
        drain_s: float,
    ) -> None:
        """Listen to nothing yet; `drain_s` is given to running requests at the end."""
        self._guard = guard
        self._gate = gate
        self._replays = replays
        self._embedding = embedding
        app = web.Application(client_max_size=body_bytes_max, middlewares=[_plain_errors])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat_completions),
                web.post("/v1/embeddings", self._embeddings),
            ]
        )
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=drain_s,
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
        )
        self.port = 0

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be used.
        """
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls, reuse_port=False)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Take no more requests, give running ones their time, close."""
        await self._runner.cleanup()

    async def _health(self, _request: web.Request) -> web.Response:
        """200 when calls are let through, 503 before and after; open to everybody."""
        try:
            self._gate.backend  # noqa: B018
        except EngineUnavailableError as error:
            return web.json_response({"status": str(error)}, status=503)
        return web.json_response({"status": "ok"})

    async def _models(self, request: web.Request) -> web.Response:
        async def work() -> web.Response:
            backend, principal = self._gate.backend, current_call().principal
            adapters = [
                status.version.name
                for status in backend.residency.statuses()
                if may_see(principal, status.version.tenant)
            ]
            rows = [
                {"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]}
                for name in (backend.model_name, *adapters)
            ]
            return web.json_response({"object": "list", "data": rows})

        try:
            return cast("web.Response", await self._guarded(request, LIST, work))
        except FailedCallError as failed:
            return _refusal(failed)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def _generate(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        writer = _Writer(request)

        async def work() -> web.StreamResponse:
            body = parse_json(await _body(request))
            wanted = parse_request(body, chat=chat, base_model=self._gate.backend.model_name)
            wanted.message.request_id = parse_idempotency_key(request.headers.get("Idempotency-Key"))
            writer.wanted = wanted
            await self._replays.run(
                wanted.message,
                lambda backend: parse_generate(wanted.message, prompt_chars_max=backend.prompt_chars_max),
                writer.send,
            )
            return await writer.finished()

        try:
            return cast("web.StreamResponse", await self._guarded(request, GENERATE, work))
        except FailedCallError as failed:
            return await writer.broken(failed.failure) if writer.begun else _refusal(failed)

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        async def work() -> web.StreamResponse:
            body = parse_json(await _body(request))
            wanted = parse_embeddings(body, base_model=self._gate.backend.model_name)
            embedded = await self._embedding.run(
                lambda backend: parse_embed(wanted.messages, prompt_chars_max=backend.prompt_chars_max)
            )
            return web.json_response(embeddings(wanted, embedded), headers=_headers(embedded.started))

        try:
            return cast("web.StreamResponse", await self._guarded(request, EMBED, work))
        except FailedCallError as failed:
            return _refusal(failed)

    async def _guarded(self, request: web.Request, method: str, work: Callable[[], Awaitable[Any]]) -> Any:
        return await self._guard.run(
            work,
            method=method,
            authorization=request.headers.get("Authorization"),
            peer=_peer(request),
            remaining_s=None,
            traceparent=request.headers.get("traceparent"),
        )


class _Writer:
    """Writes one generation's events as OpenAI's answer, streamed or whole."""

    def __init__(self, request: web.Request) -> None:
        self._http = request
        self._response: web.StreamResponse | None = None
        self._answer: Answer | None = None
        self._headers: dict[str, str] = {}
        self._whole: dict[str, Any] = {}
        self.wanted: OpenAiRequest | None = None

    @property
    def begun(self) -> bool:
        """Whether a part of the answer was sent."""
        return self._response is not None and self._response.prepared

    async def send(self, event: Event) -> None:
        """Take one event of the generation; a caller that is gone is a cancelled call."""
        try:
            await self._send(event)
        except ConnectionError as error:
            raise asyncio.CancelledError from error

    async def _send(self, event: Event) -> None:
        assert self.wanted is not None
        if isinstance(event, Started):
            await self._begin(event, self.wanted)
            return
        assert self._answer is not None
        if isinstance(event, Piece):
            pieces = self._answer.add(event)
            if self.wanted.stream:
                await self._write(*pieces)
        elif self.wanted.stream:
            await self._end(self._answer, event)
        else:
            self._whole = self._answer.whole(event)

    async def finished(self) -> web.StreamResponse:
        """Return the response of a generation that ended well."""
        if self._response is not None:
            return self._response
        return web.json_response(self._whole, headers=self._headers)

    async def broken(self, failed: Failure) -> web.StreamResponse:
        """End a stream that has begun with an error object."""
        assert self._response is not None
        with contextlib.suppress(ConnectionError):
            await self._write(error_object(failed))
            await self._response.write_eof()
        return self._response

    async def _begin(self, started: Started, wanted: OpenAiRequest) -> None:
        self._headers = _headers(started)
        self._answer = Answer(wanted, started, created=int(time.time()))
        if not wanted.stream:
            return
        self._response = web.StreamResponse(
            headers={**self._headers, "Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await self._response.prepare(self._http)

    async def _end(self, answer: Answer, ended: Ended) -> None:
        await self._write(*answer.last(ended))
        assert self._response is not None
        await self._response.write(b"data: [DONE]\n\n")
        await self._response.write_eof()

    async def _write(self, *pieces: dict[str, Any]) -> None:
        assert self._response is not None
        for piece in pieces:
            await self._response.write(b"data: " + json.dumps(piece).encode() + b"\n\n")


def _headers(started: Started) -> dict[str, str]:
    return {
        "x-request-id": current_call().id,
        "x-loraplex-base-digest": started.base_digest,
        "x-loraplex-adapter": started.adapter,
        "x-loraplex-adapter-digest": started.adapter_digest,
        "x-loraplex-adapter-tag": started.adapter_tag,
    }


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise InvalidRequestError("body", "is longer than server.message_mib_max allows") from error


def _peer(request: web.Request) -> dict[str, list[bytes]]:
    """Return the names in a client certificate that TLS has verified, as gRPC tells them."""
    wrapped = request.transport and request.transport.get_extra_info("ssl_object")
    certificate = wrapped.getpeercert() if wrapped else None
    names = certificate.get("subjectAltName", ()) if certificate else ()
    return {ALTERNATIVE_NAMES: [str(name).encode() for _, name in names]} if names else {}


def _refusal(error: FailedCallError) -> web.Response:
    failed, cause = error.failure, error.__cause__
    headers = {}
    retry_after_s = getattr(cause, "retry_after_s", None)
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if failed.reason == "UNAUTHENTICATED":
        headers["WWW-Authenticate"] = "Bearer"
    field = cause.field if isinstance(cause, InvalidRequestError) else None
    return web.json_response(
        error_object(failed, field=field), status=HTTP_STATUS[failed.code], headers=headers
    )


@web.middleware
async def _plain_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give aiohttp's own refusals (no such path, wrong method, too large a body) OpenAI's form."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        reason = "UNIMPLEMENTED" if error.status in (404, 405) else "INVALID_ARGUMENT"
        body = error_object(failure(reason, f"{error.status} {error.reason}"))
        return web.json_response(body, status=error.status)
