"""A store in an S3 bucket, or in anything that speaks S3 with conditional writes.

- create is `PutObject If-None-Match: *`, swap is `PutObject If-Match: <etag>`, each sent once: a lost reply is
  `ambiguous` and the caller reads back. 409 means that S3 did not apply the write because of a concurrent one, and is
  tried again here a few times.
- everything that may be repeated is, by the one rule of `s3_client`.
- nothing is contacted before the first operation, so a server may start while the storage is down.

S3 lists and reads with strong consistency since 2020; `registry doctor` finds look-alikes that do not.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import DamagedError, KeyAbsentError, KeyConflictError, StoreUnavailableError
from ..format.manifest import FileEntry
from .s3_blobs import S3Blobs, read_body
from .s3_client import S3Connection, pause
from .s3_data import PassOnError
from .s3_errors import BusyError, NotModifiedError, of_code
from .s3_options import S3Options
from .s3_uploads import S3Uploads
from .store import (
    PAGE_KEYS,
    BlobProgress,
    Item,
    Piece,
    StoredBlob,
    StoredUpload,
    UploadLog,
    is_name,
    require_blob_key,
    require_key,
    require_prefix,
)

_CONDITION_HEADERS: Final = {"IfMatch": "If-Match", "IfNoneMatch": "If-None-Match"}

CONFLICT_TRIES_MAX: Final = 5
"""How often a conditional write that S3 answered with 409 is tried."""


class S3Store:
    """See the module.

    Args:
        bucket: its name.
        prefix: key prefix of the root; may be empty.
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
        self._connection = S3Connection(
            bucket, prefix, endpoint_url=endpoint_url, region=region, options=options
        )
        self._uploads = S3Uploads(self._connection)
        self._blobs = S3Blobs(self._connection, self._uploads)

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`."""
        return self._connection.url

    def prepare(self) -> None:
        """See `Store.prepare`; a bucket is made by its owner."""

    def get(self, key: str, *, limit_bytes: int) -> Item:
        """See `Store.get`."""
        return self._get(key, limit_bytes)

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        """See `Store.changed`."""
        try:
            return self._get(key, limit_bytes, IfNoneMatch=etag)
        except NotModifiedError:
            return None

    def create(self, key: str, body: bytes) -> str:
        """See `Store.create`."""
        return self._write(key, body, IfNoneMatch="*")

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        """See `Store.swap`."""
        try:
            return self._write(key, body, IfMatch=etag)
        except KeyAbsentError as error:  # S3 answers 404 to If-Match on a key that is gone
            raise KeyConflictError(f"{key} is gone from {self.url}.") from error

    def put_blob(
        self,
        key: str,
        path: Path,
        file: FileEntry,
        *,
        progress: BlobProgress | None = None,
        upload: UploadLog | None = None,
    ) -> int:
        """See `Store.put_blob`."""
        require_key(key)
        return self._blobs.put(key, path, file, progress=progress, upload=upload)

    def read_range(self, key: str, *, start: int, length: int, size_bytes: int) -> Iterator[Piece]:
        """See `Store.read_range`."""
        require_key(key)
        return self._blobs.read(key, start=start, length=length, size_bytes=size_bytes)

    def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
        """See `Store.children`."""
        options: dict[str, Any] = {"Delimiter": "/"}
        if after:
            # A level is passed whole: names begin with a letter or digit, and all of those come before '~'.
            options["StartAfter"] = self._connection.prefix + prefix + after + "~" * after.endswith("/")
        last = after
        for page in self._pages(prefix, options):
            names = [entry["Key"] for entry in page.get("Contents", [])]
            names += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
            start = len(self._connection.prefix + prefix)
            for name in sorted(name[start:] for name in names):
                if name > last and is_name(name.removesuffix("/")):
                    last = name
                    yield name

    def blobs(self, prefix: str) -> Iterator[StoredBlob]:
        """See `Store.blobs`."""
        start = len(self._connection.prefix + prefix)
        for page in self._pages(prefix, {}):
            for entry in page.get("Contents", []):
                key = entry["Key"][start:]
                if all(is_name(name) for name in key.split("/")):
                    yield StoredBlob(key, entry["Size"], entry["LastModified"].timestamp())

    def delete_blobs(self, keys: Iterable[str]) -> int:
        """See `Store.delete_blobs`."""
        wanted = list(keys)
        for key in wanted:
            require_blob_key(key)
        for start in range(0, len(wanted), PAGE_KEYS):
            self._delete(wanted[start : start + PAGE_KEYS])
        return -(-len(wanted) // PAGE_KEYS)

    def uploads(self, prefix: str, *, before_s: float) -> Iterator[StoredUpload]:
        """See `Store.uploads`."""
        return self._uploads.unfinished(prefix, before_s=before_s)

    def abort_upload(self, key: str, upload_id: str) -> None:
        """See `Store.abort_upload`."""
        self._uploads.abort(key, upload_id)

    def _get(self, key: str, limit_bytes: int, **condition: str) -> Item:
        require_key(key)
        connection = self._connection
        data = connection.data()
        if data is not None:
            with contextlib.suppress(PassOnError):
                found = data.get(key, limit_bytes=limit_bytes, etag=condition.get("IfNoneMatch"))
                if found is None:
                    raise NotModifiedError(f"{key} did not change in {self.url}.")
                return self._within(found, key, limit_bytes)

        def attempt(client: Any) -> Item:
            answer = client.get_object(**connection.place(key), **condition)
            return Item(read_body(answer["Body"], limit_bytes + 1), answer["ETag"])

        tried = int(data is not None)
        return self._within(connection.repeat("read", key, attempt, tried=tried), key, limit_bytes)

    def _within(self, item: Item, key: str, limit_bytes: int) -> Item:
        if len(item.body) > limit_bytes:
            raise DamagedError(f"{key} in {self.url} is longer than {limit_bytes} bytes.")
        return item

    def _write(self, key: str, body: bytes, **condition: str) -> str:
        require_key(key)
        arguments: Any = {
            **self._connection.place(key),
            **self._connection.write_arguments(),
            **condition,
            "ContentType": "application/json",
            "ChecksumSHA256": base64.b64encode(hashlib.sha256(body).digest()).decode("ascii"),
        }
        for attempt in range(1, CONFLICT_TRIES_MAX + 1):
            try:
                return self._write_once(key, body, condition, arguments)
            except BusyError:  # ours was not applied, so it may be sent again
                if attempt == CONFLICT_TRIES_MAX:
                    raise
                pause(attempt)
        raise AssertionError("unreachable")

    def _write_once(self, key: str, body: bytes, condition: dict[str, str], arguments: Any) -> str:
        data = self._connection.data()
        if data is not None:
            headers = {_CONDITION_HEADERS[name]: value for name, value in condition.items()}
            with contextlib.suppress(PassOnError):
                return data.put(key, body, headers)
        answer = self._connection.once("write", key, lambda client: client.put_object(**arguments, Body=body))
        if not answer.get("ETag"):
            raise StoreUnavailableError(f"{self.url} confirmed {key} without an etag.", ambiguous=True)
        return answer["ETag"]

    def _pages(self, prefix: str, options: dict[str, Any]) -> Iterator[Any]:
        """Yield the pages of a listing."""
        require_prefix(prefix)
        where = {"Bucket": self._connection.bucket, "Prefix": self._connection.prefix + prefix, **options}
        token: dict[str, Any] = {}
        while True:
            page: Any = self._connection.repeat(
                "list",
                prefix or "the root",
                lambda client, token=token: client.list_objects_v2(**where, **token),  # type: ignore[misc]
            )
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _delete(self, keys: list[str]) -> None:
        """Delete at most PAGE_KEYS keys; the answer may be a success and still name keys that stayed."""
        prefix = self._connection.prefix
        what = f"{len(keys)} blobs"
        request: Any = {"Objects": [{"Key": prefix + key} for key in keys], "Quiet": True}

        def attempt(client: Any) -> None:
            answer = client.delete_objects(Bucket=self._connection.bucket, Delete=request)
            for entry in answer.get("Errors", []):
                raise of_code(self.url, "delete", entry.get("Key", what), str(entry.get("Code", ""))[:64])

        self._connection.repeat("delete", what, attempt)
