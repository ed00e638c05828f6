"""A deterministic engine with the server's own protocol, for schedules the real one is too slow for.

Its tokens follow from (adapter name, prompt, position), so a test can tell who really answered. It can be told
to be slow, to refuse, hang or lie about a load, and to die. Never shipped; the promises it helps to test are tested
on the real engine too, in tests/e2e.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator

from loraplex_registry.errors import UnsupportedAdapterError
from loraplex_registry.validation.base import BaseModel
from loraplex_server.engine import ChatTurn, EngineAdapter, EngineChunk, EngineRequest
from loraplex_server.errors import EngineUnavailableError

VOCAB = 1000
BLOCK_TOKENS = 4  # of a prompt, kept in the prefix cache together


def answer(adapter_name: str, prompt_ids: tuple[int, ...], position: int) -> int:
    """The token an adapter ("" for the base) gives at a position."""
    text = f"{adapter_name}|{prompt_ids}|{position}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % VOCAB


class SimEngine:
    """See `loraplex_server.engine.Engine`; the public attributes are the orders a test gives."""

    def __init__(self, base: BaseModel, *, slots: int, context_tokens: int = 64) -> None:
        self._base = base
        self._slots = slots
        self._context_tokens = context_tokens
        self.adapters: dict[int, EngineAdapter] = {}
        self.slot_ids_seen: list[int] = []
        self.requests: list[EngineRequest] = []
        self.prefixes: set[tuple[str, str, tuple[int, ...]]] = set()
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

    async def start(self) -> None:
        self._alive()

    async def encode_text(self, text: str) -> list[int]:
        return [ord(letter) % VOCAB for letter in text]

    async def encode_chat(self, turns: tuple[ChatTurn, ...]) -> list[int]:
        return [ord(letter) % VOCAB for turn in turns for letter in turn.content]

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineChunk, None]:
        self._alive()
        name = request.adapter.name if request.adapter else ""
        if request.adapter is not None:
            held = self.adapters.get(request.adapter.slot_id)
            assert held is not None, "a request reached the engine before its adapter"
            assert held.name == name
        self.requests.append(request)
        cached = self._cached_tokens(request, name)
        self.running += 1
        try:
            for position in range(request.sampling.max_tokens):
                await asyncio.sleep(self.step_s_of.get(name, self.step_s))
                await self.may_go_on.wait()
                self._alive()
                token = answer(name, request.prompt_ids, position)
                last = position + 1 == request.sampling.max_tokens
                yield EngineChunk(f"{token} ", (token,), cached, "length" if last else None)
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

    async def load(self, adapter: EngineAdapter) -> None:
        self._alive()
        assert adapter.path.is_dir(), "the engine was given bytes that are not there"
        assert len(self.adapters) < self._slots, "the engine was given more adapters than it has slots"
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
