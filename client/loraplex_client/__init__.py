"""Client of a loraplex server: sync and async, dataclasses in and out, typed errors.

from loraplex_client import GREEDY, ChatMessage, Client

with Client("127.0.0.1:8470") as client:
    question = [ChatMessage("user", "order: 3 red mugs for Ada")]
    for piece in client.stream(question, adapter="acme/orders@prod", sampling=GREEDY):
        print(piece.text, end="")
"""

from loraplex_client.aio import AsyncClient, AsyncStream
from loraplex_client.client import Client, Stream
from loraplex_client.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    ContextTooLongError,
    DeadlineExceededError,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    PermissionDeniedError,
    RequestIdReusedError,
    ServerFaultError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedByBaseError,
)
from loraplex_client.types import (
    GREEDY,
    AdapterInfo,
    Candidate,
    ChatMessage,
    Choice,
    Completion,
    Delta,
    Embedding,
    Form,
    Grammar,
    Header,
    JsonSchema,
    LoadProgress,
    OneOf,
    Prompt,
    Regex,
    Sampling,
    Timings,
    Tls,
    TokenIds,
    TokenLogprobs,
    Tokens,
    Usage,
)

__all__ = [
    "GREEDY",
    "AdapterInfo",
    "AdapterNotFoundError",
    "AdapterRefusedError",
    "AsyncClient",
    "AsyncStream",
    "Candidate",
    "ChatMessage",
    "Choice",
    "Client",
    "Completion",
    "ContextTooLongError",
    "DeadlineExceededError",
    "Delta",
    "Embedding",
    "Form",
    "Grammar",
    "Header",
    "InvalidRequestError",
    "JsonSchema",
    "LoadProgress",
    "LoraplexError",
    "OneOf",
    "OverloadedError",
    "PermissionDeniedError",
    "Prompt",
    "Regex",
    "RequestIdReusedError",
    "Sampling",
    "ServerFaultError",
    "Stream",
    "Timings",
    "Tls",
    "TokenIds",
    "TokenLogprobs",
    "Tokens",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedByBaseError",
    "Usage",
]
