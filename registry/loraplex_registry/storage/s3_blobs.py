"""Blobs of an S3 store by plain requests: one upload, one ranged download that streams. Long files: `s3_uploads`.

Uploads carry the SHA-256 that S3 checks on arrival, so a damaged upload is refused instead of stored.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import DigestMismatchError, KeyConflictError, StoreError, StoreUnavailableError
from ..format.manifest import FileEntry
from ..validation.weights import open_regular
from . import s3_uploads
from .s3_client import S3Connection
from .s3_data import PassOnError
from .s3_errors import BrokenBodyError, call
from .s3_parts import changed_error
from .s3_uploads import S3Uploads
from .store import CHUNK_BYTES, BlobProgress, Piece, UploadLog, require_range


class S3Blobs:
    """See the module."""

    def __init__(self, connection: S3Connection, uploads: S3Uploads) -> None:
        self._connection = connection
        self._uploads = uploads

    def put(
        self,
        key: str,
        path: Path,
        file: FileEntry,
        *,
        progress: BlobProgress | None = None,
        upload: UploadLog | None = None,
    ) -> int:
        """See `Store.put_blob`."""
        with open_regular(path) as source:
            # A body shorter than its stated length would make the server wait for the rest until the timeout.
            if os.fstat(source.fileno()).st_size != file.size:
                raise changed_error(path.name)
            if file.size > s3_uploads.MULTIPART_ABOVE_BYTES:
                return self._uploads.put(key, source, file, progress=progress, log=upload)
            data = self._connection.data()
            if data is not None:
                with suppress(PassOnError):
                    data.put_file(key, source, file, progress)
                    return 1
            reader = _CountingReader(source, file.size, progress)
            arguments: Any = {
                **self._connection.place(key),
                **self._connection.write_arguments(),
                "ContentLength": file.size,
                "ChecksumSHA256": base64.b64encode(bytes.fromhex(file.sha256)).decode("ascii"),
            }
            try:
                self._connection.repeat(
                    "write",
                    key,
                    lambda client: client.put_object(**arguments, Body=reader.rewound()),
                    tried=int(data is not None),
                )
            except StoreError as error:
                _refuse_changed(source, path.name, file, error)
        return 1

    def read(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        """See `Store.read_range`; one request."""
        require_range(key, start=start, length=length, size_bytes=size_bytes)
        connection = self._connection
        data = connection.data()
        if data is not None:
            with suppress(PassOnError), _signed_size(connection, key, size_bytes):
                yield from data.read(key, start=start, length=length, size_bytes=size_bytes)
                return
        # An empty range cannot be asked for (RFC 9110, 14.1.1), so an empty blob is asked for whole.
        span: Any = {"Range": f"bytes={start}-{start + length - 1}"} if length else {}
        with _signed_size(connection, key, size_bytes):
            answer = connection.repeat(
                "read",
                key,
                lambda client: client.get_object(**connection.place(key), **span),
                tried=int(data is not None and length > 0),
            )
        found = answer.get("ContentRange", f"/{answer.get('ContentLength', -1)}").rpartition("/")[2]
        with closing(answer["Body"]) as body:
            if found != str(size_bytes):
                raise DigestMismatchError(
                    f"{key} in {connection.url} has {found} bytes, {size_bytes} were signed."
                )
            if answer.get("ContentRange") is None and length != size_bytes:
                raise StoreUnavailableError(f"{connection.url} ignores ranges; {key} cannot be read.")
            yield from _exactly(body, length, key, connection)


@contextmanager
def _signed_size(connection: S3Connection, key: str, size_bytes: int) -> Iterator[None]:
    """Say what 416 means: the blob is shorter than the range, so than what was signed."""
    try:
        yield
    except KeyConflictError as error:
        raise DigestMismatchError(
            f"{key} in {connection.url} is shorter than the {size_bytes} bytes that were signed."
        ) from error


def read_body(body: Any, limit_bytes: int) -> bytes:
    """Read an answer's body to its end or to `limit_bytes`.

    The SDK notices a body that broke off only at the read after the last, so reading stops at an empty chunk only.

    Raises:
        BrokenBodyError: it broke off.
    """
    chunks: list[bytes] = []
    left = limit_bytes
    with closing(body):
        while left > 0 and (chunk := _next(body, left)):
            chunks.append(chunk)
            left -= len(chunk)
    return b"".join(chunks)


def _exactly(body: Any, length: int, key: str, connection: S3Connection) -> Iterator[bytes]:
    """Yield exactly `length` bytes of a body."""
    left = length
    while left > 0:
        chunk = _next(body, min(left, CHUNK_BYTES))
        if not chunk:
            break
        left -= len(chunk)
        yield chunk
    if left > 0 or _next(body, 1):
        raise StoreUnavailableError(
            f"{connection.url} sent a range of {key} with the wrong length; try again."
        )


def _next(body: Any, limit_bytes: int) -> bytes:
    try:
        chunk: bytes = call("the storage", "read", "a body", lambda: body.read(limit_bytes))
    except StoreError as error:
        raise BrokenBodyError("The storage broke off in the middle of an answer; try again.") from error
    return chunk


class _CountingReader:
    """A file object that tells how far it was read; the SDK may rewind it to sign or to send again."""

    def __init__(self, file: BinaryIO, size_bytes: int, progress: BlobProgress | None) -> None:
        self._file = file
        self._size = size_bytes
        self._progress = progress
        self._told = 0

    def __len__(self) -> int:
        return self._size

    def rewound(self) -> Any:
        """Return this reader, at its start."""
        self._file.seek(0)
        return self

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
        raise changed_error(name) from error
    raise error
