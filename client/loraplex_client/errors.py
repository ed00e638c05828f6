"""Every error a call can raise.

LoraplexError                    .code (the server's reason), .retryable, .retry_after_s, .metadata
├── the caller must act
│   ├── InvalidRequestError      a field is missing, malformed or out of range; .fields says which
│   │   ├── ContextTooLongError  prompt and answer do not fit the context
│   │   └── RequestIdReusedError this request id stands for another call
│   ├── UnsupportedByBaseError   text asked of a base that gives vectors, or the other way round
│   ├── UnauthenticatedError     no API key, or an unknown one
│   ├── PermissionDeniedError    this key may not do that
│   └── AdapterNotFoundError     no such adapter for this key
├── whoever published it must act
│   └── AdapterRefusedError      signature, digest, base model, shape or policy do not fit
├── nobody must act: try again
│   ├── UnavailableError         server, engine, registry or adapter not there right now
│   ├── OverloadedError          a queue or quota is full
│   └── DeadlineExceededError    the call's own time is up
└── ServerFaultError             a bug of the server's
"""

from collections.abc import Mapping


class LoraplexError(Exception):
    """Base of all errors of this package.

    Attributes:
        code: the server's reason, UPPER_SNAKE_CASE; "" when the server could not say.
        retry_after_s: seconds the server asks to wait before trying again, or None.
        metadata: the variables of the message, for machines.
        fields: (field, problem) pairs of a refused request.
    """

    retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        fields: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})
        self.fields = fields


class InvalidRequestError(LoraplexError):
    """The request itself is wrong; sending it again gives the same answer."""


class ContextTooLongError(InvalidRequestError):
    """Prompt and answer do not fit the model's context."""


class RequestIdReusedError(InvalidRequestError):
    """This caller gave the same request id to another call, or to one whose answer is too long to be told twice."""


class UnsupportedByBaseError(LoraplexError):
    """The server's base model gives vectors and not text, or text and not vectors."""


class UnauthenticatedError(LoraplexError):
    """Give `api_key=`; the server does not know this one or got none."""


class PermissionDeniedError(LoraplexError):
    """This API key may not do that."""


class AdapterNotFoundError(LoraplexError):
    """There is no such adapter for this API key."""


class AdapterRefusedError(LoraplexError):
    """The adapter is there, but it is not signed, not whole, not for this base, or not allowed."""


class UnavailableError(LoraplexError):
    """Not now; the same call may work later."""

    retryable = True


class OverloadedError(LoraplexError):
    """The server or the tenant has as many requests as it may."""

    retryable = True


class DeadlineExceededError(LoraplexError):
    """The call took longer than its timeout."""

    retryable = True


class ServerFaultError(LoraplexError):
    """The server failed in a way it did not foresee; its log has the id in the message."""
