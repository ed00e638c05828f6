"""Every error the server raises on purpose.

    ServerError                      .code (reason), .retry_after_s, .metadata
    ├── ConfigError                  the operator must act: a setting is wrong
    ├── RequestError                 the caller must act
    │   ├── InvalidRequestError      INVALID_ARGUMENT, names the field
    │   ├── ContextTooLongError      CONTEXT_TOO_LONG
    │   ├── UnauthenticatedError     UNAUTHENTICATED
    │   ├── UnsupportedByBaseError   UNSUPPORTED_BY_BASE
    │   ├── RequestIdReusedError     REQUEST_ID_REUSED
    │   ├── NotFoundError            ADAPTER_NOT_FOUND (also for forbidden: existence is hidden)
    │   └── ForbiddenError           POLICY_REFUSED (an action, never an adapter's existence)
    └── UnavailableError             nobody must act: try again
        ├── EngineUnavailableError   ENGINE_UNAVAILABLE
        ├── AdapterNotReadyError     ADAPTER_NOT_READY
        ├── QueueFullError           QUEUE_FULL
        └── TenantQuotaError         TENANT_QUOTA

Errors of the registry carry the same kind of `.code`; `calls.status.STATUS_OF_REASON` maps both to gRPC.
"""

from collections.abc import Mapping


class ServerError(Exception):
    """Base of the server's own errors.

    Attributes:
        code: stable reason, UPPER_SNAKE_CASE, sent as `google.rpc.ErrorInfo.reason`.
        retry_after_s: seconds after which trying again makes sense, or None.
        metadata: the variables that appear in the message, for machines. Never a secret.
    """

    code = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class ConfigError(ServerError):
    """A setting is missing, unknown or out of range; the message names the key and the file."""

    code = "INVALID_CONFIG"


class RequestError(ServerError):
    """The caller has to change the request."""

    code = "INVALID_ARGUMENT"


class InvalidRequestError(RequestError):
    """A field is missing, malformed or out of range."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}", metadata={"field": field})
        self.field = field
        self.problem = problem


class ContextTooLongError(RequestError):
    """Prompt and answer do not fit the context."""

    code = "CONTEXT_TOO_LONG"


class UnsupportedByBaseError(RequestError):
    """The base model is not served for this: text is asked of one that gives vectors, or the other way round."""

    code = "UNSUPPORTED_BY_BASE"


class RequestIdReusedError(RequestError):
    """The same caller used this request id for another call, or for one whose answer cannot be told twice."""

    code = "REQUEST_ID_REUSED"


class UnauthenticatedError(RequestError):
    """No credential, or one that is not known."""

    code = "UNAUTHENTICATED"


class NotFoundError(RequestError):
    """No such adapter for this caller."""

    code = "ADAPTER_NOT_FOUND"


class ForbiddenError(RequestError):
    """The caller may not do this."""

    code = "POLICY_REFUSED"


class UnavailableError(ServerError):
    """Not now; the same call may work later."""

    code = "ENGINE_UNAVAILABLE"


class EngineUnavailableError(UnavailableError):
    """The engine is starting, stopping or gone."""


class AdapterNotReadyError(UnavailableError):
    """The adapter could not be brought in within its time, or every slot is in use."""

    code = "ADAPTER_NOT_READY"


class QueueFullError(UnavailableError):
    """The server already holds as many requests as it may."""

    code = "QUEUE_FULL"


class TenantQuotaError(UnavailableError):
    """The tenant already has as many requests as it may."""

    code = "TENANT_QUOTA"
