"""Uploads of long files to S3, in parts: a few at a time, each verified on its own, and resumable.

A part is a chunk of the signed manifest (`manifest.CHUNK_BYTES`), so its digest is signed and nothing has to be hashed
in the order of the file:

- a part is read once into memory, and those very bytes are compared with the signed digest and sent. A file that
  changed is refused with DigestMismatchError at the first part that shows it, and never completed;
- the digest goes along as the part's checksum, which S3 compares on arrival, stores, and lists;
- at most PARTS_AT_ONCE parts are in memory, of all uploads of a store together.

A file without chunk digests (ciphertext) is hashed first, in one pass.

With a `store.UploadLog` an upload is begun once, remembered before its first part, left in place when it fails, and
gone on with by the next process. What the storage lists is believed only where size *and* SHA-256 of a part are the
signed ones; where it lists no checksums every part is sent again. An upload that is gone became the object when that
is there with the right size, as after a lost reply: keys are those of one push alone, and nobody reads a blob without
comparing every byte with the manifest. Otherwise it was aborted, and a new one is begun.

Without a log an upload that fails is aborted at once, best effort; `registry gc` finds what is left of it.

Multipart uploads: https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

from ..errors import (
    KeyAbsentError,
    StoreError,
    StoreRefusedError,
    StoreUnavailableError,
)
from ..format.manifest import FileEntry
from .s3_client import S3Connection
from .s3_data import PassOnError
from .s3_parts import Part, PartBody, changed_error, is_good, plan_parts, with_chunks
from .store import BlobProgress, StoredUpload, UploadLog, is_name, require_blob_key, require_prefix

MULTIPART_ABOVE_BYTES: Final = 64 << 20
"""Files longer than this go up in parts (64 MiB)."""

PARTS_AT_ONCE: Final = 4
"""Most parts of a store in memory and under way at a time: 32 MiB."""

PARTS_LISTED_MAX: Final = 10_000
"""Most parts an upload can have, S3's limit; a listing that goes on beyond it is not believed."""


class _StoppedError(Exception):
    """Another part failed, so this one need not go on."""


@dataclass(slots=True)
class _Begun:
    """What is there of an upload: its place, None without one; etags of its good parts; requests it took to see."""

    place: Any = None
    etags: dict[int, str] = field(default_factory=dict)
    requests: int = 0
    complete: bool = False


class S3Uploads:
    """See the module. Safe for many threads."""

    def __init__(self, connection: S3Connection) -> None:
        self._connection = connection
        self._slots = threading.BoundedSemaphore(PARTS_AT_ONCE)

    def put(
        self,
        key: str,
        source: BinaryIO,
        file: FileEntry,
        *,
        progress: BlobProgress | None = None,
        log: UploadLog | None = None,
    ) -> int:
        """Upload an open file in parts and return the number of requests; see `Store.put_blob`."""
        parts = plan_parts(with_chunks(source, file))
        begun = self._begun(key, parts, file.size, log)
        if log is not None and begun.requests:
            log.found(len(begun.etags), len(parts))
        missing = [part for part in parts if part.number not in begun.etags]
        if progress is not None and begun.etags:
            progress(sum(part.length for part in parts) - sum(part.length for part in missing))
        if begun.complete:
            return begun.requests
        place, started = begun.place or self._begin(key, log), int(begun.place is None)
        try:
            etags = begun.etags | self._send_all(key, place, source, file.name, missing, progress)
            self._complete(key, place, file.size, parts, etags)
        except BaseException as error:
            if log is None:
                with suppress(Exception):  # best effort; `registry gc` and a bucket rule find the rest
                    self._connection.client().abort_multipart_upload(**place)
            if isinstance(error, KeyAbsentError):
                raise StoreUnavailableError(
                    f"{self._connection.url} dropped the unfinished upload of {key}; push again."
                ) from error
            raise
        return begun.requests + started + len(missing) + 1

    def unfinished(self, prefix: str, *, before_s: float) -> Iterator[StoredUpload]:
        """See `Store.uploads`."""
        require_prefix(prefix)
        root = self._connection.prefix
        where: Any = {"Bucket": self._connection.bucket, "Prefix": root + prefix}
        marker: dict[str, Any] = {}
        while True:
            page: Any = self._connection.repeat(
                "list",
                prefix or "the root",
                lambda client, marker=marker: client.list_multipart_uploads(**where, **marker),  # type: ignore[misc]
            )
            for entry in page.get("Uploads", []):
                key, upload_id = entry["Key"].removeprefix(root), entry["UploadId"]
                started_s = entry["Initiated"].timestamp()
                if started_s < before_s and all(map(is_name, key.split("/"))):
                    size = self._size(self._place(key, upload_id), key)
                    if size is not None:
                        yield StoredUpload(key, upload_id, size, started_s)
            if not page.get("IsTruncated"):
                return
            marker = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page.get("NextUploadIdMarker", ""),
            }

    def abort(self, key: str, upload_id: str) -> None:
        """See `Store.abort_upload`."""
        require_blob_key(key)
        place = self._place(key, upload_id)
        with suppress(KeyAbsentError):
            self._connection.repeat("delete", key, lambda client: client.abort_multipart_upload(**place))

    def _place(self, key: str, upload_id: str) -> Any:
        return {**self._connection.place(key), "UploadId": upload_id}

    def _begun(self, key: str, parts: list[Part], size: int, log: UploadLog | None) -> _Begun:
        """Look at the upload that is remembered."""
        upload_id = None if log is None else log.begun(key)
        if upload_id is None:
            return _Begun()
        begun = _Begun(self._place(key, upload_id))
        wanted = {part.number: part for part in parts}
        try:
            for page in self._part_pages(begun.place, key):
                begun.requests += 1
                for entry in page:
                    part = wanted.get(entry.get("PartNumber", 0))
                    if part is not None and is_good(entry, part):
                        begun.etags[part.number] = entry["ETag"]
        except KeyAbsentError:
            complete = self._is_there(key, size)
            return _Begun(None, dict.fromkeys(wanted, "") if complete else {}, begun.requests + 2, complete)
        except StoreRefusedError:  # the role may not list parts, so they are sent again
            begun.requests += 1
        return begun

    def _part_pages(self, place: Any, key: str) -> Iterator[list[Any]]:
        """Yield the parts the storage lists for an upload, page by page."""
        marker, listed = 0, 0
        while listed <= PARTS_LISTED_MAX:
            page: Any = self._connection.repeat(
                "list",
                key,
                lambda client, marker=marker: client.list_parts(**place, PartNumberMarker=marker),  # type: ignore[misc]
            )
            found = page.get("Parts", [])
            listed += max(len(found), 1)
            yield found
            if not page.get("IsTruncated"):
                return
            marker = int(page.get("NextPartNumberMarker", 0))

    def _size(self, place: Any, key: str) -> int | None:
        """Return the bytes of an upload's parts, None when the upload is gone."""
        try:
            return sum(int(entry["Size"]) for page in self._part_pages(place, key) for entry in page)
        except KeyAbsentError:
            return None

    def _is_there(self, key: str, size: int) -> bool:
        """Say whether the object exists with this size. By a listing, which needs no right to read blobs."""
        where: Any = self._connection.place(key)
        page: Any = self._connection.repeat(
            "list",
            key,
            lambda client: client.list_objects_v2(Bucket=where["Bucket"], Prefix=where["Key"], MaxKeys=1),
        )
        found = [entry["Size"] for entry in page.get("Contents", []) if entry["Key"] == where["Key"]]
        return found == [size]

    def _begin(self, key: str, log: UploadLog | None) -> Any:
        connection = self._connection
        place: Any = connection.place(key)
        answer = connection.repeat(
            "write",
            key,
            lambda client: client.create_multipart_upload(
                **place, **connection.write_arguments(), ChecksumAlgorithm="SHA256"
            ),
        )
        if log is not None:
            log.begin(key, answer["UploadId"])
        return self._place(key, answer["UploadId"])

    def _send_all(
        self,
        key: str,
        place: Any,
        source: BinaryIO,
        name: str,
        parts: list[Part],
        progress: BlobProgress | None,
    ) -> dict[int, str]:
        """Send parts, a few at a time, and return their etags; the first error ends them all."""
        stop = threading.Event()

        def told(count: int) -> None:
            if stop.is_set():
                raise _StoppedError
            if progress is not None:
                progress(count)

        def send(part: Part) -> str:
            with self._slots:
                told(0)
                body = os.pread(source.fileno(), part.length, part.start)
                if len(body) != part.length or hashlib.sha256(body).hexdigest() != part.sha256:
                    raise changed_error(name)
                return self._send(key, place, part, body, told)

        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="loraplex-part") as pool:
            futures = {pool.submit(send, part): part for part in parts}
            try:
                done = wait(futures, return_when=FIRST_EXCEPTION).done
                _raise_first(done)
            except BaseException:  # an error, or Ctrl-C in this thread
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return {part.number: future.result() for future, part in futures.items()}

    def _send(self, key: str, place: Any, part: Part, body: bytes, told: BlobProgress) -> str:
        connection = self._connection
        data = connection.data()
        if data is not None:
            with suppress(PassOnError):
                return data.put_part(key, place["UploadId"], part.number, body, part.sha256, told)
        arguments: Any = {**place, "PartNumber": part.number, "ChecksumSHA256": part.checksum}
        source: Any = PartBody(body, told)
        answer = connection.repeat(
            "write",
            key,
            lambda client: client.upload_part(**arguments, Body=source.rewound()),
            tried=int(data is not None),
        )
        return str(answer["ETag"])

    def _complete(self, key: str, place: Any, size: int, parts: list[Part], etags: dict[int, str]) -> None:
        """Make the parts one object."""
        named: Any = {
            "Parts": [
                {
                    "PartNumber": part.number,
                    "ETag": etags[part.number],
                    "ChecksumSHA256": part.checksum,
                }
                for part in parts
            ]
        }
        try:
            self._connection.repeat(
                "write",
                key,
                lambda client: client.complete_multipart_upload(**place, MultipartUpload=named),
            )
        except KeyAbsentError:  # its reply was lost and this is the repeat, or somebody aborted it
            if not self._is_there(key, size):
                raise


def _raise_first(done: set[Future[str]]) -> None:
    """Raise what failed; a part that stopped because another failed says nothing."""
    errors = [error for future in done if (error := future.exception()) is not None]
    errors.sort(key=lambda error: isinstance(error, StoreError))  # what is said about the file goes first
    for error in errors:
        if not isinstance(error, _StoppedError):
            raise error
