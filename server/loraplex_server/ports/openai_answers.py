"""OpenAI's JSON of answers, from the events of a call. Pure: no network, no clock but the one given."""

import base64
import struct
from collections.abc import Mapping
from typing import Any, Final

from loraplex_server.calls.embedding import Embedded
from loraplex_server.calls.events import Ended, Piece, Started
from loraplex_server.calls.status import Failure
from loraplex_server.engine.protocol import TokenLogprobs
from loraplex_server.ports.openai_wire import EmbeddingsRequest, OpenAiRequest

HTTP_STATUS: Final[Mapping[int, int]] = {
    3: 400, 4: 504, 5: 404, 6: 422, 7: 403, 8: 429, 9: 422, 10: 409, 12: 404, 13: 500, 14: 503, 16: 401,
}  # fmt: skip
"""Code of google.rpc.Code -> HTTP status."""


class Answer:
    """Puts OpenAI's objects together from the events of one generation."""

    def __init__(self, request: OpenAiRequest, started: Started, *, created: int) -> None:
        """Begin; `created` is the time in seconds since 1970."""
        kind = "chat.completion" if request.chat else "text_completion"
        self._request = request
        self._head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{started.request_id}",
            "object": f"{kind}.chunk" if request.stream and request.chat else kind,
            "created": created,
            "model": request.model,
            "system_fingerprint": ":".join(
                filter(None, (started.base_digest[:19], started.adapter_digest[:19]))
            ),
        }
        self._choices = [_Choice(request) for _ in range(request.choices)]

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Take new tokens, or the end of a choice; return the objects to stream for it."""
        choice, chunk = self._choices[piece.index], piece.chunk
        parts = []
        if chunk.token_ids or chunk.text:
            parts.append(choice.add(chunk.text, chunk.logprobs))
        if chunk.finish_reason:
            empty: dict[str, Any] = {"delta": {}} if self._request.chat else {"text": ""}
            parts.append({**empty, "logprobs": None, "finish_reason": chunk.finish_reason})
        return [{**self._head, "choices": [{"index": piece.index, **part}]} for part in parts]

    def last(self, ended: Ended) -> list[dict[str, Any]]:
        """Return what ends a stream, after the ends of its choices."""
        return (
            [{**self._head, "choices": [], "usage": _usage(ended)}] if self._request.usage_in_stream else []
        )

    def whole(self, ended: Ended) -> dict[str, Any]:
        """Return the one object of an answer that is not streamed."""
        choices = [
            {"index": index, **choice.whole(), "finish_reason": reason}
            for index, (choice, reason) in enumerate(zip(self._choices, ended.finish_reasons, strict=True))
        ]
        return {**self._head, "choices": choices, "usage": _usage(ended)}


class _Choice:
    """One completion as it grows."""

    def __init__(self, request: OpenAiRequest) -> None:
        self._request = request
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._offset = 0  # of the next token, in characters; counted where log-probabilities are told

    def add(self, text: str, logprobs: tuple[TokenLogprobs, ...]) -> dict[str, Any]:
        """Take new tokens; return what to stream for them."""
        told = self._told(logprobs, self._offset)
        self._offset += sum(len(each.text) for each in logprobs)
        first = not self._texts
        self._texts.append(text)
        if not self._request.stream:
            self._logprobs += logprobs
        if not self._request.chat:
            return {"text": text, "logprobs": told, "finish_reason": None}
        role = {"role": "assistant"} if first else {}
        return {"delta": {**role, "content": text}, "logprobs": told, "finish_reason": None}

    def whole(self) -> dict[str, Any]:
        """Return all of it."""
        text, told = "".join(self._texts), self._told(tuple(self._logprobs), 0)
        said = {"message": {"role": "assistant", "content": text}} if self._request.chat else {"text": text}
        return {**said, "logprobs": told}

    def _told(self, logprobs: tuple[TokenLogprobs, ...], offset: int) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return _of_chat(logprobs) if self._request.chat else _of_completions(logprobs, offset)


def _of_chat(logprobs: tuple[TokenLogprobs, ...]) -> dict[str, Any]:
    content = [
        {
            **_token(each.text, each.logprob),
            "top_logprobs": [_token(candidate.text, candidate.logprob) for candidate in each.top],
        }
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _of_completions(logprobs: tuple[TokenLogprobs, ...], offset: int) -> dict[str, Any]:
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.text)
    return {
        "tokens": [each.text for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [
            {each.text: each.logprob, **{candidate.text: candidate.logprob for candidate in each.top}}
            for each in logprobs
        ],
        "text_offset": offsets,
    }


def embeddings(request: EmbeddingsRequest, embedded: Embedded) -> dict[str, Any]:
    """Return the answer of `/v1/embeddings`."""
    rows = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if request.base64 else vector}
        for index, vector in enumerate(embedded.vectors)
    ]
    tokens = embedded.prompt_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": rows, "model": request.model, "usage": usage}


def _packed(vector: tuple[float, ...]) -> str:
    """Little-endian floats of 32 bits in base64, which OpenAI's own client asks for."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


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
