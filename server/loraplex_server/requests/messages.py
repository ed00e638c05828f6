"""From a wire message to a checked, plain request. Pure: no clock, no network, no engine.

Promises: what comes out is inside every range the engine accepts, so that the engine never sees a
parameter it would choke on; what does not fit names its field as the caller wrote it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex_protos.v1 import generation_pb2 as pb
from loraplex_registry.errors import RegistryError
from loraplex_registry.refs import AdapterRef
from loraplex_server.engine.protocol import ChatTurn, Form, Sampling
from loraplex_server.errors import ContextTooLongError, InvalidRequestError
from loraplex_server.requests.forms import parse_form
from loraplex_server.rollout.splits import Target

DEFAULT_MAX_TOKENS = 256
REQUEST_ID_CHARS_MAX = 128
SESSION_CHARS_MAX = 128
PRIORITY_MAX = 100
CHOICES_MAX = 16  # completions of one prompt
LOGPROBS_MAX = 20
SEED_MAX = 2**63 - 1
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
    """A checked call.

    Attributes:
        sampling: in its ranges, as far as that can be said without the prompt's length; see `final_sampling`.
        form: what the answer must look like.
        choices: completions that are wanted.
    """

    adapter: Target | None
    prompt: Prompt
    sampling: pb.SamplingParams
    form: Form | None = None
    choices: int = 1
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


@dataclass(frozen=True, kw_only=True)
class EmbedCall:
    """A checked call for vectors, one for each prompt."""

    adapter: Target | None
    prompts: tuple[Prompt, ...]


def parse_ref(text: str) -> AdapterRef:
    """Parse an adapter reference.

    Raises:
        InvalidRequestError: not of the form tenant/adapter[@selector].
    """
    try:
        return AdapterRef.parse(text)
    except RegistryError as error:
        raise InvalidRequestError("adapter", str(error)) from None


def is_request_id(text: str) -> bool:
    """Say whether a caller may use this as the id of a request."""
    return _REQUEST_ID.fullmatch(text) is not None


def parse_generate(message: pb.GenerateRequest, *, prompt_chars_max: int) -> GenerateCall:
    """Check everything of a call that needs neither tokenizer nor registry.

    Raises:
        InvalidRequestError: names the field that is missing, malformed or out of range.
    """
    if message.request_id and not is_request_id(message.request_id):
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
        prompt=parse_prompt(message, chars_max=prompt_chars_max),
        sampling=message.sampling,
        form=_form(message.sampling),
        choices=message.sampling.n if message.sampling.HasField("n") else 1,
        request_id=message.request_id or None,
        priority=message.priority,
        session=message.session,
    )


def parse_embed(messages: Sequence[pb.EmbedRequest], *, prompt_chars_max: int) -> EmbedCall:
    """Check a call for vectors, a message for each prompt, all of one adapter; raises as `parse_generate`."""
    adapter = messages[0].adapter
    prompts = tuple(parse_prompt(message, chars_max=prompt_chars_max) for message in messages)
    return EmbedCall(adapter=parse_target(adapter) if adapter else None, prompts=prompts)


def parse_prompt(
    message: pb.GenerateRequest | pb.TokenizeRequest | pb.EmbedRequest, *, chars_max: int
) -> Prompt:
    """Check a prompt, whatever the call it is in; raises as `parse_generate`."""
    form = message.WhichOneof("prompt")
    if form == "text":
        _check_chars("text", len(message.text), chars_max)
        return Prompt(text=message.text)
    if form == "token_ids" and not isinstance(message, pb.TokenizeRequest):
        if not message.token_ids.ids:
            raise InvalidRequestError("token_ids.ids", "must hold at least one token id")
        return Prompt(token_ids=tuple(message.token_ids.ids))
    if form == "chat" and not isinstance(message, pb.EmbedRequest):
        return Prompt(chat=_chat(message.chat, chars_max=chars_max))
    forms = [field.name for field in message.DESCRIPTOR.oneofs_by_name["prompt"].fields]
    raise InvalidRequestError("prompt", f"set one of {', '.join(forms)}")


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
    _check_choices(sampling)
    if sampling.logprobs > LOGPROBS_MAX:
        raise InvalidRequestError("sampling.logprobs", f"must be from 0 to {LOGPROBS_MAX}")
    if len(sampling.stop) > STOPS_MAX or any(not 1 <= len(stop) <= STOP_CHARS_MAX for stop in sampling.stop):
        raise InvalidRequestError(
            "sampling.stop", f"at most {STOPS_MAX} strings of 1 to {STOP_CHARS_MAX} characters"
        )
    if len(sampling.stop_token_ids) > STOPS_MAX:
        raise InvalidRequestError("sampling.stop_token_ids", f"at most {STOPS_MAX} token ids")


def _check_choices(sampling: pb.SamplingParams) -> None:
    if not sampling.HasField("n"):
        choices = 1
    elif 1 <= (choices := sampling.n) <= CHOICES_MAX:
        if choices > 1 and sampling.HasField("temperature") and sampling.temperature == 0:
            raise InvalidRequestError("sampling.n", "must be 1 where temperature is 0: all would be the same")
    else:
        raise InvalidRequestError("sampling.n", f"must be from 1 to {CHOICES_MAX}")
    if sampling.seed + choices - 1 > SEED_MAX:
        raise InvalidRequestError("sampling.seed", f"must be below 2^63 - {choices - 1}")


def _form(sampling: pb.SamplingParams) -> Form | None:
    """Return what the answer must look like. Where only a form says when an answer may end, nothing else does."""
    if not sampling.HasField("structured_output"):
        return None
    for name in ("min_tokens", "ignore_eos"):
        if getattr(sampling, name):
            raise InvalidRequestError(f"sampling.{name}", "cannot be combined with structured_output")
    return parse_form(sampling.structured_output, field="sampling.structured_output")


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
    params: pb.SamplingParams,
    *,
    prompt_tokens: int,
    context_tokens: int,
    vocab_size: int,
    form: Form | None = None,
) -> Sampling:
    """Complete the sampling parameters once the prompt's length in tokens is known.

    A `max_tokens` that was left open becomes 256, cut to what the context leaves.

    Raises:
        ContextTooLongError: the prompt, or prompt plus the wanted tokens, exceeds the context.
        InvalidRequestError: a stop token outside the vocabulary, or more tokens at least than at most.
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
    if params.min_tokens > asked:
        raise InvalidRequestError("sampling.min_tokens", f"must not be above max_tokens, {asked} here")
    return Sampling(
        max_tokens=asked,
        min_tokens=params.min_tokens,
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
        logprobs=min(params.logprobs, vocab_size) if params.HasField("logprobs") else None,
        form=form,
    )
