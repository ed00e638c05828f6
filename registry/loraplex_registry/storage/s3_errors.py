"""What an answer of S3, or its silence, means: the AWS SDK's errors turned into ours.

Messages name the bucket, the operation and S3's error code, never a credential, a header or a signed URL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from ..errors import KeyAbsentError, KeyConflictError, StoreError, StoreRefusedError, StoreUnavailableError

_ABSENT: Final = frozenset({"NoSuchKey", "404", "NotFound"})
_UNAVAILABLE: Final = frozenset(
    {"InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "Throttling", "ThrottlingException"}
)
_T = TypeVar("_T")


class BusyError(StoreUnavailableError):
    """409: another write of the same object was in progress, and ours was not applied."""


class BrokenBodyError(StoreUnavailableError):
    """A download broke off after its headers."""


class NotModifiedError(StoreError):
    """304: the object still has the etag that was named."""


def call(url: str, verb: str, key: str, request: Callable[[], _T]) -> _T:
    """Run one SDK call and turn its errors into ours.

    Args:
        url: the root, for messages.
        verb: `read`, `write`, `list` or `delete`. The silence after a write is ambiguous.
        key: what it is about, for messages.
        request: the call.

    Raises:
        KeyAbsentError, KeyConflictError, NotModifiedError, BusyError: what S3 answered.
        StoreUnavailableError, StoreRefusedError: everything else.
    """
    from botocore import exceptions as sdk
    from botocore.parsers import ResponseParserError

    try:
        return request()
    except sdk.ClientError as error:
        raise of_answer(url, verb, key, error.response) from error
    except (sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.TokenRetrievalError) as error:
        raise StoreRefusedError(
            f"No complete AWS credentials were found for {url}; set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        ) from error
    except sdk.SSLError as error:
        raise StoreRefusedError(
            f"{url} cannot be spoken to over TLS; check that endpoint_url says http or https as the server does, and "
            "that AWS_CA_BUNDLE names the authority of its certificate."
        ) from error
    except (sdk.ConnectTimeoutError, sdk.EndpointConnectionError) as error:
        raise StoreUnavailableError(
            f"{url} cannot be reached; check the network and endpoint_url."
        ) from error
    except (sdk.HTTPClientError, sdk.ConnectionError, sdk.IncompleteReadError) as error:
        raise _silence(url, verb, key, type(error).__name__) from error
    except ResponseParserError as error:  # half an answer, or one of something that is not S3
        raise _silence(url, verb, key, "an answer that is not S3's") from error
    except (sdk.BotoCoreError, ValueError) as error:  # a profile, region or address that cannot be used
        raise StoreRefusedError(
            f"{url} cannot be used ({type(error).__name__}); check profile, region and endpoint_url."
        ) from error


def of_answer(url: str, verb: str, key: str, response: Any) -> StoreError:
    """Return the error that an answer with an error status stands for, by S3's code and the status."""
    code = str(response.get("Error", {}).get("Code", ""))[:64]
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return StoreRefusedError(f"{url}: there is no such bucket; make it or correct the address.")
    if code in _ABSENT or status == 404:
        return KeyAbsentError(f"{key} is not in {url}.")
    if status == 304:
        return NotModifiedError(f"{key} did not change in {url}.")
    if status == 409:
        return BusyError(f"{url} is busy with another write of {key}; try again.")
    if status in {412, 416}:
        return KeyConflictError(f"{key} changed in {url}.")
    if code == "NotImplemented":  # 501, by look-alikes: asking again changes nothing
        return of_code(url, verb, key, code)
    if status >= 500 or status == 429 or code in _UNAVAILABLE:
        return _silence(url, verb, key, code or str(status))
    return of_code(url, verb, key, code or str(status))


def of_code(url: str, verb: str, key: str, code: str) -> StoreError:
    """Return the error of an entry in the answer to a request about many keys."""
    if code in _UNAVAILABLE:
        return _silence(url, verb, key, code)
    return StoreRefusedError(
        f"{url} refused a {verb} of {key} with {code}; check credentials and permissions."
    )


def _silence(url: str, verb: str, key: str, reason: str) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"{url} failed at a {verb} of {key} ({reason}); try again.", ambiguous=verb == "write"
    )
