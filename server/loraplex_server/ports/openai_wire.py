"""OpenAI's JSON of requests to our wire messages. Pure.

https://platform.openai.com/docs/api-reference/completions, `/chat` and `/embeddings`. What this server cannot do is
refused by name instead of being passed over in silence; fields that only tell (`metadata`, `store`) are accepted and
not used. Beyond OpenAI's fields: top_k, min_p, min_tokens, repetition_penalty, stop_token_ids, ignore_eos, priority and
structured_outputs (json, regex, choice, grammar), as in vLLM, and session, which is `user` where it is absent.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_server.errors import InvalidRequestError
from loraplex_server.requests.messages import DEFAULT_MAX_TOKENS, SESSION_CHARS_MAX

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
    "min_tokens": int,
    "n": int,
}
_OURS: Final = frozenset(
    {
        *("model", "stream", "stream_options", "stop", "stop_token_ids", "priority", "session"),
        *("logprobs", "response_format", "structured_outputs"),
    }
)
_ONE_OR_NONE: Final = frozenset({"best_of"})
_IDEMPOTENCY_KEY: Final = re.compile(r'"([^"]*)"|([^"]*)')
CANDIDATES_MAX: Final = 1 << 18
"""Most log-probabilities of an answer that is put together before it is sent: about 40 MB."""
INPUTS_MAX: Final = 64
"""Most texts of one request for vectors."""
_UINT32_MAX: Final = 2**32 - 1


@dataclass(frozen=True)
class OpenAiRequest:
    """A request, translated: our message, and how the caller wants it answered."""

    message: gpb.GenerateRequest
    model: str
    chat: bool
    stream: bool
    usage_in_stream: bool

    @property
    def choices(self) -> int:
        """Completions asked for."""
        return self.message.sampling.n if self.message.sampling.HasField("n") else 1

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self.message.sampling.HasField("logprobs")


@dataclass(frozen=True)
class EmbeddingsRequest:
    """A request for vectors, translated: a message for each text; `base64` says how numbers are written."""

    messages: tuple[gpb.EmbedRequest, ...]
    model: str
    base64: bool


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
        known = field in _SAMPLING or field in _OURS | _TELLING | {form} or (chat and field == "top_logprobs")
        if not known and item is not None:
            raise InvalidRequestError(field[:64], "is not supported here; leave it out")
    model = _text(renamed.get("model"), "model")
    message = gpb.GenerateRequest(adapter="" if model == base_model else model)
    if chat:
        _fill_chat(message, renamed.get("messages"))
    else:
        _fill_prompt(message, renamed.get("prompt"))
    _fill_sampling(message, renamed)
    _fill_logprobs(message.sampling, renamed, chat=chat)
    _fill_form(message.sampling, renamed)
    stream = _typed(renamed.get("stream") or False, bool, "stream")
    options = renamed.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InvalidRequestError("stream_options", "must be an object")
    request = OpenAiRequest(message, model, chat, stream, stream and options.get("include_usage") is True)
    if not stream and _candidates(request) > CANDIDATES_MAX:
        raise InvalidRequestError("stream", "must be true for so many log-probabilities; or ask for fewer")
    return request


def _candidates(request: OpenAiRequest) -> int:
    """Log-probabilities that the answer may hold."""
    sampling = request.message.sampling
    tokens = sampling.max_tokens if sampling.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    return request.choices * tokens * (sampling.logprobs + 1) if request.logprobs else 0


def parse_embeddings(value: Mapping[str, Any], *, base_model: str) -> EmbeddingsRequest:
    """Translate a request of `/v1/embeddings`; arguments and errors as of `parse_request`."""
    for field, item in value.items():
        if field not in _TELLING | {"model", "input", "encoding_format"} and item is not None:
            raise InvalidRequestError(field[:64], "is not supported here; leave it out")
    model = _text(value.get("model"), "model")
    written = value.get("encoding_format") or "float"
    if written not in ("float", "base64"):
        raise InvalidRequestError("encoding_format", "must be float or base64")
    inputs = value.get("input")
    if not (isinstance(inputs, list) and inputs and isinstance(inputs[0], str | list)):
        inputs = [inputs]
    if len(inputs) > INPUTS_MAX:
        raise InvalidRequestError("input", f"must hold at most {INPUTS_MAX} texts")
    messages = [gpb.EmbedRequest(adapter="" if model == base_model else model) for _ in inputs]
    for message, each in zip(messages, inputs, strict=True):
        _fill_prompt(message, each, "input")
    return EmbeddingsRequest(tuple(messages), model, written == "base64")


def parse_idempotency_key(header: str | None) -> str:
    """Return the request id in an `Idempotency-Key` header, with or without quotes; "" for none.

    https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
    """
    found = _IDEMPOTENCY_KEY.fullmatch(header.strip()) if header else None
    return (found[1] or found[2] or "") if found else header or ""


def _fill_prompt(message: gpb.GenerateRequest | gpb.EmbedRequest, prompt: Any, field: str = "prompt") -> None:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        message.text = _text(prompt, field)
    elif isinstance(prompt, list) and all(type(each) is int and 0 <= each <= _UINT32_MAX for each in prompt):
        message.token_ids.ids.extend(prompt)
        message.token_ids.SetInParent()
    else:
        raise InvalidRequestError(field, "must be one text or one list of token ids")


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


def _fill_logprobs(sampling: gpb.SamplingParams, value: Mapping[str, Any], *, chat: bool) -> None:
    """Completions ask by a number, chats by a flag and a number."""
    asked, top = value.get("logprobs"), value.get("top_logprobs")
    if not chat:
        if asked is not None:
            _set(sampling, "logprobs", _typed(asked, int, "logprobs"))
    elif asked is not None and _typed(asked, bool, "logprobs"):
        _set(sampling, "logprobs", 0 if top is None else _typed(top, int, "top_logprobs"))
    elif top is not None:
        raise InvalidRequestError("top_logprobs", "needs logprobs to be true")


def _fill_form(sampling: gpb.SamplingParams, value: Mapping[str, Any]) -> None:
    wanted, forms = value.get("response_format"), value.get("structured_outputs")
    if wanted is not None and forms is not None:
        raise InvalidRequestError("structured_outputs", "cannot be combined with response_format")
    if wanted is not None:
        _fill_response_format(sampling, wanted)
    if forms is not None:
        _fill_structured_outputs(sampling.structured_output, forms)


def _fill_response_format(sampling: gpb.SamplingParams, wanted: Any) -> None:
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "json_object":
        sampling.structured_output.json_schema = '{"type":"object"}'
    elif kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        sampling.structured_output.json_schema = _dumped(schema, "response_format.json_schema.schema")
    elif kind != "text":
        raise InvalidRequestError("response_format.type", "must be text, json_object or json_schema")


def _fill_structured_outputs(output: gpb.StructuredOutput, forms: Any) -> None:
    given = {key: form for key, form in forms.items() if form is not None} if isinstance(forms, dict) else {}
    kind = next(iter(given), "")
    if len(given) != 1 or kind not in ("json", "regex", "choice", "grammar"):
        raise InvalidRequestError("structured_outputs", "must hold one of json, regex, choice and grammar")
    form, where = given[kind], f"structured_outputs.{kind}"
    if kind == "json":
        output.json_schema = _text(form, where) if isinstance(form, str) else _dumped(form, where)
    elif kind == "choice":
        output.choice.texts.extend(_text(text, where) for text in _list(form, where))
    else:
        setattr(output, kind, _text(form, where))


def _dumped(schema: Any, where: str) -> str:
    if not isinstance(schema, dict):
        raise InvalidRequestError(where, "must be a JSON object")
    try:
        return json.dumps(schema, separators=(",", ":"))
    except RecursionError:
        raise InvalidRequestError(where, "is nested too deeply") from None


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
