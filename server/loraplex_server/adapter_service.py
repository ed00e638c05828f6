"""AdapterService: translate, call, translate back. No policy lives here."""

import asyncio
import time
from typing import Any

from loraplex_protos.v1 import adapters_pb2 as apb
from loraplex_protos.v1 import adapters_pb2_grpc
from loraplex_server.calls import current_call
from loraplex_server.errors import InvalidRequestError
from loraplex_server.gate import Gate
from loraplex_server.identity.principals import may_see
from loraplex_server.requests import parse_ref
from loraplex_server.residency import AdapterStatus, State
from loraplex_server.versions import AdapterVersion, Progress

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


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """See adapters.proto."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def ListAdapters(  # noqa: N802
        self, request: apb.ListAdaptersRequest, _context: Any
    ) -> apb.ListAdaptersResponse:
        """The caller's adapters that are on this server."""
        principal = current_call().principal
        if request.page_size > PAGE_MAX:
            raise InvalidRequestError("page_size", f"must be at most {PAGE_MAX}")
        residency = self._gate.backend.residency
        size = request.page_size or PAGE_DEFAULT
        seen = [status for status in residency.statuses() if may_see(principal, status.version.tenant)]
        rows = [status for status in seen if status.version.name > request.page_token]
        return apb.ListAdaptersResponse(
            adapters=map(_adapter, rows[:size]),
            next_page_token=rows[size - 1].version.name if len(rows) > size else "",
            slots_total=residency.slots_total,
            slots_used=sum(status.state is not State.FETCHING for status in seen),
        )

    async def GetAdapter(  # noqa: N802
        self, request: apb.GetAdapterRequest, _context: Any
    ) -> apb.GetAdapterResponse:
        """One adapter, resident or not."""
        version = await self._resolve(request.adapter)
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
                version = await self._resolve(request.adapter, report)
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
        version = await self._resolve(request.adapter)
        was_resident = await self._gate.backend.residency.unload(version.digest)
        return apb.UnloadAdapterResponse(was_resident=was_resident)

    async def PinAdapter(  # noqa: N802
        self, request: apb.PinAdapterRequest, _context: Any
    ) -> apb.PinAdapterResponse:
        """Bring an adapter in and keep it."""
        version = await self._resolve(request.adapter)
        return apb.PinAdapterResponse(adapter=_adapter(await self._gate.backend.residency.pin(version)))

    async def UnpinAdapter(  # noqa: N802
        self, request: apb.UnpinAdapterRequest, _context: Any
    ) -> apb.UnpinAdapterResponse:
        """Make an adapter evictable again."""
        version = await self._resolve(request.adapter)
        status = await self._gate.backend.residency.unpin(version.digest)
        return apb.UnpinAdapterResponse(adapter=_adapter(status) if status else _absent(version))

    async def ValidateAdapter(  # noqa: N802
        self, request: apb.ValidateAdapterRequest, _context: Any
    ) -> apb.ValidateAdapterResponse:
        """Every check of a load, without loading."""
        raise NotImplementedError

    async def GetRollout(  # noqa: N802
        self, request: apb.GetRolloutRequest, _context: Any
    ) -> apb.GetRolloutResponse:
        """How an adapter's calls are split."""
        raise NotImplementedError

    async def ResumeRollout(  # noqa: N802
        self, request: apb.ResumeRolloutRequest, _context: Any
    ) -> apb.ResumeRolloutResponse:
        """Give a canary its share again."""
        raise NotImplementedError

    async def _resolve(self, text: str, progress: Progress | None = None) -> AdapterVersion:
        return await self._gate.resolve(parse_ref(text), current_call().principal, progress)


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
