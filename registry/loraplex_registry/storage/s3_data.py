"""The fast path to S3: requests signed by the AWS SDK, sent over plain `http.client`, bodies never copied in Python.

botocore's client takes 0.1 s to make, a millisecond per request, and hands bodies over in copies. Here its SigV4 signer
and its credentials are used and nothing else of it; a download is read into one buffer per connection, an upload goes
from the file to the socket with sendfile.

Promises:

- the same answers as the SDK's path: whatever is neither a plain success nor a plain no (a redirect, a request it calls
  malformed, an outage, a wrong size) is handed to that path, which asks again and says what it means. A no (403, 404,
  412, 416) and every reply to a conditional write are judged here, since asking again would not change the answer or
  would change the meaning of the request;
- `endpoint` decides once whether this path may be used at all. Proxies, FIPS, dual-stack and accelerated endpoints,
  endpoints and S3 options from profile files, and buckets that cannot be a host name are left to the SDK;
- TLS is verified with the CA bundle the SDK would use; redirects are never followed; connection and read time-outs
  are those of the SDK's path.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.client
import os
import re
import select
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from urllib.parse import quote, urlsplit

from ..errors import DigestMismatchError, StoreUnavailableError
from ..format.manifest import FileEntry
from .s3_errors import BrokenBodyError, of_answer
from .store import CHUNK_BYTES, BlobProgress, Item, Piece, require_range

if TYPE_CHECKING:
    from .s3_client import S3Connection

BUFFER_BYTES: Final = CHUNK_BYTES
"""Bytes read from a socket before they are handed over. Every hand-over wakes Python, which costs more than the bytes
falling out of a core's second-level cache before they are hashed: 0.95 of the processor time that 512 KiB take.
"""

FIRST_BYTES: Final = 64 << 10
"""Most bytes of an answer's first piece: the caller sees a file's header soon, and how far away the storage is."""

CONNECTIONS_IDLE_MAX: Final = 64
"""Most connections kept open while nobody uses them."""

ERROR_BYTES_MAX: Final = 64 << 10
"""Longest error document that is read, in bytes."""

SEND_BYTES: Final = 1 << 20
"""Bytes of a file handed to the socket at once in an upload; progress is told in these steps."""

PART_SEND_BYTES: Final = 256 << 10
"""Bytes of a part handed to the socket at once; smaller, since several parts share the line and Ctrl-C waits for one.
"""

_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_REGION: Final = re.compile(r"(?!cn-|us-iso|eu-isoe|eusc-)[a-z]{2}(-[a-z]+)+-\d")
_IP: Final = re.compile(r"\d{1,3}(\.\d{1,3}){3}|localhost|\[[0-9a-f:]+\]")
_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_NO: Final = frozenset({403, 404, 412, 416})
_IO_ERRORS: Final = (OSError, http.client.HTTPException)


class PassOnError(Exception):
    """This path cannot answer; the SDK's path can."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a bucket's objects are: scheme, host, path before the key, and how requests are signed."""

    secure: bool
    host: str
    base_path: str
    region: str
    credentials: Any
    ca_bundle: str | None


def endpoint(session: Any, connection: S3Connection) -> Endpoint | None:
    """Return the endpoint, or None when this path must not be used.

    Args:
        session: a botocore session.
        connection: bucket, and endpoint and region as configured.
    """
    scoped = session.get_scoped_config()
    simple = not any(
        (
            "endpoint_url" in scoped,
            "services" in scoped,
            "s3" in scoped,
            session.get_config_variable("use_fips_endpoint"),
            session.get_config_variable("use_dualstack_endpoint"),
            session.get_config_variable("ignore_configured_endpoint_urls"),
            connection.write_arguments(),
        )
    )
    region = connection.region or session.get_config_variable("region") or "us-east-1"
    url = (
        connection.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    place = _place(url, region, connection) if simple else None
    if place is None or _proxied(f"{place[0]}://{place[1]}"):
        return None
    scheme, host, path = place
    credentials = session.get_credentials()
    if credentials is None:
        return None
    bundle = session.get_config_variable("ca_bundle")
    return Endpoint(scheme == "https", host, path, region, credentials, bundle)


def _place(url: str | None, region: str, connection: S3Connection) -> tuple[str, str, str] | None:
    """Return scheme, host and path before the key as the SDK would choose them; None for the unusual."""
    if url is None:
        known = _BUCKET.fullmatch(connection.bucket) and _REGION.fullmatch(region)
        return ("https", f"{connection.bucket}.s3.{region}.amazonaws.com", "/") if known else None
    parts = urlsplit(url)
    # The SDK puts the bucket into the host name of an endpoint from the environment unless that is an address.
    by_path = connection.endpoint_url is not None or _IP.fullmatch(parts.hostname or "")
    plain = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username)
    if not by_path or not plain or parts.scheme not in {"http", "https"} or not parts.hostname:
        return None
    return parts.scheme, parts.netloc, f"/{quote(connection.bucket, safe='-_.')}/"


def _proxied(url: str) -> bool:
    from botocore.utils import get_environ_proxies

    return urlsplit(url).scheme in get_environ_proxies(url)


class _Connection:
    """One connection with its buffer."""

    def __init__(self, place: Endpoint, context: ssl.SSLContext | None, timeout_s: float) -> None:
        from .s3_client import CONNECT_TIMEOUT_S

        self.http: http.client.HTTPConnection
        if context is None:
            self.http = http.client.HTTPConnection(place.host, timeout=CONNECT_TIMEOUT_S)
        else:
            self.http = http.client.HTTPSConnection(place.host, timeout=CONNECT_TIMEOUT_S, context=context)
        self.http.connect()
        self.http.sock.settimeout(timeout_s)
        self._buffer: memoryview | None = None

    @property
    def buffer(self) -> memoryview:
        """The bytes a body is read into."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(BUFFER_BYTES))
        return self._buffer

    def dropped(self) -> bool:
        """Say whether the other side has hung up, or said something unasked."""
        readable, _, _ = select.select([self.http.sock], [], [], 0)
        return bool(readable)

    def close(self) -> None:
        self.http.close()


class S3Data:
    """Objects of one bucket at one endpoint. Safe for many threads; connections are kept and reused."""

    def __init__(self, place: Endpoint, *, prefix: str, url: str, timeout_s: float) -> None:
        """Connect to nothing yet.

        Args:
            place: from `endpoint`.
            prefix: before every key; empty, or ending in "/".
            url: the root, for messages.
            timeout_s: longest silence within one request, in seconds.
        """
        self._place = place
        self._prefix = prefix
        self._url = url
        self._timeout_s = timeout_s
        self._context = _tls(place) if place.secure else None
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()  # guards _idle

    def get(self, key: str, *, limit_bytes: int, etag: str | None = None) -> Item | None:
        """Return a small object; None when it still has `etag`.

        At most one byte more than `limit_bytes` is returned.

        Raises:
            PassOnError: ask the SDK's path.
        """
        headers = {} if etag is None else {"If-None-Match": etag}
        with self._answer("GET", key, headers) as (answer, _):
            if answer.status == 304 and etag is not None:
                answer.read()
                return None
            self._raise_no(answer, key)
            if answer.status != 200 or not answer.headers.get("ETag"):
                raise PassOnError
            try:
                body = answer.read(limit_bytes + 1)
            except _IO_ERRORS as error:
                raise PassOnError from error
            if answer.length and len(body) <= limit_bytes:  # it broke off
                raise PassOnError
            return Item(body, answer.headers["ETag"])

    def read(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        """Yield a range; see `Store.read_range`.

        Raises:
            PassOnError: ask the SDK's path; with the first piece only.
            DigestMismatchError: the blob has another size.
            BrokenBodyError: it broke off later.
        """
        require_range(key, start=start, length=length, size_bytes=size_bytes)
        if length == 0:
            raise PassOnError
        with self._answer("GET", key, {"Range": f"bytes={start}-{start + length - 1}"}) as (
            answer,
            connection,
        ):
            self._raise_no(answer, key)
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status != 206 or found is None or answer.length != length:
                raise PassOnError
            if int(found[3]) != size_bytes:
                raise DigestMismatchError(
                    f"{key} in {self._url} has {found[3]} bytes, {size_bytes} were signed."
                )
            if (int(found[1]), int(found[2])) != (start, start + length - 1):
                raise PassOnError
            try:
                yield from _pieces(answer, connection.buffer, length)
            except _IO_ERRORS as error:
                raise BrokenBodyError(
                    "The storage broke off in the middle of an answer; try again."
                ) from error

    def put(self, key: str, body: bytes, condition: Mapping[str, str]) -> str:
        """Write a small object once and return its etag.

        Args:
            key: the object.
            body: its bytes.
            condition: `If-Match` or `If-None-Match`.

        Raises:
            PassOnError: nothing was written; ask the SDK's path.
            StoreUnavailableError: `ambiguous` when the reply is unknown.
            StoreError: what S3 answered; see `s3_errors.of_answer`.
        """
        digest = hashlib.sha256(body)
        headers = {
            **condition,
            "Content-Type": "application/json",
            "x-amz-checksum-sha256": base64.b64encode(digest.digest()).decode("ascii"),
        }
        return self._write(key, headers, digest.hexdigest(), len(body), body)

    def put_file(
        self, key: str, source: BinaryIO, file: FileEntry, progress: BlobProgress | None = None
    ) -> None:
        """Upload an open file in one request.

        Raises:
            PassOnError: it is not there for certain; ask the SDK's path, since repeating an upload is harmless.
            StoreError: S3 said no.
        """
        headers = {"x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(file.sha256)).decode("ascii")}
        try:
            self._write(key, headers, file.sha256, file.size, source, progress)
        except StoreUnavailableError as error:
            raise PassOnError from error

    def put_part(
        self,
        key: str,
        upload_id: str,
        number: int,
        body: bytes,
        sha256: str,
        progress: BlobProgress | None = None,
    ) -> str:
        """Send one part of an upload and return its etag.

        Args:
            key: the object the parts will become.
            upload_id: the storage's name for the upload.
            number: the part's, from 1.
            body: its bytes.
            sha256: their digest, in hex, which S3 compares.
            progress: told what was handed to the socket; what it raises ends the request.

        Raises:
            PassOnError: it is not there for certain; ask the SDK's path, since repeating a part is harmless.
            StoreError: S3 said no.
        """
        headers = {"x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(sha256)).decode("ascii")}
        query = f"partNumber={number}&uploadId={quote(upload_id, safe='-_.~')}"
        try:
            return self._write(key, headers, sha256, len(body), body, progress, query=query)
        except StoreUnavailableError as error:
            raise PassOnError from error

    def _write(
        self,
        key: str,
        headers: dict[str, str],
        sha256: str,
        size: int,
        body: bytes | BinaryIO,
        progress: BlobProgress | None = None,
        *,
        query: str = "",
    ) -> str:
        headers = {**headers, "Content-Length": str(size)}
        path, headers = self._signed("PUT", key, headers, sha256, query=query)
        connection = self._connection()
        try:
            connection.http.putrequest("PUT", path, skip_accept_encoding=True, skip_host=True)
            for name, value in headers.items():
                connection.http.putheader(name, value)
            connection.http.endheaders(body if isinstance(body, bytes) and progress is None else None)
            if not isinstance(body, bytes):
                _send_file(connection, body, size, progress)
            elif progress is not None:
                _send_bytes(connection, body, progress)
            answer = connection.http.getresponse()
            text = answer.read(ERROR_BYTES_MAX)
        except _IO_ERRORS as error:
            connection.close()
            raise StoreUnavailableError(
                f"{self._url} failed at a write of {key} ({type(error).__name__}); try again.", ambiguous=True
            ) from error
        except BaseException:  # Ctrl-C, or the progress wants no more
            connection.close()
            raise
        self._give_back(connection, answer)
        if 300 <= answer.status < 403:  # a redirect, or a request it cannot read: nothing was written
            raise PassOnError
        if answer.status != 200:
            raise of_answer(self._url, "write", key, _as_sdk(answer.status, text))
        if not answer.headers.get("ETag"):
            raise StoreUnavailableError(f"{self._url} confirmed {key} without an etag.", ambiguous=True)
        return str(answer.headers["ETag"])

    def _raise_no(self, answer: http.client.HTTPResponse, key: str) -> None:
        """Raise what a plain no means.

        Raises:
            PassOnError: the no broke off.
            StoreError: what it means; see `s3_errors.of_answer`.
        """
        if answer.status not in _NO:
            return
        try:
            text = answer.read(ERROR_BYTES_MAX)
        except _IO_ERRORS as error:
            raise PassOnError from error
        raise of_answer(self._url, "read", key, _as_sdk(answer.status, text))

    @contextlib.contextmanager
    def _answer(
        self, method: str, key: str, headers: dict[str, str]
    ) -> Iterator[tuple[http.client.HTTPResponse, _Connection]]:
        """Send a request without a body and yield the answer; the connection is kept only if it was read whole."""
        path, headers = self._signed(method, key, headers, None)
        connection = self._connection()
        answer = None
        try:
            try:
                connection.http.putrequest(method, path, skip_accept_encoding=True, skip_host=True)
                for name, value in headers.items():
                    connection.http.putheader(name, value)
                connection.http.endheaders()
                answer = connection.http.getresponse()
            except _IO_ERRORS as error:
                raise PassOnError from error
            yield answer, connection
        finally:
            if answer is None:
                connection.close()
            else:
                self._give_back(connection, answer)

    def _signed(
        self, method: str, key: str, headers: Mapping[str, str], sha256: str | None, *, query: str = ""
    ) -> tuple[str, dict[str, str]]:
        """Return path and headers of a request, signed with Signature Version 4 by the SDK."""
        from botocore.awsrequest import AWSRequest

        place = self._place
        path = place.base_path + quote(self._prefix + key, safe="/~") + ("?" + query if query else "")
        scheme = "https" if place.secure else "http"
        request = AWSRequest(method, f"{scheme}://{place.host}{path}", headers=dict(headers))
        signer = _signer_class()(place.credentials.get_frozen_credentials(), place.region, sha256)
        signer.add_auth(request)
        return path, {"Host": place.host, **dict(request.headers.items())}

    def _connection(self) -> _Connection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                break
            if not connection.dropped():
                return connection
            connection.close()
        try:
            return _Connection(self._place, self._context, self._timeout_s)
        except _IO_ERRORS as error:
            raise PassOnError from error

    def _give_back(self, connection: _Connection, answer: http.client.HTTPResponse) -> None:
        """Keep a connection whose answer was read to its end."""
        kept = answer.isclosed() and not answer.will_close and connection.http.sock is not None
        with self._lock:
            if kept and len(self._idle) < CONNECTIONS_IDLE_MAX:
                self._idle.append(connection)
                return
        connection.close()


def _pieces(answer: http.client.HTTPResponse, buffer: memoryview, length: int) -> Iterator[Piece]:
    left = length
    while left > 0:
        done = length - left
        wanted = len(buffer) - done % len(buffer) if done else FIRST_BYTES
        count = answer.readinto(buffer[: min(left, wanted)])
        if count == 0:
            raise http.client.IncompleteRead(b"", left)
        left -= count
        if left == 0:
            answer.read()  # marks the answer as read, so that the connection can be used again
        yield buffer[:count]


def _send_file(connection: _Connection, source: BinaryIO, size: int, progress: BlobProgress | None) -> None:
    """Send a file's bytes; the kernel copies them when the connection is not encrypted."""
    sent = 0
    while sent < size:
        count = connection.http.sock.sendfile(source, sent, min(SEND_BYTES, size - sent))
        if not count:
            raise ConnectionAbortedError("the file became shorter")
        sent += count
        if progress is not None:
            progress(count)


def _send_bytes(connection: _Connection, body: bytes, progress: BlobProgress) -> None:
    view = memoryview(body)
    for start in range(0, len(view), PART_SEND_BYTES):
        piece = view[start : start + PART_SEND_BYTES]
        connection.http.sock.sendall(piece)
        progress(len(piece))


@functools.cache
def _signer_class() -> Any:
    """Return the SDK's signer, told the body's digest when that is known already."""
    from botocore.auth import S3SigV4Auth

    base: Any = S3SigV4Auth

    class Signer(base):  # type: ignore[misc]
        def __init__(self, credentials: Any, region: str, sha256: str | None) -> None:
            super().__init__(credentials, "s3", region)
            self._sha256 = sha256

        def payload(self, request: Any) -> str:
            return self._sha256 or str(super().payload(request))

    return Signer


def _tls(place: Endpoint) -> ssl.SSLContext:
    from botocore.httpsession import get_cert_path

    context = ssl.create_default_context(cafile=place.ca_bundle or get_cert_path(True))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _as_sdk(status: int, body: bytes) -> dict[str, Any]:
    """Return an error answer in the form the SDK gives it."""
    code = _CODE.search(body)
    return {
        "Error": {"Code": code[1].decode("ascii") if code else str(status)},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
