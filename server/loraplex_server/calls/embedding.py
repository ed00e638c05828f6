"""Vectors of prompts, one request at the engine for each: through the same admission as `generation`."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from loraplex_server.calls.account import Account
from loraplex_server.calls.admission import Admission, encode, together
from loraplex_server.calls.events import Started
from loraplex_server.calls.gate import Backend
from loraplex_server.calls.guard import current_call
from loraplex_server.engine.protocol import EngineEmbedRequest
from loraplex_server.errors import ContextTooLongError
from loraplex_server.requests.messages import EmbedCall


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The vectors of a call, in the order of its prompts, each of length 1. Times are seconds since it arrived."""

    started: Started
    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int
    cached_tokens: int
    adapter_s: float
    total_s: float


class Embedding:
    """See the module. One per server."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def run(self, parse: Callable[[Backend], EmbedCall]) -> Embedded:
        """Embed for the current call; arguments and errors as of `Generation.run`."""
        async with self._admission.counted() as account:
            backend = self._admission.backend("embed")
            wanted = parse(backend)
            account.asks("embeddings", wanted.adapter, backend)
            with backend.scheduler.hold(current_call().principal.tenant, len(wanted.prompts)):
                prompts = [await encode(backend.engine, prompt) for prompt in wanted.prompts]
                _check_lengths(prompts, context_tokens=backend.engine.context_tokens)
                account.prompted(sum(map(len, prompts)))
                await self._admission.pick(wanted.adapter, account)
                vectors = _Vectors(self._admission, account, prompts)
                await together([vectors.embed(index) for index in range(len(prompts))])
                account.last = time.monotonic()
                return vectors.all()


def _check_lengths(prompts: list[tuple[int, ...]], *, context_tokens: int) -> None:
    longest = max(map(len, prompts))
    if longest > context_tokens:
        raise ContextTooLongError(
            f"{longest} prompt tokens do not fit the context of {context_tokens}",
            metadata={"prompt_tokens": str(longest), "context_tokens": str(context_tokens)},
        )


class _Vectors:
    """The vectors of one call."""

    def __init__(
        self,
        admission: Admission,
        account: Account,
        prompts: list[tuple[int, ...]],
    ) -> None:
        self._admission, self._account, self._prompts = admission, account, prompts
        self._found: dict[int, tuple[float, ...]] = {}
        self._cached_tokens = 0
        self._started: Started | None = None

    async def embed(self, index: int) -> None:
        """Embed one prompt."""
        engine, prompt_ids = self._admission.backend("embed").engine, self._prompts[index]
        async with self._admission.place(
            self._account, prompt_tokens=len(prompt_ids), request_id=""
        ) as place:
            self._started = self._started or place.started
            request = EngineEmbedRequest(
                request_id=f"embed-{current_call().id}-{index}",
                prompt_ids=prompt_ids,
                adapter=place.adapter,
                cache_salt=self._admission.salt(self._account),
            )
            embedding = await engine.embed(request)
        self._found[index] = embedding.vector
        self._cached_tokens += embedding.cached_tokens

    def all(self) -> Embedded:
        """Everything, once each was embedded."""
        assert self._started is not None, "no prompts"
        return Embedded(
            started=self._started,
            vectors=tuple(self._found[index] for index in range(len(self._prompts))),
            prompt_tokens=sum(map(len, self._prompts)),
            cached_tokens=self._cached_tokens,
            adapter_s=self._account.adapter_s,
            total_s=self._account.total_s,
        )
