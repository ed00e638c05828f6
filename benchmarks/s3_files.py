"""A small S3 server for throughput figures: bodies go from files to sockets with sendfile, nothing is copied in Python.

    python -m benchmarks.s3_files DIRECTORY [--port N]

It serves what botocore, the AWS command line and obstore need (path-style addresses): GET with Range and If-Match,
HEAD, PUT with If-None-Match and If-Match, DELETE, LIST version 2 with prefix, delimiter, start-after and pages, and
uploads in parts with the listings of parts and of unfinished uploads (one page each). `DIRECTORY/<bucket>/<key>` is
the object. Listing costs O(page) however many objects there are: the keys lie sorted in memory and a page is found by
bisection.

It is a yardstick, not a store: any signature is accepted, checksums sent along are not verified (storage does that on
its own processors, here it would be taken from the client's), ETags are opaque counters, nothing is synced. It prints
`ready PORT` once it listens, on 127.0.0.1 only, and ends when its standard input is closed.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE_KEYS = 1000  # most keys of one page, as S3
HEAD_BYTES_MAX = 64 << 10  # longest request head
BUFFER_BYTES = 1 << 20
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_REASONS = {
    200: "OK",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
}


@dataclass(frozen=True, slots=True)
class Meta:
    """What is known of an object without opening it: size in bytes, opaque etag, time of change (Unix seconds)."""

    size: int
    etag: str
    modified_s: float


@dataclass(slots=True)
class Upload:
    """An unfinished upload: its key, where its parts are, and of each part size and checksum as the client said it."""

    key: str
    directory: Path
    started_s: float
    parts: dict[int, tuple[int, str]] = field(default_factory=dict)


class RefusedError(Exception):
    """An answer other than success: HTTP status and S3's error code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class Objects:
    """The objects of a directory with their keys (`bucket/key`) sorted in memory. Safe for many threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._etags = itertools.count(1)
        self._meta: dict[str, Meta] = {}
        for directory, _, names in os.walk(root):
            for name in names:
                path = os.path.join(directory, name)
                status = os.stat(path)
                self._meta[os.path.relpath(path, root)] = self._new(status.st_size, status.st_mtime)
        self._keys = sorted(self._meta)
        self._temporary = root.parent / f"{root.name}.incoming"
        self._temporary.mkdir(exist_ok=True)

    def meta(self, key: str) -> Meta:
        """Return what is known of an object, or refuse with 404."""
        found = self._meta.get(key)
        if found is None:
            raise RefusedError(404, "NoSuchKey")
        return found

    def path(self, key: str) -> Path:
        """Return the file of a key; a key that could leave the directory is refused."""
        if not key or any(part in {"", ".", ".."} for part in key.split("/")) or "\0" in key:
            raise RefusedError(400, "InvalidArgument")
        return self.root / key

    def incoming(self) -> Path:
        """Return an unused path on the same file system, to be moved into place by `put`."""
        return self._temporary / str(next(self._etags))

    def put(self, key: str, source: Path, headers: dict[str, str]) -> Meta:
        """Move a file into place if its conditions hold; compare and move are one step."""
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self.check(key, headers)
            os.rename(source, target)
            status = os.stat(target)
            if key not in self._meta:
                bisect.insort(self._keys, key)
            meta = self._meta[key] = self._new(status.st_size, status.st_mtime)
        return meta

    def check(self, key: str, headers: dict[str, str]) -> None:
        """Refuse when If-Match or If-None-Match of a write does not hold."""
        found = self._meta.get(key)
        if headers.get("if-none-match") == "*" and found is not None:
            raise RefusedError(412, "PreconditionFailed")
        if "if-match" in headers and found is None:
            raise RefusedError(404, "NoSuchKey")
        if "if-match" in headers and found is not None and headers["if-match"] != found.etag:
            raise RefusedError(412, "PreconditionFailed")

    def delete(self, key: str, headers: dict[str, str]) -> None:
        """Remove an object; an absent one is fine unless If-Match asks for it."""
        with self._lock:
            self.check(key, headers)
            if self._meta.pop(key, None) is not None:
                del self._keys[bisect.bisect_left(self._keys, key)]
                self.path(key).unlink(missing_ok=True)

    def page(
        self, start: str, prefix: str, delimiter: str, limit: int
    ) -> tuple[list[tuple[str, Meta]], list[str], str]:
        """Return objects and common prefixes after `start`, and where the next page starts ("" at the end)."""
        found: list[tuple[str, Meta]] = []
        groups: list[str] = []
        with self._lock:
            last = ""
            at = max(bisect.bisect_left(self._keys, prefix), bisect.bisect_right(self._keys, start))
            while at < len(self._keys) and (key := self._keys[at]).startswith(prefix):
                if len(found) + len(groups) >= limit:
                    return found, groups, last
                cut = key.find(delimiter, len(prefix)) if delimiter else -1
                if cut < 0:
                    found.append((key, self._meta[key]))
                    last, at = key, at + 1
                else:
                    groups.append(key[: cut + len(delimiter)])
                    # The last code point sorts after every key of the group.
                    last = groups[-1] + "\U0010ffff"
                    at = bisect.bisect_right(self._keys, last)
        return found, groups, ""

    def _new(self, size: int, modified_s: float) -> Meta:
        return Meta(size, f'"{next(self._etags):032x}"', modified_s)


class Connection:
    """One client: requests are answered in order until it hangs up."""

    def __init__(self, server: Server, client: socket.socket) -> None:
        self._server = server
        self._objects = server.objects
        self._socket = client
        self._pending = bytearray()  # bytes received and not yet used
        self._left = 0  # bytes of the request's body not yet received

    def serve(self) -> None:
        """Answer until the end of the connection."""
        with self._socket, suppress(ConnectionError, TimeoutError):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (head := self._head()) is not None:
                method, target, headers = head
                self._left = int(headers.get("content-length", "0"))
                self._server.count(method)
                try:
                    self._answer(method, target, headers)
                except RefusedError as error:
                    self._discard(headers)
                    body = f"<Error><Code>{error.code}</Code><Message>{error.code}</Message></Error>".encode()
                    self._send(error.status, {}, b"" if method == "HEAD" or error.status == 304 else body)
                self._discard(headers)

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> None:
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        key = unquote(parts.path).lstrip("/")
        bucket, _, name = key.partition("/")
        if method == "GET" and not name and "uploads" in query:
            self._list_uploads(bucket, query)
        elif method == "GET" and not name:
            self._list(bucket, query)
        elif method == "GET" and "uploadId" in query:
            self._list_parts(query["uploadId"])
        elif method in {"GET", "HEAD"}:
            self._get(key, headers, send_body=method == "GET")
        elif method == "PUT" and not name:
            self._objects.path(bucket).mkdir(exist_ok=True)
            self._send(200, {})
        elif method == "PUT" and "uploadId" in query:
            self._put_part(query, headers)
        elif method == "PUT":
            self._objects.check(key, headers)
            source = self._receive(headers)
            try:
                self._send(200, {"ETag": self._objects.put(key, source, headers).etag})
            finally:
                source.unlink(missing_ok=True)
        elif method == "POST" and "uploads" in query:
            self._discard(headers)
            self._send_xml(
                "InitiateMultipartUploadResult", f"<UploadId>{self._server.begin_upload(key)}</UploadId>"
            )
        elif method == "POST" and "uploadId" in query:
            self._complete(key, query["uploadId"], headers)
        elif method == "DELETE":
            if "uploadId" in query:
                self._server.end_upload(query["uploadId"])
            else:
                self._objects.delete(key, headers)
            self._send(204, {})
        else:
            raise RefusedError(405, "MethodNotAllowed")

    def _get(self, key: str, headers: dict[str, str], *, send_body: bool) -> None:
        meta = self._objects.meta(key)
        if headers.get("if-match", meta.etag) != meta.etag:
            raise RefusedError(412, "PreconditionFailed")
        if headers.get("if-none-match") == meta.etag:
            raise RefusedError(304, "NotModified")
        start, end, status = 0, meta.size, 200
        found = {
            "ETag": meta.etag,
            "Accept-Ranges": "bytes",
            "Last-Modified": formatdate(meta.modified_s, usegmt=True),
        }
        if match := _RANGE.fullmatch(headers.get("range", "")):
            start, status = int(match[1]), 206
            end = min(int(match[2]) + 1, meta.size) if match[2] else meta.size
            if start >= meta.size:
                raise RefusedError(416, "InvalidRange")
            found["Content-Range"] = f"bytes {start}-{end - 1}/{meta.size}"
        with self._objects.path(key).open("rb") as file:
            self._send(status, found, length=end - start, more=send_body)
            while send_body and start < end:
                sent = os.sendfile(self._socket.fileno(), file.fileno(), start, end - start)
                if sent == 0:
                    raise ConnectionAbortedError("the file became shorter")
                start += sent

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = f"{bucket}/{query.get('prefix', '')}", query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        limit = min(int(query.get("max-keys", PAGE_KEYS)), PAGE_KEYS)
        found, groups, following = self._objects.page(
            f"{bucket}/{after}" if after else "", prefix, delimiter, limit
        )
        cut = len(bucket) + 1
        show = quote if query.get("encoding-type") == "url" else escape
        body = [
            f"<Contents><Key>{show(key[cut:])}</Key><Size>{meta.size}</Size><ETag>{escape(meta.etag)}</ETag>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key, meta in found
        ]
        body += [f"<CommonPrefixes><Prefix>{show(group[cut:])}</Prefix></CommonPrefixes>" for group in groups]
        truncated = "true" if following else "false"
        body.append(
            f"<KeyCount>{len(body)}</KeyCount><IsTruncated>{truncated}</IsTruncated><Name>{bucket}</Name>"
        )
        if "encoding-type" in query:
            body.append("<EncodingType>url</EncodingType>")
        if following:
            body.append(f"<NextContinuationToken>{escape(following[cut:])}</NextContinuationToken>")
        self._send_xml("ListBucketResult", "".join(body))

    def _put_part(self, query: dict[str, str], headers: dict[str, str]) -> None:
        upload, number = self._server.upload(query["uploadId"]), int(query["partNumber"])
        part = upload.directory / f"{number:05}"
        os.rename(self._receive(headers), part)
        upload.parts[number] = (part.stat().st_size, headers.get("x-amz-checksum-sha256", ""))
        self._send(200, {"ETag": f'"{part.name}"'})

    def _list_parts(self, name: str) -> None:
        body = [
            f'<Part><PartNumber>{number}</PartNumber><ETag>"{number:05}"</ETag><Size>{size}</Size>'
            + (f"<ChecksumSHA256>{escape(checksum)}</ChecksumSHA256>" if checksum else "")
            + "</Part>"
            for number, (size, checksum) in sorted(self._server.upload(name).parts.items())
        ]
        self._send_xml("ListPartsResult", "".join(body) + "<IsTruncated>false</IsTruncated>")

    def _list_uploads(self, bucket: str, query: dict[str, str]) -> None:
        prefix, cut = f"{bucket}/{query.get('prefix', '')}", len(bucket) + 1
        body = [
            f"<Upload><Key>{escape(upload.key[cut:])}</Key><UploadId>{name}</UploadId>"
            f"<Initiated>{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(upload.started_s))}</Initiated></Upload>"
            for name, upload in self._server.uploads()
            if upload.key.startswith(prefix)
        ]
        self._send_xml("ListMultipartUploadsResult", "".join(body) + "<IsTruncated>false</IsTruncated>")

    def _complete(self, key: str, upload: str, headers: dict[str, str]) -> None:
        """Join the parts by appending to the first."""
        self._discard(headers)
        first, *others = sorted(self._server.upload(upload).directory.iterdir())
        with first.open("r+b") as sink:
            sink.seek(0, os.SEEK_END)
            for part in others:
                with part.open("rb") as source:
                    while os.sendfile(sink.fileno(), source.fileno(), None, 1 << 30):  # type: ignore[arg-type]
                        pass
        meta = self._objects.put(key, first, headers)
        self._server.end_upload(upload)
        self._send_xml(
            "CompleteMultipartUploadResult", f"<ETag>{escape(meta.etag)}</ETag><Key>{escape(key)}</Key>"
        )

    def _head(self) -> tuple[str, str, dict[str, str]] | None:
        while (end := self._pending.find(b"\r\n\r\n")) < 0:
            data = self._socket.recv(HEAD_BYTES_MAX)
            if not data or len(self._pending) > HEAD_BYTES_MAX:
                return None
            self._pending += data
        first, *lines = self._pending[:end].decode("latin-1").split("\r\n")
        del self._pending[: end + 4]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        method, target, _ = first.split(" ", 2)
        return method, target, headers

    def _receive(self, headers: dict[str, str]) -> Path:
        """Write the request's body to a file and return it."""
        self._continue(headers)
        path = self._objects.incoming()
        with path.open("wb", buffering=0) as sink:
            if "aws-chunked" in headers.get("content-encoding", ""):
                self._receive_chunks(sink.write)
                return path
            size, self._left = self._left, 0
            have = self._pending[:size]
            del self._pending[: len(have)]
            sink.write(have)
            size -= len(have)
            buffer = memoryview(bytearray(min(BUFFER_BYTES, max(size, 1))))
            while size > 0:
                count = self._socket.recv_into(buffer[: min(size, len(buffer))])
                if count == 0:
                    raise ConnectionAbortedError("the body broke off")
                sink.write(buffer[:count])
                size -= count
        return path

    def _receive_chunks(self, write: object) -> None:
        """Read the SDKs' aws-chunked encoding: lines of `size;signature`, each with its data; size 0; trailers."""
        body = self._take(self._left)
        self._left = 0
        at = 0
        while True:
            end = body.index(b"\r\n", at)
            size = int(body[at:end].split(b";")[0], 16)
            if size == 0:
                return
            write(body[end + 2 : end + 2 + size])  # type: ignore[operator]
            at = end + 2 + size + 2

    def _take(self, size: int) -> bytes:
        while len(self._pending) < size:
            data = self._socket.recv(min(BUFFER_BYTES, size - len(self._pending)))
            if not data:
                raise ConnectionAbortedError("the body broke off")
            self._pending += data
        body = bytes(self._pending[:size])
        del self._pending[:size]
        return body

    def _discard(self, headers: dict[str, str]) -> None:
        if self._left:
            self._continue(headers)
            size, self._left = self._left, 0
            self._take(size)

    def _continue(self, headers: dict[str, str]) -> None:
        if headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _send_xml(self, tag: str, content: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{tag}>{content}</{tag}>'
        self._send(200, {"Content-Type": "application/xml"}, text.encode())

    def _send(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes = b"",
        *,
        length: int | None = None,
        more: bool = False,
    ) -> None:
        lines = [f"HTTP/1.1 {status} {_REASONS[status]}", "Server: files"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines.append(f"Content-Length: {len(body) if length is None else length}")
        data = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
        self._socket.sendall(data, socket.MSG_MORE if more else 0)


class Server:
    """Accepts connections, one thread each."""

    def __init__(self, root: Path, port: int = 0) -> None:
        self.objects = Objects(root)
        self.requests: dict[str, int] = {}
        self._uploads: dict[str, Upload] = {}
        self._socket = socket.create_server(("127.0.0.1", port), backlog=256)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._socket.getsockname()[1])

    def count(self, method: str) -> None:
        """Add a request to the tally."""
        self.requests[method] = self.requests.get(method, 0) + 1

    def begin_upload(self, key: str) -> str:
        """Start an upload in parts and return its id."""
        directory = self.objects.incoming()
        directory.mkdir()
        self._uploads[directory.name] = Upload(key, directory, time.time())
        return directory.name

    def uploads(self) -> list[tuple[str, Upload]]:
        """Return the unfinished uploads with their ids, by key."""
        return sorted(self._uploads.items(), key=lambda item: (item[1].key, item[0]))

    def upload(self, name: str) -> Upload:
        """Return an unfinished upload, or refuse with 404."""
        if name not in self._uploads:
            raise RefusedError(404, "NoSuchUpload")
        return self._uploads[name]

    def end_upload(self, name: str) -> None:
        """Forget an upload and its parts."""
        directory = self.upload(name).directory
        for part in directory.iterdir():
            part.unlink()
        directory.rmdir()
        del self._uploads[name]

    def run(self) -> None:
        """Serve until the socket is closed."""
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=Connection(self, client).serve, daemon=True).start()

    def close(self) -> None:
        """Stop accepting."""
        self._socket.close()


def main() -> None:
    """Serve a directory until standard input ends."""
    parser = argparse.ArgumentParser("benchmarks.s3_files", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    server = Server(options.directory, options.port)
    threading.Thread(target=server.run, daemon=True).start()
    print(f"ready {server.port}", flush=True)
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
