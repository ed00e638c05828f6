"""The connection to one bucket: a client of the AWS SDK made on first use, and one rule for trying again.

Of boto3 only the lower half, botocore, is used. Its own retries are off everywhere: a retried conditional write that
had succeeded answers 412 (trino#27400), and two layers of retries multiply. `repeat` is the one layer there is.
"""

from __future__ import annotations

import datetime as dt
import functools
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..errors import StoreUnavailableError
from .s3_errors import call
from .s3_options import S3Options

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

    from .s3_data import S3Data

TRIES_MAX: Final = 5
"""How often a request that may be repeated is sent."""

BACKOFF_S: Final = 0.05
"""Mean wait before the second try, in seconds; doubled for each further one, so 0.75 s in all."""

CONNECT_TIMEOUT_S: Final = 5.0
"""Seconds to wait for a connection."""

CONNECTIONS_MAX: Final = 64
"""Connections kept open per client."""

_T = TypeVar("_T")
_jitter = random.SystemRandom()


class S3Connection:
    """A bucket and a prefix in it. Nothing is contacted, and no credential looked for, before the first request.

    Args:
        bucket: its name.
        prefix: key prefix without slashes at the ends; may be empty.
        endpoint_url: an S3 server other than AWS.
        region: AWS region.
        options: see `S3Options`.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        options: S3Options | None = None,
    ) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.options = options or S3Options()
        self.endpoint_url = endpoint_url
        self.region = region
        self._client: S3Client | None = None
        self._session: Any = None
        self._data: list[S3Data | None] = []
        self._lock = threading.Lock()  # guards _client, _session and _data

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def place(self, key: str) -> dict[str, Any]:
        """Return the arguments that name an object."""
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def write_arguments(self) -> dict[str, Any]:
        """Return the arguments that every new object gets: encryption at rest and object lock."""
        options = self.options
        arguments: dict[str, Any] = {}
        if options.sse is not None:
            arguments["ServerSideEncryption"] = options.sse
        if options.sse_kms_key_id is not None:
            arguments["SSEKMSKeyId"] = options.sse_kms_key_id
        if options.lock_mode is not None and options.lock_days is not None:
            arguments["ObjectLockMode"] = options.lock_mode
            until = dt.datetime.now(dt.UTC) + dt.timedelta(days=options.lock_days)
            arguments["ObjectLockRetainUntilDate"] = until
        return arguments

    def once(self, verb: str, key: str, request: Callable[[S3Client], _T]) -> _T:
        """Send a request once; see `s3_errors.call` for what it raises."""
        return call(self.url, verb, key, lambda: request(self.client()))

    def repeat(self, verb: str, key: str, request: Callable[[S3Client], _T], *, tried: int = 0) -> _T:
        """Send a request that may be repeated, at most TRIES_MAX times and not after `timeout_s` seconds.

        Only an outage is tried again: a refusal (403) or a failed condition (412) stays what it is.

        Args:
            verb: see `s3_errors.call`.
            key: see `s3_errors.call`.
            request: the request.
            tried: how often it was sent already, by the fast path.
        """
        deadline = time.monotonic() + self.options.timeout_s
        for attempt in range(tried + 1, TRIES_MAX + 1):
            try:
                return self.once(verb, key, request)
            except StoreUnavailableError:
                if attempt == TRIES_MAX or time.monotonic() > deadline:
                    raise
                pause(attempt)
        raise AssertionError("unreachable")

    def client(self) -> S3Client:
        """Return the client. Made late: looking for credentials may use the network."""
        with self._lock:
            if self._client is None:
                self._client = call(self.url, "read", "credentials", self._new_client)
            return self._client

    def data(self) -> S3Data | None:
        """Return the fast path; None where only the SDK's path may be used. Made late, as the client."""
        with self._lock:
            if not self._data:
                self._data.append(call(self.url, "read", "credentials", self._new_data))
            return self._data[0]

    def _new_data(self) -> S3Data | None:
        from .s3_data import S3Data, endpoint

        self._session = self._session or _new_session()
        place = endpoint(self._session, self)
        if place is None:
            return None
        return S3Data(place, prefix=self.prefix, url=self.url, timeout_s=self.options.timeout_s)

    def _new_client(self) -> S3Client:
        from botocore.config import Config

        session = self._session = self._session or _new_session()
        checksums: Any = self.options.checksums
        config: Any = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=self.options.timeout_s,
            retries={"total_max_attempts": 1, "mode": "standard"},
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
            max_pool_connections=CONNECTIONS_MAX,
            # Look-alikes rarely serve one host name per bucket; AWS itself is addressed as the SDK thinks best.
            s3={"addressing_style": "path" if self.endpoint_url else "auto"},
        )
        region = self.region or session.get_config_variable("region") or "us-east-1"
        client: S3Client = session.create_client(
            "s3", endpoint_url=self.endpoint_url, region_name=region, config=config
        )
        return client


def pause(attempt: int) -> None:
    """Wait before the try that follows try number `attempt` (from 1), a random time so that rivals spread out."""
    time.sleep(BACKOFF_S * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5))


@functools.cache
def _loader() -> Any:
    """The SDK's service descriptions: 0.2 s to parse, the same for every client, so parsed once per process."""
    from botocore.loaders import create_loader

    return create_loader()


def _new_session() -> Any:
    """A session of botocore, the part of boto3 that makes clients; the rest of boto3 is not needed here."""
    from botocore.session import get_session

    session = get_session()
    session.register_component("data_loader", _loader())
    return session
