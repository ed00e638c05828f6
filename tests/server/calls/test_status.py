"""The table from reasons to gRPC statuses."""

from google.rpc import error_details_pb2

from loraplex_registry.errors import RegistryError
from loraplex_server.calls.guard import DeadlineExceededError
from loraplex_server.calls.status import INTERNAL, STATUS_OF_REASON, failure_of
from loraplex_server.errors import (
    ConfigError,
    InvalidRequestError,
    QueueFullError,
    ServerError,
    TenantQuotaError,
)


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    found = {kind}
    for child in kind.__subclasses__():
        found |= subclasses(child)
    return found


def test_every_error_of_server_and_registry_has_a_row() -> None:
    kinds = subclasses(ServerError) | subclasses(RegistryError) | {DeadlineExceededError}
    here = {kind for kind in kinds if kind.__module__.startswith("loraplex_")}
    assert len(here) > 20
    without = {kind.__name__: kind.code for kind in here if kind.code not in STATUS_OF_REASON}  # type: ignore[attr-defined]
    assert without == {ConfigError.__name__: ConfigError.code}, (
        "ConfigError ends the process, all others reach callers"
    )


def test_every_status_carries_exactly_one_error_info_in_our_domain() -> None:
    for error in (
        InvalidRequestError("a", "b"),
        QueueFullError("full", retry_after_s=1.5),
        ValueError("secret"),
    ):
        infos = [
            d
            for d in failure_of(error, error_id="id1").proto.details
            if d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)
        ]
        assert len(infos) == 1
        info = error_details_pb2.ErrorInfo.FromString(infos[0].value)
        assert info.domain == "loraplex"


def test_an_unforeseen_error_shows_its_id_and_nothing_else() -> None:
    failed = failure_of(ValueError("password=hunter2"), error_id="id1")
    assert failed.code == INTERNAL
    assert "id1" in failed.message
    assert "hunter2" not in str(failed.proto)


def test_details_follow_the_error() -> None:
    kinds = [
        d.TypeName()
        for error in (
            InvalidRequestError("f", "p"),
            QueueFullError("full", retry_after_s=1.5),
            TenantQuotaError("full", metadata={"tenant": "acme"}),
        )
        for d in failure_of(error, error_id="x").proto.details
        if not d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)
    ]
    assert kinds == ["google.rpc.BadRequest", "google.rpc.RetryInfo", "google.rpc.QuotaFailure"]
