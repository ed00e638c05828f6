"""The two gRPC services: translate, call, translate back. No policy lives here.

Handlers write with `context.write` instead of yielding, so that a cancellation always arrives inside them and
what they hold (a place, a lease, the engine's request) is released before the call ends.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from loraplex_protos.v1 import adapters_pb2 as apb
from loraplex_protos.v1 import adapters_pb2_grpc, generation_pb2_grpc
from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_registry.errors import AdapterNotFoundError
from loraplex_registry.refs import AdapterRef
from loraplex_server.admission import Admission
from loraplex_server.auth import Action, Principal, may, may_see
from loraplex_server.engine import Engine, EngineChunk, EngineRequest
from loraplex_server.errors import (
    EngineUnavailableError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
)
from loraplex_server.interceptors import current_call
from loraplex_server.metrics import Metrics
from loraplex_server.requests import (
    GenerateCall,
    Prompt,
    check_token_ids,
    final_sampling,
    parse_generate,
    parse_ref,
)
from loraplex_server.residency import AdapterStatus, Lease, Residency, State
from loraplex_server.versions import AdapterVersion, Progress, Versions

PAGE_DEFAULT, PAGE_MAX = 100, 1000
PROGRESS_MESSAGES_MAX = 64  # waiting to be streamed; older byte counts are dropped beyond

_STATES = {
    State.FETCHING: apb.ADAPTER_STATE_FETCHING,
    State.LOADING: apb.ADAPTER_STATE_LOADING,
    State.RESIDENT: apb.ADAPTER_STATE_RESIDENT,
    State.DRAINING: apb.ADAPTER_STATE_DRAINING,
}
_PHASES = {
    "resolve": apb.LOAD_PHASE_RESOLVE,
    "verify": apb.LOAD_PHASE_VERIFY,
    "fetch": apb.LOAD_PHASE_FETCH,
    "check": apb.LOAD_PHASE_CHECK,
    "load": apb.LOAD_PHASE_LOAD,
}
_FINISH = {"stop": gpb.FINISH_REASON_STOP, "length": gpb.FINISH_REASON_LENGTH}


@dataclass(frozen=True)
class Backend:
    """What the services work with, once the engine is up. `versions` is None without a registry."""

    engine: Engine
    versions: Versions | None
    residency: Residency
    admission: Admission
    model_name: str
    prompt_chars_max: int


class Gate:
    """Holds the backend from the moment it is ready; until then, and after closing, calls are refused."""

    def __init__(self) -> None:
        self._backend: Backend | None = None

    def open(self, backend: Backend) -> None:
        """Let calls through."""
        self._backend = backend

    def close(self) -> None:
        """Refuse calls again."""
        self._backend = None

    @property
    def backend(self) -> Backend:
        """The backend. Raises EngineUnavailableError while there is none."""
        if self._backend is None:
            raise EngineUnavailableError("the server is starting or stopping", retry_after_s=2.0)
        return self._backend

    async def resolve(
        self, ref: AdapterRef, principal: Principal, progress: Progress | None = None
    ) -> AdapterVersion:
        """Resolve a reference for a caller; what it may not see does not exist.

        Raises:
            NotFoundError: unknown, or another tenant's: the same words for both.
        """
        missing = NotFoundError(f"no adapter {ref} here", metadata={"adapter": str(ref)})
        versions = self.backend.versions
        if versions is None or not may_see(principal, ref.tenant):
            raise missing
        try:
            return await versions.resolve(ref, progress)
        except AdapterNotFoundError:
            raise missing from None


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """See generation.proto."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics
        # One tenant's cached prefixes are never looked up for another; new at every start.
        self._salt_key = secrets.token_bytes(32)

    async def Generate(  # type: ignore[override]  # noqa: N802  (the stubs know only generators)
        self, request: gpb.GenerateRequest, context: Any
    ) -> None:
        """Stream one completion."""
        call = current_call()
        async with self._counted() as account:
            backend = self._gate.backend
            wanted = parse_generate(request, prompt_chars_max=backend.prompt_chars_max)
            with backend.admission.admit(call.principal.tenant):
                prompt_ids = await _encode(backend.engine, wanted.prompt)
                sampling = final_sampling(
                    wanted.sampling,
                    prompt_tokens=len(prompt_ids),
                    context_tokens=backend.engine.context_tokens,
                    vocab_size=backend.engine.vocab_size,
                )
                async with self._adapter(wanted, account) as (version, lease):
                    engine_request = EngineRequest(
                        request_id=f"{wanted.request_id or 'request'}-{call.id}",
                        prompt_ids=tuple(prompt_ids),
                        sampling=sampling,
                        adapter=lease.adapter if lease else None,
                        cache_salt=self._salt(account.tenant),
                    )
                    await context.write(_header(backend, wanted, version, lease))
                    await self._stream(engine_request, account, context)

    async def _stream(self, request: EngineRequest, account: "_Account", context: Any) -> None:
        self._metrics.prompt_seen(account.tenant, tokens=len(request.prompt_ids))
        async with aclosing(self._gate.backend.engine.generate(request)) as chunks:
            async for chunk in chunks:
                account.chunk(chunk, time.monotonic())
                if chunk.token_ids or chunk.text:
                    await context.write(_delta(chunk))
        await context.write(account.end(prompt_tokens=len(request.prompt_ids)))

    @asynccontextmanager
    async def _adapter(
        self, wanted: GenerateCall, account: "_Account"
    ) -> AsyncIterator[tuple[AdapterVersion | None, Lease | None]]:
        """Resolve and lease the adapter, or nothing for the base model."""
        if wanted.adapter is None:
            yield None, None
            return
        version = await self._gate.resolve(wanted.adapter, current_call().principal)
        account.tenant = version.tenant
        async with self._gate.backend.residency.lease(version) as lease:
            account.adapter_ready(was_resident=lease.was_resident)
            yield version, lease

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator["_Account"]:
        """Give every call exactly one outcome."""
        call = current_call()
        account = _Account(self._metrics, tenant=call.principal.tenant, arrived=call.arrived)
        self._metrics.request_started()
        outcome = "failed"
        try:
            yield account
            outcome = "completed"
            self._metrics.request_completed(account.tenant, account.total_s)
        except asyncio.CancelledError:
            expired = asyncio.get_running_loop().time() >= call.deadline
            outcome = "expired" if expired else "cancelled"
            raise
        finally:
            self._metrics.request_ended(account.tenant, outcome)

    def _salt(self, tenant: str) -> str:
        return hmac.new(self._salt_key, tenant.encode(), hashlib.sha256).hexdigest()


class _Account:
    """Times and counts of one call; tells the metrics as it goes."""

    def __init__(self, metrics: Metrics, *, tenant: str, arrived: float) -> None:
        self.tenant = tenant
        self._metrics = metrics
        self._arrived = arrived
        self._last = arrived
        self._adapter_s = 0.0
        self._first_token_s = 0.0
        self._tokens = 0
        self._cached_tokens = 0
        self._finish = gpb.FINISH_REASON_UNSPECIFIED

    @property
    def total_s(self) -> float:
        """Seconds from arrival to the last chunk."""
        return self._last - self._arrived

    def adapter_ready(self, *, was_resident: bool) -> None:
        """The adapter is leased."""
        self._adapter_s = time.monotonic() - self._arrived
        self._metrics.adapter_ready(self._adapter_s, was_resident=was_resident)

    def chunk(self, chunk: EngineChunk, now: float) -> None:
        """A chunk came from the engine."""
        count = len(chunk.token_ids)
        if count and not self._tokens:
            self._first_token_s = now - self._arrived
            self._cached_tokens = chunk.cached_tokens
            self._metrics.first_token(self.tenant, self._first_token_s, cached_tokens=chunk.cached_tokens)
        elif count:
            self._metrics.inter_token(self.tenant, now - self._last, tokens=count)
        self._last = now
        self._tokens += count
        self._metrics.tokens_generated(self.tenant, count)
        if chunk.finish_reason:
            self._finish = _FINISH[chunk.finish_reason]

    def end(self, *, prompt_tokens: int) -> gpb.GenerateResponse:
        """The last message of the call."""
        usage = gpb.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._tokens,
            cached_tokens=self._cached_tokens,
        )
        timings = gpb.Timings(
            adapter_s=self._adapter_s, first_token_s=self._first_token_s, total_s=self.total_s
        )
        end = gpb.GenerationEnd(finish_reason=self._finish, usage=usage, timings=timings)
        return gpb.GenerateResponse(end=end)


async def _encode(engine: Engine, prompt: Prompt) -> list[int]:
    if prompt.token_ids is not None:
        check_token_ids(prompt.token_ids, vocab_size=engine.vocab_size)
        return list(prompt.token_ids)
    if prompt.chat is not None:
        return await engine.encode_chat(prompt.chat)
    ids = await engine.encode_text(prompt.text or "")
    if not ids:
        raise InvalidRequestError("text", "has no tokens")
    return ids


def _header(
    backend: Backend, wanted: GenerateCall, version: AdapterVersion | None, lease: Lease | None
) -> gpb.GenerateResponse:
    header = gpb.GenerationHeader(
        request_id=wanted.request_id or current_call().id,
        base_model=backend.model_name,
        base_digest=backend.engine.base.digest,
        adapter=version.name if version else "",
        adapter_digest=version.digest if version else "",
        adapter_was_resident=lease.was_resident if lease else False,
    )
    return gpb.GenerateResponse(header=header)


def _delta(chunk: EngineChunk) -> gpb.GenerateResponse:
    return gpb.GenerateResponse(delta=gpb.GenerationDelta(text=chunk.text, token_ids=chunk.token_ids))


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """See adapters.proto."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def ListAdapters(  # noqa: N802
        self, request: apb.ListAdaptersRequest, _context: Any
    ) -> apb.ListAdaptersResponse:
        """The caller's adapters that are on this server."""
        principal = _allowed(Action.READ)
        if request.page_size > PAGE_MAX:
            raise InvalidRequestError("page_size", f"must be at most {PAGE_MAX}")
        residency = self._gate.backend.residency
        size = request.page_size or PAGE_DEFAULT
        rows = [
            status
            for status in residency.statuses()
            if may_see(principal, status.version.tenant) and status.version.name > request.page_token
        ]
        return apb.ListAdaptersResponse(
            adapters=map(_adapter, rows[:size]),
            next_page_token=rows[size - 1].version.name if len(rows) > size else "",
            slots_total=residency.slots_total,
            slots_used=residency.slots_used,
        )

    async def GetAdapter(  # noqa: N802
        self, request: apb.GetAdapterRequest, _context: Any
    ) -> apb.GetAdapterResponse:
        """One adapter, resident or not."""
        version = await self._resolve(request.adapter, Action.READ)
        status = self._gate.backend.residency.status(version.digest)
        return apb.GetAdapterResponse(adapter=_adapter(status) if status else _absent(version))

    async def LoadAdapter(  # type: ignore[override]  # noqa: N802  (the stubs know only generators)
        self, request: apb.LoadAdapterRequest, context: Any
    ) -> None:
        """Bring an adapter in, telling each phase."""
        call = current_call()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[str, int, int] | None] = asyncio.Queue(PROGRESS_MESSAGES_MAX)

        def report(phase: str, done: int, total: int) -> None:
            loop.call_soon_threadsafe(_offer, events, (phase, done, total))

        async def work() -> AdapterStatus:
            try:
                version = await self._resolve(request.adapter, Action.GENERATE, report)
                async with self._gate.backend.residency.lease(version, report):
                    status = self._gate.backend.residency.status(version.digest)
                    assert status is not None
                    return status
            finally:
                loop.call_soon(_offer, events, None)

        task = asyncio.create_task(work())
        try:
            while (event := await events.get()) is not None:
                phase, done, total = event
                await context.write(
                    apb.LoadAdapterResponse(
                        phase=_PHASES[phase],
                        done_bytes=done,
                        total_bytes=total,
                        elapsed_s=time.monotonic() - call.arrived,
                    )
                )
            ready = _adapter(await task)
        finally:
            task.cancel()
        await context.write(
            apb.LoadAdapterResponse(
                phase=apb.LOAD_PHASE_READY, elapsed_s=time.monotonic() - call.arrived, adapter=ready
            )
        )

    async def UnloadAdapter(  # noqa: N802
        self, request: apb.UnloadAdapterRequest, _context: Any
    ) -> apb.UnloadAdapterResponse:
        """Free an adapter's slot once its requests have ended."""
        version = await self._resolve(request.adapter, Action.MANAGE)
        was_resident = await self._gate.backend.residency.unload(version.digest)
        return apb.UnloadAdapterResponse(was_resident=was_resident)

    async def PinAdapter(  # noqa: N802
        self, request: apb.PinAdapterRequest, _context: Any
    ) -> apb.PinAdapterResponse:
        """Bring an adapter in and keep it."""
        version = await self._resolve(request.adapter, Action.MANAGE)
        return apb.PinAdapterResponse(adapter=_adapter(await self._gate.backend.residency.pin(version)))

    async def UnpinAdapter(  # noqa: N802
        self, request: apb.UnpinAdapterRequest, _context: Any
    ) -> apb.UnpinAdapterResponse:
        """Make an adapter evictable again."""
        version = await self._resolve(request.adapter, Action.MANAGE)
        status = await self._gate.backend.residency.unpin(version.digest)
        return apb.UnpinAdapterResponse(adapter=_adapter(status) if status else _absent(version))

    async def _resolve(self, text: str, action: Action, progress: Progress | None = None) -> AdapterVersion:
        principal = _allowed(action)
        return await self._gate.resolve(parse_ref(text), principal, progress)


def _allowed(action: Action) -> Principal:
    principal = current_call().principal
    if not may(principal, action):
        raise ForbiddenError(f"a {principal.role} key may not {action} adapters")
    return principal


def _offer(events: asyncio.Queue[Any], event: tuple[str, int, int] | None) -> None:
    """Queue an event; when the reader is slow the oldest is dropped, the last is always kept."""
    if events.full():
        events.get_nowait()
    events.put_nowait(event)


def _adapter(status: AdapterStatus) -> apb.Adapter:
    message = _absent(status.version)
    message.state = _STATES[status.state]
    message.rank = status.rank
    message.size_bytes = status.size_bytes
    message.pinned = status.pinned
    message.active_requests = status.active_requests
    return message


def _absent(version: AdapterVersion) -> apb.Adapter:
    return apb.Adapter(
        name=version.name,
        tenant=version.tenant,
        adapter=version.adapter,
        version=version.version,
        digest=version.digest,
        state=apb.ADAPTER_STATE_ABSENT,
    )
