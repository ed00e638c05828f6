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
from loraplex_server.metrics import Metrics
from loraplex_server.requests import GenerateCall, Prompt, check_token_ids, final_sampling
from loraplex_server.residency import Lease
from loraplex_server.rollout.rollouts import Pick
from loraplex_server.scheduling.scheduler import Turn


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
            with backend.scheduler.hold(call.principal.tenant):
                prompt_ids = await _encode(backend.engine, wanted.prompt)
                sampling = final_sampling(
                    wanted.sampling,
                    prompt_tokens=len(prompt_ids),
                    context_tokens=backend.engine.context_tokens,
                    vocab_size=backend.engine.vocab_size,
                )
                pick = await self._pick(wanted, account)
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
                    await send(_started(backend, wanted, pick, lease))
                    await self._stream(engine_request, account, turn, send)

    async def _stream(self, request: EngineRequest, account: "_Account", turn: Turn, send: Send) -> None:
        self._metrics.prompt_seen(account.tenant, tokens=len(request.prompt_ids))
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
            return None
        call = current_call()
        pick = await self._gate.backend.rollouts.pick(
            wanted.adapter,
            lambda ref: self._gate.resolve(ref, call.principal),
            session=wanted.session or call.id,
        )
        account.tenant, account.pick = pick.version.tenant, pick
        if self._gate.backend.scheduler.full:
            self._gate.backend.residency.prefetch(pick.version)
        return pick

    @asynccontextmanager
    async def _lease(self, pick: Pick | None, account: "_Account") -> AsyncIterator[Lease | None]:
        """Have the adapter in the engine, the stable version for a canary that cannot be; None for the base model."""
        if pick is None:
            yield None
            return
        async with AsyncExitStack() as leases:
            while True:
                try:
                    lease = await leases.enter_async_context(self._gate.backend.residency.lease(pick.version))
                    break
                except Exception as error:
                    if not await pick.instead(error):
                        raise
            account.adapter_ready(was_resident=lease.was_resident)
            yield lease

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
            self._metrics.request_ended(account.tenant, outcome)

    def _salt(self, tenant: str) -> str:
        return hmac.new(self._salt_key, tenant.encode(), hashlib.sha256).hexdigest()


class _Account:
    """Times and counts of one call; tells the metrics as it goes."""

    def __init__(self, metrics: Metrics, *, tenant: str, arrived: float) -> None:
        self.tenant = tenant
        self.pick: Pick | None = None
        self._metrics = metrics
        self._arrived = arrived
        self._last = arrived
        self._adapter_s = 0.0
        self._first_token_s = 0.0
        self._tokens = 0
        self._cached_tokens = 0
        self._finish = ""

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
        self._finish = chunk.finish_reason or self._finish

    def completed(self) -> None:
        """The call ended well."""
        self._metrics.request_completed(self.tenant, self.total_s)
        if self.pick is not None and self._tokens:
            decode_s = self.total_s - self._first_token_s
            token_s = decode_s / (self._tokens - 1) if self._tokens > 1 else None
            self.pick.completed(first_token_s=self._first_token_s, token_s=token_s)

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
