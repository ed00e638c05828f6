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
    ServerFaultError,
    UnauthenticatedError,
    UnavailableError,
)
from loraplex_client.types import (
    GREEDY,
    AdapterCheck,
    AdapterInfo,
    ChatMessage,
    Completion,
    Delta,
    Header,
    LoadProgress,
    Prompt,
    RolloutArm,
    Sampling,
    Timings,
    Tls,
    TokenIds,
    Usage,
    Validation,
)

__all__ = [
    "GREEDY",
    "AdapterCheck",
    "AdapterInfo",
    "AdapterNotFoundError",
    "AdapterRefusedError",
    "AsyncClient",
    "AsyncStream",
    "ChatMessage",
    "Client",
    "Completion",
    "ContextTooLongError",
    "DeadlineExceededError",
    "Delta",
    "Header",
    "InvalidRequestError",
    "LoadProgress",
    "LoraplexError",
    "OverloadedError",
    "PermissionDeniedError",
    "Prompt",
    "RolloutArm",
    "Sampling",
    "ServerFaultError",
    "Stream",
    "Timings",
    "Tls",
    "TokenIds",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "Validation",
]
