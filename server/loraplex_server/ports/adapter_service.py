"""AdapterService: translate, call, translate back. No policy lives here."""

import asyncio
import time
from typing import Any

from loraplex_protos.v1 import adapters_pb2 as apb
from loraplex_protos.v1 import adapters_pb2_grpc
from loraplex_registry.refs import AdapterRef
from loraplex_server.adapters.preflight import FAILED, NOT_MADE, PASSED, Check, forecast
from loraplex_server.adapters.residency import AdapterStatus, State
from loraplex_server.adapters.versions import AdapterVersion, Progress
from loraplex_server.calls.gate import Gate
from loraplex_server.calls.guard import current_call
from loraplex_server.errors import InvalidRequestError
from loraplex_server.identity.principals import may_see
from loraplex_server.requests.messages import parse_ref

PAGE_DEFAULT, PAGE_MAX = 100, 1000
PROGRESS_MESSAGES_MAX = 64  # waiting to be streamed; older byte counts are dropped beyond

_STATES = {
    State.FETCHING: apb.ADAPTER_STATE_FETCHING,
    State.VERIFYING: apb.ADAPTER_STATE_FETCHING,
    State.STAGED: apb.ADAPTER_STATE_STAGED,
    State.LOADING: apb.ADAPTER_STATE_LOADING,
    State.RESIDENT: apb.ADAPTER_STATE_RESIDENT,
    State.DRAINING: apb.ADAPTER_STATE_DRAINING,
}
_CHECK_OUTCOMES = {
    PASSED: apb.CHECK_OUTCOME_PASSED,
    FAILED: apb.CHECK_OUTCOME_FAILED,
    NOT_MADE: apb.CHECK_OUTCOME_NOT_MADE,
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
        """Bring an adapter in, or only into memory, telling each phase."""
        call = current_call()
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[str, int, int] | None] = asyncio.Queue(PROGRESS_MESSAGES_MAX)

        def report(phase: str, done: int, total: int) -> None:
            loop.call_soon_threadsafe(_offer, events, (phase, done, total))

        async def work() -> AdapterStatus:
            try:
                version = await self._resolve(request.adapter, report)
                if request.stage_only:
                    return await self._gate.backend.residency.stage(version, report)
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
        report = await self._gate.examine(parse_ref(request.adapter), current_call().principal)
        backend = self._gate.backend
        need = forecast(backend.residency, report, slot_bytes=backend.slot_bytes)
        reply = apb.ValidateAdapterResponse(
            valid=report.valid,
            checks=map(_check, report.checks),
            forecast=apb.LoadForecast(**vars(need)),
        )
        if report.version is not None:
            status = backend.residency.status(report.version.digest)
            reply.adapter.CopyFrom(_adapter(status) if status else _absent(report.version))
            reply.adapter.rank, reply.adapter.size_bytes = report.rank, report.size_bytes
        return reply

    async def GetRollout(  # noqa: N802
        self, request: apb.GetRolloutRequest, _context: Any
    ) -> apb.GetRolloutResponse:
        """How an adapter's calls are split."""
        return apb.GetRolloutResponse(rollout=await self._rollout(_whole(request.adapter)))

    async def ResumeRollout(  # noqa: N802
        self, request: apb.ResumeRolloutRequest, _context: Any
    ) -> apb.ResumeRolloutResponse:
        """Give a canary its share again."""
        ref = _whole(request.adapter)
        await self._rollout(ref)  # so that what the caller may not see is not there
        self._gate.backend.rollouts.resume(ref)
        return apb.ResumeRolloutResponse(rollout=await self._rollout(ref))

    async def _rollout(self, ref: AdapterRef) -> apb.Rollout:
        principal = current_call().principal
        arms = await self._gate.backend.rollouts.status(ref, lambda one: self._gate.resolve(one, principal))
        return apb.Rollout(adapter=ref.name, arms=(apb.RolloutArm(**vars(arm)) for arm in arms))

    async def _resolve(self, text: str, progress: Progress | None = None) -> AdapterVersion:
        call, ref = current_call(), parse_ref(text)
        call.journey.model = str(ref)
        version = await self._gate.resolve(ref, call.principal, progress)
        call.journey.adapter, call.journey.adapter_digest = version.name, version.digest
        return version


def _check(check: Check) -> apb.AdapterCheck:
    outcome = _CHECK_OUTCOMES[check.outcome]
    return apb.AdapterCheck(name=check.name, outcome=outcome, reason=check.reason, detail=check.detail)


def _whole(text: str) -> AdapterRef:
    """Parse the name of an adapter, which all its versions have."""
    ref = parse_ref(text)
    if text != ref.name:
        raise InvalidRequestError("adapter", "write tenant/adapter, without a tag or version")
    return ref


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
