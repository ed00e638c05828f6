"""One generation from a checked call to its last token, whatever port it came through.

What the engine says goes into an outbox, from which the caller is sent what it is ready to take: turn and adapter are
given back when the engine has ended, however slowly the caller reads. A call may want several completions: each is a
request of its own at the engine, waits for a turn of its own and is charged to its tenant like any other. Their events
come out in one stream, each with its completion's index. Events are sent by awaiting `send`, so that a cancellation
always arrives in here.
"""

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

from loraplex_server.adapters.versions import AdapterVersion
from loraplex_server.calls.account import Account
from loraplex_server.calls.admission import Admission, Place, encode, together
from loraplex_server.calls.events import Ended, Piece, Send
from loraplex_server.calls.gate import Backend
from loraplex_server.calls.guard import current_call
from loraplex_server.calls.outbox import Outbox, pass_on
from loraplex_server.engine.protocol import Engine, EngineChunk, EngineRequest, Sampling
from loraplex_server.requests.messages import GenerateCall, final_sampling


class Generation:
    """See the module. One per server."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def run(self, parse: Callable[[Backend], GenerateCall], send: Send) -> list[AdapterVersion]:
        """Generate for the current call.

        Args:
            parse: returns the checked request; raises InvalidRequestError.
            send: takes each event, in order.

        Returns:
            Every adapter version that answered; none for the base model.

        Raises:
            ServerError, RegistryError: why not.
        """
        async with self._admission.counted() as account:
            backend = self._admission.backend("generate")
            wanted = parse(backend)
            operation = "text_completion" if wanted.prompt.chat is None else "chat"
            account.asks(operation, wanted.adapter, backend)
            with backend.scheduler.hold(current_call().principal.tenant, wanted.choices):
                prompt_ids, sampling = await _final(backend.engine, wanted)
                account.prompted(len(prompt_ids))
                await self._admission.pick(wanted.adapter, account, session=wanted.session)
                outbox = Outbox()
                answer = _Answer(self._admission, account, wanted, prompt_ids, sampling, outbox)
                work = together([answer.complete(index) for index in range(wanted.choices)])
                await pass_on(outbox, work, send)
                await send(answer.end())
                return list(account.answered.values())


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
        outbox: Outbox,
    ) -> None:
        self._admission, self._account, self._wanted = admission, account, wanted
        self._prompt_ids, self._sampling = prompt_ids, sampling
        self._outbox = outbox
        self._begun = False
        self._counts = [_Counts() for _ in range(wanted.choices)]

    async def complete(self, index: int) -> None:
        """Generate one completion."""
        engine = self._admission.backend("generate").engine
        async with self._admission.place(
            self._account,
            prompt_tokens=len(self._prompt_ids),
            request_id=self._wanted.request_id or "",
            priority=self._wanted.priority,
        ) as place:
            if not self._begun:  # the first completion that has its place says who answers
                self._begun = True
                self._outbox.put(place.started)
            async with aclosing(engine.generate(self._request(index, place))) as chunks:
                async for chunk in chunks:
                    self._count(index, chunk, time.monotonic())
                    place.turn.generated(len(chunk.token_ids))
                    if chunk.token_ids or chunk.text or chunk.finish_reason:
                        self._outbox.put(Piece(index, chunk))

    def end(self) -> Ended:
        """The last event of the call."""
        account, reasons = self._account, tuple(counts.finish for counts in self._counts)
        account.finished(reasons)
        return Ended(
            finish_reasons=reasons,
            prompt_tokens=len(self._prompt_ids),
            completion_tokens=sum(counts.tokens for counts in self._counts),
            cached_tokens=account.cached_tokens,
            adapter_s=account.adapter_s,
            first_token_s=account.first_token_s,
            total_s=account.total_s,
        )

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
        counts, tokens = self._counts[index], len(chunk.token_ids)
        if tokens:
            self._account.tokens(tokens, now, since=counts.last, cached_tokens=chunk.cached_tokens)
            counts.last = now
            counts.tokens += tokens
        counts.finish = chunk.finish_reason or counts.finish


class _Counts:
    """What was generated for one completion."""

    def __init__(self) -> None:
        self.tokens = 0
        self.last = 0.0
        self.finish = ""
