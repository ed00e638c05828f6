"""A store in an S3 bucket, or in anything that speaks S3 with conditional writes.

The only module that knows the AWS SDK (boto3, of which it uses the lower half, botocore).

- create is `PutObject If-None-Match: *`, swap is `PutObject If-Match: <etag>`; the SDK's own retries are off for both,
  since a retried conditional write that had succeeded answers 412 (trino#27400). 409 means that S3 did not apply
  the write because of a concurrent one, and is tried again here a few times; a lost reply is `ambiguous`.
- blobs go up with the SHA-256 that S3 checks on arrival, in parts above 64 MiB, and come down in ranges of 8 MiB, a few
  in flight, each pinned by `If-Match` to the version the first range saw.
- nothing is contacted before the first operation, so a server may start while the storage is down.

Error messages name the bucket, the operation and S3's error code, never a credential, a header or a signed URL.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn, TypeVar

from .errors import (
    DamagedError,
    DigestMismatchError,
    KeyAbsentError,
    KeyConflictError,
    SettingsError,
    StoreError,
    StoreRefusedError,
    StoreUnavailableError,
)
from .manifest import FileEntry
from .store import CHUNK_BYTES, BlobProgress, Item
from .weights import open_regular

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

RANGE_BYTES: Final = 8 << 20
"""Bytes of one ranged download."""

RANGES_IN_FLIGHT: Final = 4
"""Ranges asked for ahead; bounds memory to RANGES_IN_FLIGHT * RANGE_BYTES (32 MiB) per download."""

PART_BYTES: Final = 16 << 20
"""Bytes of one part of a multipart upload."""

MULTIPART_ABOVE_BYTES: Final = 64 << 20
"""Files longer than this go up in parts."""

TRIES_MAX: Final = 3
"""How often a read or an upload is tried, by the SDK and by us."""

CONFLICT_TRIES_MAX: Final = 5
"""How often a conditional write that S3 answered with 409 is tried."""

CONNECT_TIMEOUT_S: Final = 5.0
"""Seconds to wait for a connection."""

_ABSENT = frozenset({"NoSuchKey", "404", "NotFound"})
_UNAVAILABLE = frozenset(
    {"InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "Throttling", "ThrottlingException"}
)
_T = TypeVar("_T")


class S3Store:
    """See the module."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        checksums: str = "when_required",
        timeout_s: float = 30.0,
    ) -> None:
        if checksums not in {"when_required", "when_supported"}:
            raise SettingsError(f"checksums {checksums!r} is unknown; use when_required or when_supported.")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint_url = endpoint_url
        self._region = region
        self._checksums: Any = checksums
        self._timeout_s = timeout_s
        self._clients: dict[int, S3Client] = {}
        self._session: Any = None
        self._lock = threading.Lock()  # guards _clients and _session

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def prepare(self) -> None:
        """See `Store.prepare`; a bucket is made by its owner."""

    def get(self, key: str, *, limit_bytes: int) -> Item:
        """See `Store.get`."""

        def attempt() -> Item:
            answer = self._reader().get_object(Bucket=self._bucket, Key=self._key(key))
            return Item(_body(answer, limit_bytes + 1), answer["ETag"])

        item = self._read("read", key, attempt)
        if len(item.body) > limit_bytes:
            raise DamagedError(f"{key} in {self.url} is longer than {limit_bytes} bytes.")
        return item

    def create(self, key: str, body: bytes) -> str:
        """See `Store.create`."""
        return self._write(key, body, IfNoneMatch="*")

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        """See `Store.swap`."""
        try:
            return self._write(key, body, IfMatch=etag)
        except KeyAbsentError as error:  # S3 answers 404 to If-Match on a key that is gone
            raise KeyConflictError(f"{key} is gone from {self.url}.") from error

    def put_blob(self, key: str, path: Path, file: FileEntry, *, progress: BlobProgress | None = None) -> int:
        """See `Store.put_blob`."""
        with open_regular(path) as source:
            if file.size > MULTIPART_ABOVE_BYTES:
                return self._put_parts(key, source, file, progress)
            reader = _CountingReader(source, file.size, progress)
            try:
                self._guarded(
                    "write",
                    key,
                    lambda: self._reader().put_object(
                        Bucket=self._bucket,
                        Key=self._key(key),
                        Body=reader,  # type: ignore[arg-type]
                        ContentLength=file.size,
                        ChecksumSHA256=base64.b64encode(bytes.fromhex(file.sha256)).decode("ascii"),
                    ),
                )
            except StoreError as error:
                _refuse_changed(source, path.name, file, error)
        return 1

    def read_blob(self, key: str, *, size_bytes: int) -> Iterator[bytes]:
        """See `Store.read_blob`."""
        starts = iter(range(0, size_bytes, RANGE_BYTES))
        first, etag = self._range(key, next(starts, 0), size_bytes, etag=None)
        yield from _split(first)
        with ThreadPoolExecutor(RANGES_IN_FLIGHT, thread_name_prefix="loraplex-s3") as pool:
            flying: deque[Future[tuple[bytes, str]]] = deque()
            try:
                for start in starts:
                    flying.append(pool.submit(self._range, key, start, size_bytes, etag=etag))
                    if len(flying) >= RANGES_IN_FLIGHT:
                        yield from _split(flying.popleft().result()[0])
                while flying:
                    yield from _split(flying.popleft().result()[0])
            finally:
                for future in flying:
                    future.cancel()

    def children(self, prefix: str) -> Iterator[str]:
        """See `Store.children`."""
        token: dict[str, Any] = {}
        while True:
            page: Any = self._read("list", prefix, lambda token=token: self._list(prefix, token))  # type: ignore[misc]
            names = [item["Key"] for item in page.get("Contents", [])]
            names += [item["Prefix"] for item in page.get("CommonPrefixes", [])]
            yield from sorted(name.removeprefix(self._key(prefix)) for name in names)
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _list(self, prefix: str, token: dict[str, Any]) -> Any:
        return self._reader().list_objects_v2(
            Bucket=self._bucket, Prefix=self._key(prefix), Delimiter="/", **token
        )

    def _key(self, key: str) -> str:
        return self._prefix + key

    def _write(self, key: str, body: bytes, **condition: str) -> str:
        for attempt in range(CONFLICT_TRIES_MAX):
            try:
                answer = self._guarded(
                    "write",
                    key,
                    lambda: self._writer().put_object(
                        Bucket=self._bucket,
                        Key=self._key(key),
                        Body=body,
                        ContentType="application/json",
                        ChecksumSHA256=base64.b64encode(hashlib.sha256(body).digest()).decode("ascii"),
                        **condition,  # type: ignore[arg-type]
                    ),
                )
            except _BusyError:
                time.sleep(
                    0.02 * 2**attempt
                )  # another write to this key was in progress and ours was not applied
                continue
            return answer["ETag"]
        raise StoreUnavailableError(f"{self.url} kept answering 409 to a write of {key}; try again.")

    def _range(self, key: str, start: int, size_bytes: int, *, etag: str | None) -> tuple[bytes, str]:
        """Return one range of a blob and the blob's etag, checking that the blob has the size that was signed."""
        end = min(start + RANGE_BYTES, size_bytes)
        pin: Any = {} if etag is None else {"IfMatch": etag}

        def attempt() -> tuple[bytes, str]:
            answer = self._reader().get_object(
                Bucket=self._bucket, Key=self._key(key), Range=f"bytes={start}-{end - 1}", **pin
            )
            total = answer.get("ContentRange", "").rpartition("/")[2]
            if total != str(size_bytes):
                raise DigestMismatchError(f"{key} in {self.url} has {total} bytes, {size_bytes} were signed.")
            return _body(answer, end - start + 1), answer["ETag"]

        try:
            body, found = self._read("read", key, attempt)
        except KeyConflictError as error:  # 412 on the pin, or 416: not the blob that was signed
            raise DigestMismatchError(f"{key} in {self.url} changed while it was read.") from error
        if len(body) != end - start:
            raise StoreUnavailableError(f"{self.url} sent a range of {key} with the wrong length; try again.")
        return body, found

    def _put_parts(self, key: str, source: BinaryIO, file: FileEntry, progress: BlobProgress | None) -> int:
        """Upload in parts; the object appears only when the bytes read were the ones expected."""
        place: Any = {"Bucket": self._bucket, "Key": self._key(key)}
        upload = self._guarded(
            "write", key, lambda: self._reader().create_multipart_upload(**place, ChecksumAlgorithm="SHA256")
        )
        place["UploadId"] = upload["UploadId"]
        try:
            parts = self._send_parts(key, place, source, file, progress)
            done: Any = {"Parts": parts}
            self._guarded(
                "write", key, lambda: self._reader().complete_multipart_upload(**place, MultipartUpload=done)
            )
        except BaseException:
            with suppress(Exception):  # best effort; a bucket rule removes what stays behind
                self._writer().abort_multipart_upload(**place)
            raise
        return len(parts) + 2

    def _send_parts(
        self, key: str, place: Any, source: BinaryIO, file: FileEntry, progress: BlobProgress | None
    ) -> list[Any]:
        digest, size = hashlib.sha256(), 0
        parts: list[Any] = []
        while chunk := source.read(PART_BYTES):
            digest.update(chunk)
            size += len(chunk)
            part: Any = {
                "PartNumber": len(parts) + 1,
                "ChecksumSHA256": base64.b64encode(hashlib.sha256(chunk).digest()).decode("ascii"),
            }
            answer = self._guarded(
                "write",
                key,
                lambda part=part, chunk=chunk: self._reader().upload_part(**place, **part, Body=chunk),  # type: ignore[misc]
            )
            parts.append({**part, "ETag": answer["ETag"]})
            if progress is not None:
                progress(len(chunk))
        if (size, digest.hexdigest()) != (file.size, file.sha256):
            raise DigestMismatchError(
                f"{file.name} changed while it was published; leave it alone and push again."
            )
        return parts

    def _read(self, verb: str, key: str, attempt: Callable[[], _T]) -> _T:
        """Run a read, and run it again when its body broke off, which the SDK's retries do not cover."""
        for tries in range(1, TRIES_MAX + 1):
            try:
                return self._guarded(verb, key, attempt)
            except _BrokenBodyError as error:
                if tries == TRIES_MAX:
                    raise StoreUnavailableError(
                        f"{self.url} broke off while {key} was read; try again."
                    ) from error
        raise AssertionError("unreachable")

    def _guarded(self, verb: str, key: str, call: Callable[[], _T]) -> _T:
        """Run one SDK call and turn its errors into ours."""
        from botocore import exceptions as sdk

        try:
            return call()
        except sdk.ClientError as error:
            self._raise_answer(verb, key, error)
        except (sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.TokenRetrievalError) as error:
            raise StoreRefusedError(
                f"No complete AWS credentials were found for {self.url}; set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY."
            ) from error
        except (sdk.ConnectTimeoutError, sdk.EndpointConnectionError) as error:
            raise StoreUnavailableError(
                f"{self.url} cannot be reached; check the network and endpoint_url."
            ) from error
        except (sdk.HTTPClientError, sdk.ConnectionError) as error:
            raise StoreUnavailableError(
                f"{self.url} failed at a {verb} of {key} ({type(error).__name__}); try again.",
                ambiguous=verb == "write",
            ) from error
        except (sdk.BotoCoreError, ValueError) as error:  # a profile, region or address that cannot be used
            raise StoreRefusedError(
                f"{self.url} cannot be used ({type(error).__name__}); check profile, region and endpoint_url."
            ) from error

    def _raise_answer(self, verb: str, key: str, error: Any) -> NoReturn:
        """Classify an answer of S3 by its error code and status."""
        code = str(error.response.get("Error", {}).get("Code", ""))[:64]
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            raise StoreRefusedError(
                f"{self.url}: there is no such bucket; make it or correct the address."
            ) from error
        if code in _ABSENT or status == 404:
            raise KeyAbsentError(f"{key} is not in {self.url}.") from error
        if status == 409:
            raise _BusyError from error
        if status in {412, 416}:
            raise KeyConflictError(f"{key} changed in {self.url}.") from error
        if status >= 500 or status == 429 or code in _UNAVAILABLE:
            raise StoreUnavailableError(
                f"{self.url} answered {code or status} to a {verb} of {key}; try again.",
                ambiguous=verb == "write",
            ) from error
        raise StoreRefusedError(
            f"{self.url} refused a {verb} of {key} with {code or status}; check credentials and permissions."
        ) from error

    def _reader(self) -> S3Client:
        """Client for everything that may be repeated."""
        return self._client(TRIES_MAX)

    def _writer(self) -> S3Client:
        """Client for conditional writes: one attempt, because only we know what a second one means."""
        return self._client(1)

    def _client(self, attempts: int) -> S3Client:
        """Return the client with so many attempts. Made late: looking for credentials may use the network."""
        with self._lock:
            if attempts not in self._clients:
                self._clients[attempts] = self._new_client(attempts)
            return self._clients[attempts]

    def _new_client(self, attempts: int) -> S3Client:
        from botocore.config import Config

        session = self._session = self._session or _new_session()
        config: Any = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=self._timeout_s,
            retries={"total_max_attempts": attempts, "mode": "standard"},
            request_checksum_calculation=self._checksums,
            response_checksum_validation=self._checksums,
            max_pool_connections=32,
            # Look-alikes rarely serve one host name per bucket; AWS itself is addressed as the SDK thinks best.
            s3={"addressing_style": "path" if self._endpoint_url else "auto"},
        )
        region = self._region or session.get_config_variable("region") or "us-east-1"
        client: S3Client = session.create_client(
            "s3", endpoint_url=self._endpoint_url, region_name=region, config=config
        )
        return client


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


class _BusyError(StoreUnavailableError):
    """409: a concurrent write won and ours was not applied."""

    def __init__(self) -> None:
        super().__init__("The storage is busy with another write of the same object; try again.")


class _BrokenBodyError(Exception):
    """A download broke off after its headers."""


class _CountingReader:
    """A file object that tells how far it was read; the SDK may rewind it to sign or to send again."""

    def __init__(self, file: BinaryIO, size_bytes: int, progress: BlobProgress | None) -> None:
        self._file = file
        self._size = size_bytes
        self._progress = progress
        self._told = 0

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        position = self._file.tell()
        if self._progress is not None and position > self._told:
            self._progress(position - self._told)
            self._told = position
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _refuse_changed(source: BinaryIO, name: str, file: FileEntry, error: StoreError) -> NoReturn:
    """S3 refuses bytes that do not have the stated checksum; say so when the file is the reason."""
    source.seek(0)
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    if (size, digest.hexdigest()) != (file.size, file.sha256):
        raise DigestMismatchError(
            f"{name} changed while it was published; leave it alone and push again."
        ) from error
    raise error


def _body(answer: Any, limit_bytes: int) -> bytes:
    """Read at most `limit_bytes` of an answer's body.

    Reads until the end or the limit, because the SDK notices a body that broke off only at the read after the last.
    """
    from botocore import exceptions as sdk

    chunks: list[bytes] = []
    left = limit_bytes
    try:
        # Not `with answer["Body"]`: that yields urllib3's stream, which takes a broken end for an end.
        with closing(answer["Body"]) as body:
            while left > 0 and (chunk := body.read(left)):
                chunks.append(chunk)
                left -= len(chunk)
        return b"".join(chunks)
    except (sdk.HTTPClientError, sdk.IncompleteReadError) as error:
        raise _BrokenBodyError from error


def _split(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]
