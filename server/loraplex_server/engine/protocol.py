"""What the server needs of an engine, and the plain data that crosses that seam.

`vllm_engine.VllmEngine` is the one engine of the product. The protocol exists so that residency,
admission and the service can be driven through millions of schedules by a deterministic engine in tests.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraplex_registry.validation.base import BaseModel


@dataclass(frozen=True)
class ChatTurn:
    """One chat message; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Form:
    """What an answer must look like, for structured output.

    Attributes:
        kind: "json_schema", "regex", "grammar" or "choice", as in generation.proto.
        text: the schema, expression or grammar; "" for a choice.
        choices: the texts of a choice.
    """

    kind: str
    text: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; already checked, so every value is in the engine's range.

    Attributes:
        logprobs: how many of the likeliest tokens are told for each token; None: no log-probabilities at all.
        form: what the answer must look like; passed `Engine.check_form`.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    logprobs: int | None = None
    form: Form | None = None


@dataclass(frozen=True, kw_only=True)
class EngineAdapter:
    """An adapter version as the engine knows it.

    Attributes:
        name: immutable, carries the digest: "tenant/adapter@sha256:<hex>".
        slot_id: integer handed out once per process and never reused.
        path: read-only directory of verified bytes; its name carries the digest too.
    """

    name: str
    slot_id: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One generation. `cache_salt` keeps one tenant's prefix cache from another's."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter: EngineAdapter | None
    cache_salt: str


@dataclass(frozen=True, kw_only=True)
class EngineEmbedRequest:
    """One vector wanted; the fields are those of `EngineRequest`."""

    request_id: str
    prompt_ids: tuple[int, ...]
    adapter: EngineAdapter | None
    cache_salt: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have stood at a position; `text` may be part of a character."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one position, at least LOGPROB_MIN.

    Attributes:
        text: of the token that stands there; may be part of a character.
        logprob: of that token.
        top: the likeliest ones, likeliest first, as many as were asked for.
    """

    text: str
    logprob: float
    top: tuple[Candidate, ...]


LOGPROB_MIN = -9999.0
"""Stands for a probability of 0, whose logarithm JSON has no number for. As OpenAI's API has it."""


@dataclass(frozen=True, slots=True)
class EngineChunk:
    """One or more new tokens.

    Attributes:
        finish_reason: "stop" or "length", on the last chunk only.
        logprobs: one per token id, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    cached_tokens: int
    finish_reason: str | None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class EngineEmbedding:
    """A vector of length 1 in the Euclidean norm."""

    vector: tuple[float, ...]
    cached_tokens: int


class Engine(Protocol):
    """Holds one base model and a bounded number of adapters; owned by one event loop."""

    @property
    def base(self) -> BaseModel:
        """The base model, known before `start` returns."""

    @property
    def context_tokens(self) -> int:
        """Tokens of prompt and answer together."""

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to this, exclusive."""

    @property
    def task(self) -> str:
        """What the base model serves, "generate" or "embed": which of the two methods may be called."""

    @property
    def keeps_bytes(self) -> bool:
        """Whether `load` makes a copy in memory that a slot costs nothing beside: the path is not read again."""

    async def start(self) -> None:
        """Load the base model. Raises EngineUnavailableError when it cannot serve correctly."""

    async def encode_text(self, text: str) -> list[int]:
        """Tokenize raw text, with the tokenizer's own special tokens."""

    async def encode_chat(self, turns: tuple[ChatTurn, ...]) -> list[int]:
        """Render and tokenize messages by the chat template. Raises InvalidRequestError when it cannot."""

    async def check_form(self, form: Form, *, tenant: str) -> None:
        """Try a form out where it can harm nobody; what passes costs a step of `generate` a bounded time.

        One tenant's forms are tried one after the other, so that it cannot keep the others waiting with many.

        Raises:
            InvalidRequestError: malformed, or too costly.
            EngineUnavailableError: nothing can be tried out now.
        """

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """Stream chunks; closing the generator frees the engine within a step.

        Raises:
            EngineUnavailableError: the engine died; nothing of it can be used any more.
        """

    async def embed(self, request: EngineEmbedRequest) -> EngineEmbedding:
        """Return the vector of a prompt; cancelling frees the engine within a step.

        Raises:
            EngineUnavailableError: as `generate`.
        """

    async def load(self, adapter: EngineAdapter) -> int:
        """Bring an adapter in, into a free slot where it has them. Either it serves afterwards or an error is raised.

        Returns:
            Bytes of the copy that `keeps_bytes` speaks of; 0 for other engines.

        Raises:
            UnsupportedAdapterError: the engine refused these weights; it goes on serving others.
            EngineUnavailableError: the engine died.
        """

    async def unload(self, slot_id: int) -> None:
        """Free the slot and the copy. Unloading what is not loaded does nothing."""

    async def loaded(self) -> frozenset[int]:
        """Slot ids that the engine holds, asked of the engine itself."""

    async def check(self) -> None:
        """Raise EngineUnavailableError unless the engine answers."""

    async def close(self) -> None:
        """End the engine and its processes. May be called twice."""
