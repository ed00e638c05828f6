"""What a generation tells, in its order: who answers, new tokens, how it ended."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from loraplex_server.engine.protocol import EngineChunk


@dataclass(frozen=True, kw_only=True)
class Started:
    """Who answers: told first. Names and digests of the adapter are "" for the base model, the tag without a split."""

    request_id: str
    base_model: str
    base_digest: str
    adapter: str
    adapter_digest: str
    adapter_was_resident: bool
    adapter_tag: str = ""


@dataclass(frozen=True)
class Piece:
    """New tokens of one completion, or its end."""

    index: int
    chunk: EngineChunk


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How it ended: told last. Times are seconds since the call arrived.

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
"""Takes each event of a call, in order."""
