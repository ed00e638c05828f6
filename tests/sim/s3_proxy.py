"""A loopback HTTP proxy in front of an S3 server that loses, breaks and forges answers, by seed or by order.

It speaks plain HTTP/1.1 to both sides and knows just enough of S3 to choose faults that can happen to a request.
"""

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

HEADER_BYTES_MAX = 64 << 10
DELAY_S = 0.02

LOST_REQUEST = "lost request"
"""The connection closes; the server never saw the request."""
LOST_REPLY = "lost reply"
"""The server did it; the connection closes before a byte of the answer."""
RESET = "reset"
"""As `lost reply`, with a TCP reset."""
TRUNCATED = "truncated body"
"""The head of the answer and half of its body, then the connection closes."""
ERROR_500 = "500"
"""500 InternalError; the server never saw the request."""
ERROR_500_APPLIED = "500 after applied"
"""500 InternalError; the server did it."""
ERROR_503 = "503"
"""503 SlowDown; the server never saw the request."""
ERROR_409 = "409"
"""409 ConditionalRequestConflict; the server never saw the request. Only for conditional writes."""
ERROR_412_APPLIED = "412 after applied"
"""The server did it and is asked again, as by a middle box that repeats requests. Only for conditional writes."""
ERROR_403 = "403"
"""403 AccessDenied; the server never saw the request."""
DELAY = "delay"
"""The right answer, a little later."""

TRANSIENT = (
    LOST_REQUEST,
    LOST_REPLY,
    RESET,
    TRUNCATED,
    ERROR_500,
    ERROR_500_APPLIED,
    ERROR_503,
    ERROR_409,
    DELAY,
)
ALL = (*TRANSIENT, ERROR_412_APPLIED, ERROR_403)

_CODES = {
    ERROR_500: (500, "InternalError"),
    ERROR_500_APPLIED: (500, "InternalError"),
    ERROR_503: (503, "SlowDown"),
    ERROR_409: (409, "ConditionalRequestConflict"),
    ERROR_403: (403, "AccessDenied"),
}
_UNSEEN = {ERROR_500, ERROR_503, ERROR_409, ERROR_403}
_CONDITIONAL_ONLY = {ERROR_409, ERROR_412_APPLIED}


@dataclass
class Request:
    """One request as the proxy saw it: what happened to it (`fault`) and what it was told (`status`, 0 for nothing)."""

    method: str
    target: str
    conditional: bool
    fault: str | None = None
    status: int = 0

    @property
    def path(self) -> str:
        """The object it is about: the target without its query."""
        return self.target.partition("?")[0]


Chooser = Callable[[int, Request], str | None]
"""Given the number of a request (from 0) and the request, returns the fault to inject."""


def seeded(seed: int, rate: float, kinds: tuple[str, ...] = ALL) -> Chooser:
    """Choose a fault for a share `rate` of requests; the same seed and order of requests give the same faults."""

    def choose(number: int, request: Request) -> str | None:
        dice = random.Random(f"{seed}/{number}")
        if dice.random() >= rate:
            return None
        return dice.choice([kind for kind in kinds if request.conditional or kind not in _CONDITIONAL_ONLY])

    return choose


def script(*faults: str | None) -> Chooser:
    """Give the first requests these faults, in order, and the later ones none."""
    return lambda number, _: faults[number] if number < len(faults) else None


@dataclass
class S3Proxy:
    """Forwards 127.0.0.1:`port` to `target_port`; `choose` may be replaced at any time by `use`."""

    target_port: int
    port: int = 0
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._choose: Chooser = script()
        self._number = 0
        self._lock = threading.Lock()  # guards _choose, _number and requests
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint to give to a client."""
        return f"http://127.0.0.1:{self.port}"

    def use(self, choose: Chooser) -> None:
        """Inject faults by `choose` from now on, counting requests from 0 again."""
        with self._lock:
            self._choose, self._number = choose, 0
            self.requests.clear()

    def close(self) -> None:
        """Stop; open connections are closed."""
        self._listener.close()
        for connection in list(self._open):
            _close(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.target_port, timeout=30)
        try:
            with contextlib.suppress(OSError, http.client.HTTPException):
                stream = client.makefile("rb")
                while (received := _receive(stream, client)) is not None and self._answer(
                    client, upstream, *received
                ):
                    pass
        finally:
            upstream.close()
            _close(client)
            self._open.discard(client)

    def _decide(self, method: str, target: str, headers: dict[str, str]) -> Request:
        conditional = method == "PUT" and bool({"if-match", "if-none-match"} & headers.keys())
        request = Request(method, target, conditional)
        with self._lock:
            request.fault = self._choose(self._number, request)
            self._number += 1
            self.requests.append(request)
        return request

    def _answer(
        self,
        client: socket.socket,
        upstream: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes,
    ) -> bool:
        """Serve one request; False when the connection is to be closed."""
        request = self._decide(method, target, headers)
        fault = request.fault
        if fault == LOST_REQUEST:
            return False
        if fault == DELAY:
            time.sleep(DELAY_S)
        if fault not in _UNSEEN:
            status, reply_headers, reply = _forward(upstream, method, target, headers, body)
        if fault == ERROR_412_APPLIED:  # what a repeated request is told
            status, reply_headers, reply = _forward(upstream, method, target, headers, body)
        if fault == RESET:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in {LOST_REPLY, RESET}:
            return False
        if fault in _CODES:
            request.status = _CODES[fault][0]
            client.sendall(_error(*_CODES[fault]))
            return True
        request.status = status
        head = _head(status, reply_headers)
        if fault == TRUNCATED:
            client.sendall(head[: len(head) // 2] if not reply else head + reply[: len(reply) // 2])
            return False
        client.sendall(head + reply)
        return True


@contextlib.contextmanager
def running(target_port: int) -> Iterator[S3Proxy]:
    """A proxy that is closed afterwards."""
    proxy = S3Proxy(target_port)
    try:
        yield proxy
    finally:
        proxy.close()


def _receive(stream: object, client: socket.socket) -> tuple[str, str, dict[str, str], bytes] | None:
    """Read one request; None at the end of the connection."""
    line = stream.readline(HEADER_BYTES_MAX).decode("latin-1")  # type: ignore[attr-defined]
    if not line.strip():
        return None
    method, target, _ = line.split(" ", 2)
    headers = {}
    while (header := stream.readline(HEADER_BYTES_MAX).decode("latin-1").strip()) != "":  # type: ignore[attr-defined]
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    if headers.pop("expect", "").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if "chunked" in headers.get("transfer-encoding", ""):
        raise OSError("chunked requests are not known here")
    body = stream.read(int(headers.get("content-length", 0)))  # type: ignore[attr-defined]
    return method, target, headers, body


def _forward(
    upstream: http.client.HTTPConnection, method: str, target: str, headers: dict[str, str], body: bytes
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Send a request to the server. One that finds its old connection closed goes out on a new one."""
    for attempt in (1, 2):
        try:
            upstream.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            upstream.close()
            if attempt == 2:
                raise
    raise AssertionError("unreachable")


def _head(status: int, headers: list[tuple[str, str]]) -> bytes:
    kept = [
        f"{name}: {value}"
        for name, value in headers
        if not re.match(r"(?i)transfer-encoding|connection", name)
    ]
    reason = http.client.responses.get(status, "")
    return "\r\n".join([f"HTTP/1.1 {status} {reason}", *kept, "", ""]).encode("latin-1")


def _error(status: int, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    return _head(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]) + body


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.close()
