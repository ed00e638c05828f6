"""From a wire message to a checked, plain request. Pure: no clock, no network, no engine.

Promises: what comes out is inside every range the engine accepts, so that the engine never sees a
parameter it would choke on; what does not fit names its field as the caller wrote it.
"""

import math
import re
from dataclasses import dataclass

from loraplex_protos.v1 import generation_pb2 as pb
from loraplex_registry.errors import RegistryError
from loraplex_registry.refs import AdapterRef
from loraplex_server.engine import ChatTurn, Sampling
from loraplex_server.errors import ContextTooLongError, InvalidRequestError
from loraplex_server.rollout.splits import Target

DEFAULT_MAX_TOKENS = 256
REQUEST_ID_CHARS_MAX = 128
SESSION_CHARS_MAX = 128
PRIORITY_MAX = 100
STOPS_MAX = 16
STOP_CHARS_MAX = 128
MESSAGES_MAX = 256
ROLES = ("system", "user", "assistant")
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{REQUEST_ID_CHARS_MAX}}}")


@dataclass(frozen=True)
class Prompt:
    """Exactly one of the three forms of a prompt is set."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chat: tuple[ChatTurn, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateCall:
    """A checked call. `max_tokens` is None when the caller left it open."""

    adapter: Target | None
    prompt: Prompt
    sampling: pb.SamplingParams
    request_id: str | None
    priority: int = 0
    session: str = ""


def parse_target(text: str) -> Target:
    """Parse what a call may be for: a reference, or a split between tags.

    Raises:
        InvalidRequestError: it is neither.
    """
    try:
        return Target.parse(text)
    except RegistryError as error:
        raise InvalidRequestError("adapter", str(error)) from None


def parse_ref(text: str) -> AdapterRef:
    """Parse an adapter reference.

    Raises:
        InvalidRequestError: not of the form tenant/adapter[@selector].
    """
    try:
        return AdapterRef.parse(text)
    except RegistryError as error:
        raise InvalidRequestError("adapter", str(error)) from None


def parse_generate(message: pb.GenerateRequest, *, prompt_chars_max: int) -> GenerateCall:
    """Check everything of a call that needs neither tokenizer nor registry.

    Raises:
        InvalidRequestError: names the field that is missing, malformed or out of range.
    """
    if message.request_id and not _REQUEST_ID.fullmatch(message.request_id):
        raise InvalidRequestError(
            "request_id", f"must be 1 to {REQUEST_ID_CHARS_MAX} characters of A-Z a-z 0-9 . _ -"
        )
    if abs(message.priority) > PRIORITY_MAX:
        raise InvalidRequestError("priority", f"must be from -{PRIORITY_MAX} to {PRIORITY_MAX}")
    if len(message.session) > SESSION_CHARS_MAX:
        raise InvalidRequestError("session", f"at most {SESSION_CHARS_MAX} characters")
    _check_sampling(message.sampling)
    return GenerateCall(
        adapter=parse_target(message.adapter) if message.adapter else None,
        prompt=_prompt(message, chars_max=prompt_chars_max),
        sampling=message.sampling,
        request_id=message.request_id or None,
        priority=message.priority,
        session=message.session,
    )


def _prompt(message: pb.GenerateRequest, *, chars_max: int) -> Prompt:
    form = message.WhichOneof("prompt")
    if form == "text":
        _check_chars("text", len(message.text), chars_max)
        return Prompt(text=message.text)
    if form == "token_ids":
        if not message.token_ids.ids:
            raise InvalidRequestError("token_ids.ids", "must hold at least one token id")
        return Prompt(token_ids=tuple(message.token_ids.ids))
    if form == "chat":
        return Prompt(chat=_chat(message.chat, chars_max=chars_max))
    raise InvalidRequestError("prompt", "set one of text, token_ids and chat")


def _chat(chat: pb.Chat, *, chars_max: int) -> tuple[ChatTurn, ...]:
    if not 1 <= len(chat.messages) <= MESSAGES_MAX:
        raise InvalidRequestError("chat.messages", f"must hold 1 to {MESSAGES_MAX} messages")
    for index, turn in enumerate(chat.messages):
        if turn.role not in ROLES:
            raise InvalidRequestError(f"chat.messages[{index}].role", f"must be one of {', '.join(ROLES)}")
    _check_chars("chat.messages", sum(len(turn.content) for turn in chat.messages), chars_max)
    return tuple(ChatTurn(role=turn.role, content=turn.content) for turn in chat.messages)


def _check_chars(field: str, chars: int, chars_max: int) -> None:
    if chars == 0:
        raise InvalidRequestError(field, "must not be empty")
    if chars > chars_max:
        raise InvalidRequestError(field, f"has {chars} characters; at most {chars_max} are accepted")


def _check_sampling(sampling: pb.SamplingParams) -> None:
    ranges: list[tuple[str, float, float, bool]] = [  # name, low, high, low itself allowed
        ("temperature", 0, 2, True),
        ("top_p", 0, 1, False),
        ("min_p", 0, 1, True),
        ("presence_penalty", -2, 2, True),
        ("frequency_penalty", -2, 2, True),
        ("repetition_penalty", 0, 2, False),
    ]
    for name, low, high, low_allowed in ranges:
        if sampling.HasField(name):  # type: ignore[arg-type]
            value = getattr(sampling, name)
            if not (low < value <= high or (low_allowed and value == low)) or math.isnan(value):
                edge = "from" if low_allowed else "above"
                raise InvalidRequestError(
                    f"sampling.{name}", f"must be {edge} {low} to {high}, not {value:g}"
                )
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise InvalidRequestError("sampling.max_tokens", "must be 1 or more")
    if sampling.seed >= 2**63:
        raise InvalidRequestError("sampling.seed", "must be below 2^63")
    if len(sampling.stop) > STOPS_MAX or any(not 1 <= len(stop) <= STOP_CHARS_MAX for stop in sampling.stop):
        raise InvalidRequestError(
            "sampling.stop", f"at most {STOPS_MAX} strings of 1 to {STOP_CHARS_MAX} characters"
        )
    if len(sampling.stop_token_ids) > STOPS_MAX:
        raise InvalidRequestError("sampling.stop_token_ids", f"at most {STOPS_MAX} token ids")


def check_token_ids(ids: tuple[int, ...], *, vocab_size: int) -> None:
    """Refuse token ids the base model does not have.

    Raises:
        InvalidRequestError: names the first id outside 0..vocab_size-1.
    """
    for index, token_id in enumerate(ids):
        if token_id >= vocab_size:
            raise InvalidRequestError(
                f"token_ids.ids[{index}]", f"{token_id} is outside the vocabulary of {vocab_size}"
            )


def final_sampling(
    params: pb.SamplingParams, *, prompt_tokens: int, context_tokens: int, vocab_size: int
) -> Sampling:
    """Complete the sampling parameters once the prompt's length in tokens is known.

    A `max_tokens` that was left open becomes 256, cut to what the context leaves.

    Raises:
        ContextTooLongError: the prompt, or prompt plus the wanted tokens, exceeds the context.
        InvalidRequestError: a stop token or top_k outside the vocabulary.
    """
    left = context_tokens - prompt_tokens
    asked = params.max_tokens if params.HasField("max_tokens") else min(DEFAULT_MAX_TOKENS, left)
    if left < 1 or asked > left:
        raise ContextTooLongError(
            f"{prompt_tokens} prompt tokens and {max(asked, 1)} new ones do not fit the context of {context_tokens}",
            metadata={"prompt_tokens": str(prompt_tokens), "context_tokens": str(context_tokens)},
        )
    if any(token_id >= vocab_size for token_id in params.stop_token_ids):
        raise InvalidRequestError(
            "sampling.stop_token_ids", f"must be below the vocabulary size {vocab_size}"
        )
    return Sampling(
        max_tokens=asked,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        top_k=min(params.top_k, vocab_size),
        min_p=params.min_p,
        seed=params.seed if params.HasField("seed") else None,
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        ignore_eos=params.ignore_eos,
    )
