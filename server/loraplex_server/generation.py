"""One generation from a checked call to its last token, whatever port it came through.

The order of things: a place is held, the prompt becomes tokens, the adapter's name a verified version, the call waits
for its turn, the adapter is leased, the engine generates. Everything that is held is given back in the opposite order,
also when the call is cancelled: events are sent by awaiting `send`, so that a cancellation always arrives in here.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass

from loraplex_server.calls import current_call
from loraplex_server.engine import Engine, EngineChunk, EngineRequest
from loraplex_server.errors import InvalidRequestError
from loraplex_server.gate import Backend, Gate
from loraplex_server.journey import Journey
from loraplex_server.metrics import CallMetrics, Metrics
from loraplex_server.requests import GenerateCall, Prompt, check_token_ids, final_sampling
from loraplex_server.residency import Lease
from loraplex_server.rollout.rollouts import Pick
from loraplex_server.scheduling.scheduler import Turn
from loraplex_server.versions import AdapterVersion


@dataclass(frozen=True, kw_only=True)
class Started:
    """Who answers: sent first. Names and digests of the adapter are "" for the base model."""

    request_id: str
    base_model: str
    base_digest: str
    adapter: str
    adapter_digest: str
    adapter_was_resident: bool
    adapter_tag: str = ""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How it ended: sent last. Times are seconds since the call arrived."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    adapter_s: float
    first_token_s: float
    total_s: float


Event = Started | EngineChunk | Ended
Send = Callable[[Event], Awaitable[None]]


class Generation:
    """See the module. One per server."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics
        # One tenant's cached prefixes are never looked up for another; new at every start.
        self._salt_key = secrets.token_bytes(32)

    async def run(self, parse: Callable[[Backend], GenerateCall], send: Send) -> None:
        """Generate for the current call.

        Args:
            parse: returns the checked request; raises InvalidRequestError.
            send: takes each event, in order.

        Raises:
            ServerError, RegistryError: why not.
        """
        call = current_call()
        async with self._counted() as account:
            backend = self._gate.backend
            wanted = parse(backend)
            account.asks(wanted, backend)
            with backend.scheduler.hold(call.principal.tenant):
                prompt_ids = await _encode(backend.engine, wanted.prompt)
                sampling = final_sampling(
                    wanted.sampling,
                    prompt_tokens=len(prompt_ids),
                    context_tokens=backend.engine.context_tokens,
                    vocab_size=backend.engine.vocab_size,
                )
                pick = await self._pick(wanted, account)
                call.journey.enter("queue")
                async with (
                    backend.scheduler.turn(
                        account.tenant,
                        adapter=pick.version.digest if pick else "",
                        prompt_tokens=len(prompt_ids),
                        priority=wanted.priority,
                    ) as turn,
                    self._lease(pick, account) as lease,
                ):
                    engine_request = EngineRequest(
                        request_id=f"{wanted.request_id or 'request'}-{call.id}",
                        prompt_ids=tuple(prompt_ids),
                        sampling=sampling,
                        adapter=lease.adapter if lease else None,
                        cache_salt=self._salt(account.tenant),
                    )
                    call.journey.enter("engine")
                    await send(_started(backend, wanted, pick, lease))
                    await self._stream(engine_request, account, turn, send)

    async def _stream(self, request: EngineRequest, account: "_Account", turn: Turn, send: Send) -> None:
        account.prompt_seen(len(request.prompt_ids))
        async with aclosing(self._gate.backend.engine.generate(request)) as chunks:
            async for chunk in chunks:
                account.chunk(chunk, time.monotonic())
                turn.generated(len(chunk.token_ids))
                if chunk.token_ids or chunk.text:
                    await send(chunk)
        await send(account.end(prompt_tokens=len(request.prompt_ids)))

    async def _pick(self, wanted: GenerateCall, account: "_Account") -> Pick | None:
        """Find the adapter's version that answers; None for the base model."""
        if wanted.adapter is None:
            account.serves(None)
            return None
        call = current_call()
        call.journey.enter("resolve")
        pick = await self._gate.backend.rollouts.pick(
            wanted.adapter,
            lambda ref: self._gate.resolve(ref, call.principal, call.journey.progress),
            session=wanted.session or call.id,
        )
        account.pick = pick
        account.serves(pick.version)
        if self._gate.backend.scheduler.full:
            self._gate.backend.residency.prefetch(pick.version)
        return pick

    @asynccontextmanager
    async def _lease(self, pick: Pick | None, account: "_Account") -> AsyncIterator[Lease | None]:
        """Have the adapter in the engine, the stable version for a canary that cannot be; None for the base model."""
        if pick is None:
            yield None
            return
        journey = current_call().journey
        journey.enter("adapter")
        residency = self._gate.backend.residency
        async with AsyncExitStack() as leases:
            while True:
                try:
                    lease = await leases.enter_async_context(residency.lease(pick.version, journey.progress))
                    break
                except Exception as error:
                    if not await pick.instead(error):
                        raise
                    account.serves_instead(pick.version)
            account.adapter_ready(was_resident=lease.was_resident)
            yield lease

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator["_Account"]:
        """Give every call exactly one outcome."""
        call = current_call()
        account = _Account(self._metrics, call.journey)
        self._metrics.request_started()
        outcome = "failed"
        try:
            yield account
            outcome = "completed"
            account.completed()
        except asyncio.CancelledError:
            expired = asyncio.get_running_loop().time() >= call.deadline
            outcome = "expired" if expired else "cancelled"
            if expired and account.pick:
                account.pick.failed(TimeoutError())
            raise
        except Exception as error:
            if account.pick:
                account.pick.failed(error)
            raise
        finally:
            account.ended(outcome)

    def _salt(self, tenant: str) -> str:
        return hmac.new(self._salt_key, tenant.encode(), hashlib.sha256).hexdigest()


class _Account:
    """Times and counts of one call; tells the metrics as it goes, and its journey."""

    def __init__(self, metrics: Metrics, journey: Journey) -> None:
        self.pick: Pick | None = None
        self._metrics = metrics
        self._journey = journey
        self._counted: CallMetrics | None = None
        self._arrived = journey.arrived
        self._last = journey.arrived
        self._adapter_s = 0.0
        self._first_token_s = 0.0
        self._tokens = 0
        self._cached_tokens = 0
        self._finish = ""

    @property
    def tenant(self) -> str:
        """Who is served, and pays."""
        return self._journey.tenant

    @property
    def total_s(self) -> float:
        """Seconds from arrival to the last chunk."""
        return self._last - self._arrived

    def asks(self, wanted: GenerateCall, backend: Backend) -> None:
        """This is what the call wants."""
        journey = self._journey
        journey.operation = "text_completion" if wanted.prompt.chat is None else "chat"
        journey.model = backend.model_name if wanted.adapter is None else str(wanted.adapter)
        journey.base_digest = backend.engine.base.digest

    def serves(self, version: AdapterVersion | None) -> None:
        """This is what answers; None for the base model. From now on everything is counted under its labels."""
        journey, adapter = self._journey, ""
        if version is not None:
            self._metrics.resolved(time.monotonic() - journey.stages[-1][1])
            journey.tenant, adapter = version.tenant, f"{version.tenant}/{version.adapter}"
            self.serves_instead(version)
        self._counted = self._metrics.call(journey.tenant, adapter)

    def serves_instead(self, version: AdapterVersion) -> None:
        """This is the version of the adapter that answers."""
        self._journey.adapter, self._journey.adapter_digest = version.name, version.digest

    def adapter_ready(self, *, was_resident: bool) -> None:
        """The adapter is leased."""
        self._adapter_s = time.monotonic() - self._arrived
        self._metrics.adapter_ready(self._adapter_s, was_resident=was_resident)
        if self._counted is not None:
            self._counted.adapter_ready()

    def prompt_seen(self, tokens: int) -> None:
        """The prompt went to the engine."""
        self._journey.prompt_tokens = tokens
        assert self._counted is not None, "serves() first"
        self._counted.prompt_seen(tokens)

    def chunk(self, chunk: EngineChunk, now: float) -> None:
        """A chunk came from the engine."""
        count = len(chunk.token_ids)
        if count:
            assert self._counted is not None, "serves() first"
            if self._tokens:
                self._counted.more_tokens(now - self._last, count)
            else:
                self._first_token_s = now - self._arrived
                self._cached_tokens = chunk.cached_tokens
                self._journey.first_token = now
                self._counted.first_token(
                    self._first_token_s, tokens=count, cached_tokens=chunk.cached_tokens
                )
        self._last = now
        self._tokens += count
        self._finish = chunk.finish_reason or self._finish

    def completed(self) -> None:
        """The call ended well."""
        if self.pick is not None and self._tokens:
            decode_s = self.total_s - self._first_token_s
            token_s = decode_s / (self._tokens - 1) if self._tokens > 1 else None
            self.pick.completed(first_token_s=self._first_token_s, token_s=token_s)

    def ended(self, outcome: str) -> None:
        """The call ended in one of `metrics.OUTCOMES`."""
        journey = self._journey
        journey.output_tokens, journey.cached_tokens = self._tokens, self._cached_tokens
        journey.finish_reasons = (self._finish,) if self._finish else ()
        self._metrics.request_ended(self._counted, self.tenant, outcome, self.total_s)

    def end(self, *, prompt_tokens: int) -> Ended:
        """The last event of the call."""
        return Ended(
            finish_reason=self._finish,
            prompt_tokens=prompt_tokens,
            completion_tokens=self._tokens,
            cached_tokens=self._cached_tokens,
            adapter_s=self._adapter_s,
            first_token_s=self._first_token_s,
            total_s=self.total_s,
        )


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


def _started(backend: Backend, wanted: GenerateCall, pick: Pick | None, lease: Lease | None) -> Started:
    return Started(
        request_id=wanted.request_id or current_call().id,
        base_model=backend.model_name,
        base_digest=backend.engine.base.digest,
        adapter=pick.version.name if pick else "",
        adapter_digest=pick.version.digest if pick else "",
        adapter_was_resident=lease.was_resident if lease else False,
        adapter_tag=pick.tag if pick else "",
    )
