"""A deterministic engine with the server's own protocol, for schedules the real one is too slow for.

Its tokens follow from (adapter name, prompt, position), and from the seed where sampling is not greedy, so a test can
tell who really answered. Of structured output it writes choices, and empty objects for the schema of any object; it
refuses every other form. Its log-probabilities are made up, in the order that real ones have. It can be told to be
slow, to refuse, hang or lie about a load, and to die. Never shipped; the promises it helps to test are tested on the
real engine too, in tests/e2e.
"""

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator

from loraplex_registry.errors import UnsupportedAdapterError
from loraplex_registry.validation.base import BaseModel
from loraplex_server.engine.protocol import (
    Candidate,
    ChatTurn,
    EngineAdapter,
    EngineChunk,
    EngineEmbedding,
    EngineEmbedRequest,
    EngineRequest,
    Form,
    Sampling,
    TokenLogprobs,
)
from loraplex_server.errors import EngineUnavailableError, InvalidRequestError

VOCAB = 1000
BLOCK_TOKENS = 4  # of a prompt, kept in the prefix cache together
DIMENSIONS = 8
COPY_BYTES = 10  # of an adapter that an engine with `keeps_bytes` holds
ANY_OBJECT = '{"type":"object"}'


def answer(adapter_name: str, prompt_ids: tuple[int, ...], position: int, seed: int = 0) -> int:
    """The token an adapter ("" for the base) gives at a position; `seed` is 0 for greedy sampling or none."""
    text = f"{adapter_name}|{prompt_ids}|{position}" + (f"|{seed}" if seed else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % VOCAB


def vector(adapter_name: str, prompt_ids: tuple[int, ...]) -> tuple[float, ...]:
    """The embedding that an adapter gives a prompt."""
    values = [answer(adapter_name, prompt_ids, position) + 1 for position in range(DIMENSIONS)]
    return tuple(value / math.hypot(*values) for value in values)


def seed_of(sampling: Sampling) -> int:
    """What its choices depend on."""
    return 0 if sampling.temperature == 0 else sampling.seed or 0


def logprobs_of(token: int, asked: int | None) -> tuple[TokenLogprobs, ...]:
    """The token is the likeliest; those that follow it come next."""
    if asked is None:
        return ()
    top = [
        Candidate((token + each) % VOCAB, f"{(token + each) % VOCAB} ", -0.5 - each) for each in range(asked)
    ]
    return (TokenLogprobs(f"{token} ", -0.5, tuple(top)),)


class SimEngine:
    """See `loraplex_server.engine.protocol.Engine`; the public attributes are the orders a test gives."""

    def __init__(
        self,
        base: BaseModel,
        *,
        slots: int,
        context_tokens: int = 64,
        task: str = "generate",
        keeps_bytes: bool = False,
    ) -> None:
        self._base = base
        self._task: str = task
        self._slots = slots
        self._keeps_bytes = keeps_bytes
        self._context_tokens = context_tokens
        self.adapters: dict[int, EngineAdapter] = {}
        self.slot_ids_seen: list[int] = []
        self.requests: list[EngineRequest] = []
        self.prefixes: set[tuple[str, str, tuple[int, ...]]] = set()
        self.embedded: list[EngineEmbedRequest] = []
        self.forms: list[tuple[str, Form]] = []
        self.running = 0
        self.step_s = 0.0
        self.step_s_of: dict[str, float] = {}  # by the adapter's name
        self.load_s = 0.0
        self.refuse_names: set[str] = set()
        self.hang_names: set[str] = set()
        self.lie_names: set[str] = set()  # "loaded", and never in the list
        self.dead = False
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    @property
    def base(self) -> BaseModel:
        return self._base

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

    @property
    def vocab_size(self) -> int:
        return VOCAB

    @property
    def task(self) -> str:
        return self._task

    @property
    def keeps_bytes(self) -> bool:
        return self._keeps_bytes

    async def start(self) -> None:
        self._alive()

    async def encode_text(self, text: str) -> list[int]:
        return [ord(letter) % VOCAB for letter in text]

    async def encode_chat(self, turns: tuple[ChatTurn, ...]) -> list[int]:
        return [ord(letter) % VOCAB for turn in turns for letter in turn.content]

    async def check_form(self, form: Form, *, tenant: str) -> None:
        self._alive()
        self.forms.append((tenant, form))
        if form.kind != "choice" and form.text != ANY_OBJECT:
            raise InvalidRequestError(
                f"sampling.structured_output.{form.kind}", "is beyond this simulated engine"
            )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        assert self._task == "generate", "the engine was asked for what it is not started for"
        name = self._held(request.adapter)
        self.requests.append(request)
        cached = self._cached_tokens(request, name)
        self.running += 1
        try:
            tokens = self._tokens(name, request)
            for position, (token, text) in enumerate(tokens[: request.sampling.max_tokens]):
                await asyncio.sleep(self.step_s_of.get(name, self.step_s))
                await self.may_go_on.wait()
                self._alive()
                finish = None
                if position + 1 == min(len(tokens), request.sampling.max_tokens):
                    finish = "stop" if position + 1 == len(tokens) else "length"
                yield EngineChunk(
                    text, (token,), cached, finish, logprobs_of(token, request.sampling.logprobs)
                )
        finally:
            self.running -= 1

    def _cached_tokens(self, request: EngineRequest, name: str) -> int:
        """Look the prompt up in the prefix cache, and keep it there: by salt and adapter, in whole blocks.

        As in vLLM the last token is always computed, so a prompt is never found whole.
        """
        ids, cached, known = request.prompt_ids, 0, True
        for end in range(BLOCK_TOKENS, len(ids), BLOCK_TOKENS):
            key = (request.cache_salt, name, ids[:end])
            known = known and key in self.prefixes
            cached = end if known else cached
            self.prefixes.add(key)
        return cached

    def _tokens(self, name: str, request: EngineRequest) -> list[tuple[int, str]]:
        """What is said before the end-of-sequence token: one more token than was asked for, where it never ends."""
        sampling, ids = request.sampling, request.prompt_ids
        if sampling.form is None:
            numbers = [
                answer(name, ids, position, seed_of(sampling)) for position in range(sampling.max_tokens + 1)
            ]
            return [(number, f"{number} ") for number in numbers]
        choices = sampling.form.choices or ("{}",)
        text = choices[answer(name, ids, 0, seed_of(sampling)) % len(choices)]
        return [(ord(letter) % VOCAB, letter) for letter in text]

    async def embed(self, request: EngineEmbedRequest) -> EngineEmbedding:
        assert self._task == "embed", "the engine was asked for what it is not started for"
        name = self._held(request.adapter)
        self.embedded.append(request)
        self.running += 1
        try:
            await asyncio.sleep(self.step_s)
            await self.may_go_on.wait()
            self._alive()
            return EngineEmbedding(vector(name, request.prompt_ids), 0)
        finally:
            self.running -= 1

    def _held(self, adapter: EngineAdapter | None) -> str:
        """The name of who answers, once it is sure that the engine has it."""
        self._alive()
        if adapter is None:
            return ""
        held = self.adapters.get(adapter.slot_id)
        assert held is not None, "a request reached the engine before its adapter"
        assert held.name == adapter.name
        return adapter.name

    async def load(self, adapter: EngineAdapter) -> int:
        self._alive()
        assert adapter.path.is_dir(), "the engine was given bytes that are not there"
        full = len(self.adapters) >= self._slots and not self._keeps_bytes
        assert not full, "the engine was given more adapters than it has slots"
        assert adapter.slot_id not in self.slot_ids_seen, "a slot id was used twice"
        self.slot_ids_seen.append(adapter.slot_id)
        if adapter.name in self.hang_names:
            await asyncio.Event().wait()
        await asyncio.sleep(self.load_s)
        if adapter.name in self.refuse_names:
            raise UnsupportedAdapterError(f"{adapter.name}: refused on order")
        self._alive()
        if adapter.name not in self.lie_names:
            self.adapters[adapter.slot_id] = adapter
        return COPY_BYTES if self._keeps_bytes else 0

    async def unload(self, slot_id: int) -> None:
        self._alive()
        await asyncio.sleep(0)
        self.adapters.pop(slot_id, None)

    async def loaded(self) -> frozenset[int]:
        self._alive()
        return frozenset(self.adapters)

    async def check(self) -> None:
        self._alive()

    async def close(self) -> None:
        self.adapters.clear()

    def _alive(self) -> None:
        if self.dead:
            raise EngineUnavailableError("dead on order")
