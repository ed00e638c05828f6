"""One generation from a checked call to its last token, whatever port it came through.

A call may want several completions: each is a request of its own at the engine, waits for a turn of its own and is
charged to its tenant like any other. Their events come out in one stream, each with its completion's index. Events are
sent by awaiting `send`, so that a cancellation always arrives in here.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from loraplex_server.admission import Account, Admission, Place, Started, encode, together
from loraplex_server.calls import current_call
from loraplex_server.engine import Engine, EngineChunk, EngineRequest, Sampling
from loraplex_server.gate import Backend
from loraplex_server.requests import GenerateCall, final_sampling
from loraplex_server.versions import AdapterVersion


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one completion, or its end."""

    index: int
    chunk: EngineChunk


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How it ended: sent last. Times are seconds since the call arrived.

    Attributes:
        finish_reasons: of each completion, "stop" or "length".
    """

    finish_reasons: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    adapter_s: float
    first_token_s: float
    total_s: float


Event = Started | Piece | Ended
Send = Callable[[Event], Awaitable[None]]
"""Takes each event of a call, in order; awaited, so that a slow reader slows its own call down and no other."""


class Generation:
    """See the module. One per server."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def run(self, parse: Callable[[Backend], GenerateCall], send: Send) -> None:
        """Generate for the current call.

        Args:
            parse: returns the checked request; raises InvalidRequestError.
            send: takes each event, in order.

        Raises:
            ServerError, RegistryError: why not.
        """
        async with self._admission.counted() as account:
            backend = self._admission.backend("generate")
            wanted = parse(backend)
            with backend.scheduler.hold(current_call().principal.tenant, wanted.choices):
                prompt_ids, sampling = await _final(backend.engine, wanted)
                version = await self._admission.version(wanted.adapter, account)
                answer = _Answer(self._admission, account, wanted, prompt_ids, sampling, version, send)
                await together([answer.complete(index) for index in range(wanted.choices)])
                await send(answer.end())


async def _final(engine: Engine, wanted: GenerateCall) -> tuple[tuple[int, ...], Sampling]:
    """Return the prompt's tokens and the parameters in the engine's ranges."""
    if wanted.form is not None:
        await engine.check_form(wanted.form, tenant=current_call().principal.tenant)
    prompt_ids = await encode(engine, wanted.prompt)
    sampling = final_sampling(
        wanted.sampling,
        prompt_tokens=len(prompt_ids),
        context_tokens=engine.context_tokens,
        vocab_size=engine.vocab_size,
        form=wanted.form,
    )
    return prompt_ids, sampling


class _Answer:
    """The completions of one call."""

    def __init__(
        self,
        admission: Admission,
        account: Account,
        wanted: GenerateCall,
        prompt_ids: tuple[int, ...],
        sampling: Sampling,
        version: AdapterVersion | None,
        send: Send,
    ) -> None:
        self._admission, self._account, self._wanted = admission, account, wanted
        self._prompt_ids, self._sampling, self._version = prompt_ids, sampling, version
        self._send = send
        self._sending = asyncio.Lock()  # one event at a time, whichever completion it is of
        self._begun = False
        self._counts = [_Counts() for _ in range(wanted.choices)]
        self._first_token_s = 0.0
        self._cached_tokens = 0

    async def complete(self, index: int) -> None:
        """Generate one completion."""
        engine = self._admission.backend("generate").engine
        async with self._admission.place(
            self._account,
            self._version,
            prompt_tokens=len(self._prompt_ids),
            request_id=self._wanted.request_id or "",
            priority=self._wanted.priority,
        ) as place:
            await self._begin(place)
            async with aclosing(engine.generate(self._request(index, place))) as chunks:
                async for chunk in chunks:
                    self._count(index, chunk, time.monotonic())
                    place.turn.generated(len(chunk.token_ids))
                    if chunk.token_ids or chunk.text or chunk.finish_reason:
                        async with self._sending:
                            await self._send(Piece(index, chunk))

    def end(self) -> Ended:
        """The last event of the call."""
        return Ended(
            finish_reasons=tuple(counts.finish for counts in self._counts),
            prompt_tokens=len(self._prompt_ids),
            completion_tokens=sum(counts.tokens for counts in self._counts),
            cached_tokens=self._cached_tokens,
            adapter_s=self._account.adapter_s,
            first_token_s=self._first_token_s,
            total_s=self._account.total_s,
        )

    async def _begin(self, place: Place) -> None:
        """Say who answers, when the first completion has its place."""
        async with self._sending:
            if not self._begun:
                self._begun = True
                await self._send(place.started)

    def _request(self, index: int, place: Place) -> EngineRequest:
        seed = self._sampling.seed
        return EngineRequest(
            request_id=f"{self._wanted.request_id or 'request'}-{current_call().id}-{index}",
            prompt_ids=self._prompt_ids,
            # Each draws for itself, and as a call of its own with that seed would.
            sampling=self._sampling if seed is None else replace(self._sampling, seed=seed + index),
            adapter=place.adapter,
            cache_salt=self._admission.salt(self._account),
        )

    def _count(self, index: int, chunk: EngineChunk, now: float) -> None:
        """A chunk came from the engine."""
        account, counts, tokens = self._account, self._counts[index], len(chunk.token_ids)
        if tokens and not any(each.tokens for each in self._counts):
            self._first_token_s = now - account.arrived
            self._cached_tokens = chunk.cached_tokens
            account.metrics.first_token(
                account.tenant, self._first_token_s, cached_tokens=chunk.cached_tokens
            )
        elif tokens and counts.tokens:
            account.metrics.inter_token(account.tenant, now - counts.last, tokens=tokens)
        account.last = counts.last = now
        counts.tokens += tokens
        account.metrics.tokens_generated(account.tenant, tokens)
        counts.finish = chunk.finish_reason or counts.finish


class _Counts:
    """What was generated for one completion."""

    def __init__(self) -> None:
        self.tokens = 0
        self.last = 0.0
        self.finish = ""
