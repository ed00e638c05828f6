"""From an error to a gRPC status: one table, and every status carries one `google.rpc.ErrorInfo`.

Sources: AIP-193 (ErrorInfo, one of each detail), google/rpc/error_details.proto. INTERNAL means a bug of
ours: such errors show an id to the caller and their traceback to the log only.
"""

from dataclasses import dataclass

from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from loraplex_server.errors import InvalidRequestError, TenantQuotaError

DOMAIN = "loraplex"

# Codes of google.rpc.Code, written out so that this module does not need grpc.
OK, CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = 0, 1, 3, 4, 5
ALREADY_EXISTS = 6
PERMISSION_DENIED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED = 7, 8, 9, 10
UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS, UNAUTHENTICATED = 12, 13, 14, 15, 16

STATUS_OF_REASON: dict[str, int] = {
    "INVALID_ARGUMENT": INVALID_ARGUMENT,
    "CONTEXT_TOO_LONG": INVALID_ARGUMENT,
    "UNAUTHENTICATED": UNAUTHENTICATED,
    "ADAPTER_NOT_FOUND": NOT_FOUND,
    "NOT_FOUND": NOT_FOUND,
    "POLICY_REFUSED": PERMISSION_DENIED,
    "SIGNATURE_INVALID": FAILED_PRECONDITION,
    "DIGEST_MISMATCH": FAILED_PRECONDITION,
    "BASE_MISMATCH": FAILED_PRECONDITION,
    "UNSUPPORTED_ADAPTER": FAILED_PRECONDITION,
    "RANK_TOO_LARGE": FAILED_PRECONDITION,
    "REVOKED": FAILED_PRECONDITION,
    "EXPIRED": FAILED_PRECONDITION,
    "ROLLBACK": FAILED_PRECONDITION,
    "UNSUPPORTED_BY_BASE": FAILED_PRECONDITION,
    "CONFLICT": ABORTED,
    "REQUEST_ID_REUSED": ALREADY_EXISTS,
    "QUEUE_FULL": RESOURCE_EXHAUSTED,
    "TENANT_QUOTA": RESOURCE_EXHAUSTED,
    "ADAPTER_NOT_READY": UNAVAILABLE,
    "STORE_UNAVAILABLE": UNAVAILABLE,
    "ENGINE_UNAVAILABLE": UNAVAILABLE,
    "DEADLINE_EXCEEDED": DEADLINE_EXCEEDED,
    "UNIMPLEMENTED": UNIMPLEMENTED,
    "INTERNAL": INTERNAL,
}


@dataclass(frozen=True)
class Failure:
    """A status ready to send."""

    reason: str
    code: int
    message: str
    proto: status_pb2.Status


def failure_of(error: Exception, *, error_id: str) -> Failure:
    """Describe an error to the caller.

    An error without a known `.code` is INTERNAL: the caller sees `error_id`, which the log has too.
    """
    reason = str(getattr(error, "code", "INTERNAL"))
    if reason not in STATUS_OF_REASON or reason == "INTERNAL":
        message = f"an error of ours, reported as {error_id}"
        return failure("INTERNAL", message, metadata={"error_id": error_id})
    details: list[any_pb2.Any] = []
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        _pack(details, error_details_pb2.RetryInfo(retry_delay=_duration(retry_after_s)))
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.problem)
        _pack(details, error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, TenantQuotaError):
        subject = f"tenant:{error.metadata.get('tenant', '')}"
        quota = error_details_pb2.QuotaFailure.Violation(subject=subject, description=str(error))
        _pack(details, error_details_pb2.QuotaFailure(violations=[quota]))
    return failure(reason, str(error), metadata=getattr(error, "metadata", {}), details=details)


def failure(
    reason: str,
    message: str,
    *,
    metadata: dict[str, str] | None = None,
    details: list[any_pb2.Any] | None = None,
) -> Failure:
    """Build a status with its ErrorInfo first. `reason` must have a row in `STATUS_OF_REASON`."""
    code = STATUS_OF_REASON[reason]
    packed: list[any_pb2.Any] = []
    _pack(packed, error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata or {}))
    proto = status_pb2.Status(code=code, message=message, details=[*packed, *(details or [])])
    return Failure(reason=reason, code=code, message=message, proto=proto)


def _pack(details: list[any_pb2.Any], message: object) -> None:
    wrapped = any_pb2.Any()
    wrapped.Pack(message)  # type: ignore[arg-type]
    details.append(wrapped)


def _duration(seconds: float) -> duration_pb2.Duration:
    whole = int(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))
