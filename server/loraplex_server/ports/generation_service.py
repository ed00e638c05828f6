"""GenerationService: translate, call, translate back. No policy lives here."""

from typing import Any

from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_protos.v1 import generation_pb2_grpc
from loraplex_server.calls.admission import encode
from loraplex_server.calls.embedding import Embedded, Embedding
from loraplex_server.calls.events import Ended, Event, Started
from loraplex_server.calls.gate import Gate
from loraplex_server.calls.guard import current_call
from loraplex_server.calls.replays import Replays
from loraplex_server.engine.protocol import EngineChunk, TokenLogprobs
from loraplex_server.requests.messages import parse_embed, parse_generate, parse_prompt

_FINISH = {"stop": gpb.FINISH_REASON_STOP, "length": gpb.FINISH_REASON_LENGTH}


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """See generation.proto."""

    def __init__(self, gate: Gate, replays: Replays, embedding: Embedding) -> None:
        self._gate = gate
        self._replays = replays
        self._embedding = embedding

    async def Generate(  # type: ignore[override]  # noqa: N802  (the stubs know only generators)
        self, request: gpb.GenerateRequest, context: Any
    ) -> None:
        """Stream completions. Written with `context.write`, not yielded: see `generation`."""

        async def send(event: Event) -> None:
            message = _message(event)
            if message is not None:
                await context.write(message)

        await self._replays.run(
            request, lambda backend: parse_generate(request, prompt_chars_max=backend.prompt_chars_max), send
        )

    async def Tokenize(  # noqa: N802
        self,
        request: gpb.TokenizeRequest,
        context: Any,  # noqa: ARG002
    ) -> gpb.TokenizeResponse:
        """The token ids of a prompt. Held like a generation for the time that takes, so that quotas bound it."""
        backend = self._gate.backend
        prompt = parse_prompt(request, chars_max=backend.prompt_chars_max)
        with backend.scheduler.hold(current_call().principal.tenant):
            token_ids = await encode(backend.engine, prompt)
        return gpb.TokenizeResponse(token_ids=token_ids, context_tokens=backend.engine.context_tokens)

    async def Embed(  # noqa: N802
        self,
        request: gpb.EmbedRequest,
        context: Any,  # noqa: ARG002
    ) -> gpb.EmbedResponse:
        """One vector for a prompt."""
        return _embedded(
            await self._embedding.run(
                lambda backend: parse_embed([request], prompt_chars_max=backend.prompt_chars_max)
            )
        )


def _message(event: Event) -> gpb.GenerateResponse | None:
    """Return the message of an event; None when it holds nothing that gRPC tells before the end."""
    if isinstance(event, Started):
        return gpb.GenerateResponse(header=_header(event))
    if isinstance(event, Ended):
        return gpb.GenerateResponse(end=_end(event))
    if not event.chunk.token_ids and not event.chunk.text:
        return None
    return gpb.GenerateResponse(delta=_delta(event.index, event.chunk))


def _header(started: Started) -> gpb.GenerationHeader:
    return gpb.GenerationHeader(**vars(started))


def _delta(index: int, chunk: EngineChunk) -> gpb.GenerationDelta:
    return gpb.GenerationDelta(
        text=chunk.text,
        token_ids=chunk.token_ids,
        index=index,
        logprobs=[_logprobs(position) for position in chunk.logprobs],
    )


def _logprobs(position: TokenLogprobs) -> gpb.TokenLogprobs:
    top = [gpb.TopLogprob(token_id=c.token_id, text=c.text, logprob=c.logprob) for c in position.top]
    return gpb.TokenLogprobs(logprob=position.logprob, text=position.text, top=top)


def _end(event: Ended) -> gpb.GenerationEnd:
    usage = gpb.Usage(
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        cached_tokens=event.cached_tokens,
    )
    timings = gpb.Timings(adapter_s=event.adapter_s, first_token_s=event.first_token_s, total_s=event.total_s)
    reasons = [_FINISH.get(reason, gpb.FINISH_REASON_UNSPECIFIED) for reason in event.finish_reasons]
    return gpb.GenerationEnd(finish_reason=reasons[0], usage=usage, timings=timings, finish_reasons=reasons)


def _embedded(embedded: Embedded) -> gpb.EmbedResponse:
    return gpb.EmbedResponse(
        header=_header(embedded.started),
        embedding=embedded.vectors[0],
        usage=gpb.Usage(prompt_tokens=embedded.prompt_tokens, cached_tokens=embedded.cached_tokens),
        timings=gpb.Timings(adapter_s=embedded.adapter_s, total_s=embedded.total_s),
    )
