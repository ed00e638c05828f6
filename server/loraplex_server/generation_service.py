"""GenerationService: translate, call, translate back. No policy lives here."""

from typing import Any

from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_protos.v1 import generation_pb2_grpc
from loraplex_server.engine import EngineChunk
from loraplex_server.generation import Ended, Event, Generation, Started
from loraplex_server.requests import parse_generate

_FINISH = {"stop": gpb.FINISH_REASON_STOP, "length": gpb.FINISH_REASON_LENGTH}


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """See generation.proto."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Generate(  # type: ignore[override]  # noqa: N802  (the stubs know only generators)
        self, request: gpb.GenerateRequest, context: Any
    ) -> None:
        """Stream one completion. Written with `context.write`, not yielded: see `generation`."""

        async def send(event: Event) -> None:
            await context.write(_message(event))

        await self._generation.run(
            lambda backend: parse_generate(request, prompt_chars_max=backend.prompt_chars_max), send
        )

    async def Tokenize(self, request: gpb.TokenizeRequest, context: Any) -> gpb.TokenizeResponse:  # noqa: N802
        """The token ids of a prompt."""
        raise NotImplementedError

    async def Embed(self, request: gpb.EmbedRequest, context: Any) -> gpb.EmbedResponse:  # noqa: N802
        """One vector for a prompt."""
        raise NotImplementedError


def _message(event: Event) -> gpb.GenerateResponse:
    if isinstance(event, EngineChunk):
        return gpb.GenerateResponse(delta=gpb.GenerationDelta(text=event.text, token_ids=event.token_ids))
    if isinstance(event, Started):
        return gpb.GenerateResponse(header=gpb.GenerationHeader(**vars(event)))
    return gpb.GenerateResponse(end=_end(event))


def _end(event: Ended) -> gpb.GenerationEnd:
    usage = gpb.Usage(
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        cached_tokens=event.cached_tokens,
    )
    timings = gpb.Timings(adapter_s=event.adapter_s, first_token_s=event.first_token_s, total_s=event.total_s)
    finish = _FINISH.get(event.finish_reason, gpb.FINISH_REASON_UNSPECIFIED)
    return gpb.GenerationEnd(finish_reason=finish, usage=usage, timings=timings)
