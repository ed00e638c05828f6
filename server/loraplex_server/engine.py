"""What the server needs of an engine, and the plain data that crosses that seam.

`engine_vllm.VllmEngine` is the one engine of the product. The protocol exists so that residency,
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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; already checked, so every value is in the engine's range."""

    max_tokens: int
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


@dataclass(frozen=True)
class EngineChunk:
    """One or more new tokens. `finish_reason` ("stop" or "length") is set on the last chunk only."""

    text: str
    token_ids: tuple[int, ...]
    cached_tokens: int
    finish_reason: str | None


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

    async def start(self) -> None:
        """Load the base model. Raises EngineUnavailableError when it cannot serve correctly."""

    async def encode_text(self, text: str) -> list[int]:
        """Tokenize raw text, with the tokenizer's own special tokens."""

    async def encode_chat(self, turns: tuple[ChatTurn, ...]) -> list[int]:
        """Render and tokenize messages by the chat template. Raises InvalidRequestError when it cannot."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        """Stream chunks; closing the generator frees the engine within a step.

        Raises:
            EngineUnavailableError: the engine died; nothing of it can be used any more.
        """

    async def load(self, adapter: EngineAdapter) -> None:
        """Copy an adapter into a free slot. Either it serves afterwards or an error is raised.

        Raises:
            UnsupportedAdapterError: the engine refused these weights; it goes on serving others.
            EngineUnavailableError: the engine died.
        """

    async def unload(self, slot_id: int) -> None:
        """Free the slot. Unloading what is not loaded does nothing."""

    async def loaded(self) -> frozenset[int]:
        """Slot ids that the engine holds, asked of the engine itself."""

    async def check(self) -> None:
        """Raise EngineUnavailableError unless the engine answers."""

    async def close(self) -> None:
        """End the engine and its processes. May be called twice."""
