"""OpenAI's JSON to our wire messages and back. Pure: no network, no clock but the one given.

https://platform.openai.com/docs/api-reference/completions and `/chat`. What this server cannot do is refused by name
instead of being passed over in silence; fields that only tell (`metadata`, `store`) are accepted and not used.
Beyond OpenAI's fields: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos and priority, as in vLLM, and
session, which is `user` where it is absent.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_server.engine import EngineChunk
from loraplex_server.errors import InvalidRequestError
from loraplex_server.generation import Ended, Started
from loraplex_server.requests import SESSION_CHARS_MAX
from loraplex_server.status import Failure

_TELLING: Final = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key"})
_SAMPLING: Final[Mapping[str, type]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "ignore_eos": bool,
}
_OURS: Final = frozenset(
    {"model", "stream", "stream_options", "stop", "stop_token_ids", "priority", "session"}
)
_ONE_OR_NONE: Final = frozenset({"n", "best_of"})
_UINT32_MAX: Final = 2**32 - 1

HTTP_STATUS: Final[Mapping[int, int]] = {
    3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 422, 10: 409, 12: 404, 13: 500, 14: 503, 16: 401,
}  # fmt: skip
"""Code of google.rpc.Code -> HTTP status."""


@dataclass(frozen=True)
class OpenAiRequest:
    """A request, translated: our message, and how the caller wants it answered."""

    message: gpb.GenerateRequest
    model: str
    chat: bool
    stream: bool
    usage_in_stream: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object in a request's body.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("body", "is not JSON") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("body", "is not a JSON object")
    return value


def parse_request(value: Mapping[str, Any], *, chat: bool, base_model: str) -> OpenAiRequest:
    """Translate a request of `/v1/completions`, or of `/v1/chat/completions`.

    Args:
        value: the body.
        chat: which of the two.
        base_model: the name by which the base is asked for; every other model is an adapter.

    Raises:
        InvalidRequestError: a field that is missing, malformed, or asks for what this server does not do.
    """
    renamed = {("max_tokens" if key == "max_completion_tokens" else key): item for key, item in value.items()}
    form = "messages" if chat else "prompt"
    for field, item in renamed.items():
        if field in _ONE_OR_NONE and item in (None, 1):
            continue
        if field not in _SAMPLING and field not in _OURS | _TELLING | {form} and item is not None:
            raise InvalidRequestError(field[:64], "is not supported here; leave it out")
    model = _text(renamed.get("model"), "model")
    message = gpb.GenerateRequest(adapter="" if model == base_model else model)
    if chat:
        _fill_chat(message, renamed.get("messages"))
    else:
        _fill_prompt(message, renamed.get("prompt"))
    _fill_sampling(message, renamed)
    stream = _typed(renamed.get("stream") or False, bool, "stream")
    options = renamed.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InvalidRequestError("stream_options", "must be an object")
    return OpenAiRequest(message, model, chat, stream, stream and options.get("include_usage") is True)


class Answer:
    """Puts OpenAI's objects together from the events of one generation."""

    def __init__(self, request: OpenAiRequest, started: Started, *, call_id: str, created: int) -> None:
        """Begin; `created` is the time in seconds since 1970."""
        kind = "chat.completion" if request.chat else "text_completion"
        self._request = request
        self._head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{call_id}",
            "object": f"{kind}.chunk" if request.stream and request.chat else kind,
            "created": created,
            "model": request.model,
            "system_fingerprint": ":".join(
                filter(None, (started.base_digest[:19], started.adapter_digest[:19]))
            ),
        }
        self._texts: list[str] = []
        self._first = True

    def add(self, chunk: EngineChunk) -> dict[str, Any]:
        """Take new tokens; return the object to stream for them."""
        self._texts.append(chunk.text)
        if not self._request.chat:
            return self._piece({"text": chunk.text, "logprobs": None}, None)
        role = {"role": "assistant"} if self._first else {}
        self._first = False
        return self._piece({"delta": {**role, "content": chunk.text}, "logprobs": None}, None)

    def last(self, ended: Ended) -> list[dict[str, Any]]:
        """Return the objects that end a stream."""
        empty: dict[str, Any] = {"delta": {}} if self._request.chat else {"text": ""}
        pieces = [self._piece({**empty, "logprobs": None}, ended.finish_reason)]
        if self._request.usage_in_stream:
            pieces.append({**self._head, "choices": [], "usage": _usage(ended)})
        return pieces

    def whole(self, ended: Ended) -> dict[str, Any]:
        """Return the one object of an answer that is not streamed."""
        text = "".join(self._texts)
        said = {"message": {"role": "assistant", "content": text}} if self._request.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": ended.finish_reason}
        return {**self._head, "choices": [choice], "usage": _usage(ended)}

    def _piece(self, part: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {**self._head, "choices": [{"index": 0, **part, "finish_reason": finish_reason}]}


def error_object(failure: Failure, *, field: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object; `code` is our reason."""
    status = HTTP_STATUS[failure.code]
    kind = (
        "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    )
    return {"error": {"message": failure.message, "type": kind, "param": field, "code": failure.reason}}


def _usage(ended: Ended) -> dict[str, Any]:
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.completion_tokens,
        "total_tokens": ended.prompt_tokens + ended.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": ended.cached_tokens},
    }


def _fill_prompt(message: gpb.GenerateRequest, prompt: Any) -> None:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        message.text = _text(prompt, "prompt")
    elif isinstance(prompt, list) and all(type(each) is int and 0 <= each <= _UINT32_MAX for each in prompt):
        message.token_ids.ids.extend(prompt)
    else:
        raise InvalidRequestError("prompt", "must be one text or one list of token ids")


def _fill_chat(message: gpb.GenerateRequest, messages: Any) -> None:
    if not isinstance(messages, list):
        raise InvalidRequestError("messages", "must be a list")
    message.chat.SetInParent()
    for number, turn in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn) <= {"role", "content", "name"}:
            raise InvalidRequestError(
                where, "must have role and content, and nothing that is not supported here"
            )
        message.chat.messages.add(
            role=_text(turn["role"], f"{where}.role"), content=_content(turn["content"], f"{where}.content")
        )


def _content(value: Any, where: str) -> str:
    """Return a message's text: one string, or OpenAI's list of parts of type text."""
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in value
    ):
        return "".join(_text(part.get("text"), where) for part in value)
    raise InvalidRequestError(where, "must be text")


def _fill_sampling(message: gpb.GenerateRequest, value: Mapping[str, Any]) -> None:
    for field, kind in _SAMPLING.items():
        if value.get(field) is not None:
            _set(message.sampling, field, _typed(value[field], kind, field))
    stops = value.get("stop")
    for stop in [stops] if isinstance(stops, str) else _list(stops, "stop"):
        message.sampling.stop.append(_text(stop, "stop"))
    for token_id in _list(value.get("stop_token_ids"), "stop_token_ids"):
        _put(
            message.sampling.stop_token_ids.append, _typed(token_id, int, "stop_token_ids"), "stop_token_ids"
        )
    if value.get("priority") is not None:
        _set(message, "priority", _typed(value["priority"], int, "priority"))
    if value.get("session") is not None:
        message.session = _text(value["session"], "session")
    elif isinstance(value.get("user"), str):
        message.session = _text(value["user"], "user")[:SESSION_CHARS_MAX]


def _list(value: Any, field: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequestError(field, "must be a list")
    return value


def _set(message: Any, field: str, value: Any) -> None:
    _put(lambda each: setattr(message, field, each), value, field)


def _put(put: Callable[[Any], None], value: Any, field: str) -> None:
    try:
        put(value)
    except (ValueError, TypeError) as error:  # beyond its wire type
        raise InvalidRequestError(field, "is out of range") from error


def _typed(value: Any, kind: type, field: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InvalidRequestError(field, f"must be of type {kind.__name__}")
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or (not value.isprintable() and field == "model"):
        raise InvalidRequestError(field, "must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise InvalidRequestError(field, "is not Unicode text") from error
    return value


def _refuse_constant(_name: str) -> Any:
    raise ValueError
