"""Clients that cost next to nothing: streams of tokens over gRPC and over HTTP, read from bare sockets.

Measuring devices, not clients to use: they understand what the two servers of `benchmarks.frontend` send and nothing
else. Neither decodes a message but the last; both note when tokens came and how many the server says there were.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from loraplex_protos.v1 import generation_pb2

GENERATE: Final = "/loraplex.v1.GenerationService/Generate"
TAIL_BYTES: Final = 1024  # of a stream of events, kept to find its end
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')

# RFC 9113, sections 3.4 and 6
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
_RST_STREAM: Final = 3
_ACK, _END_STREAM, _END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW_SIZE: Final = 4
_WINDOW: Final = (1 << 31) - 1  # so large that it is never used up


@dataclass
class Stream:
    """One stream's times, of `time.perf_counter`.

    Attributes:
        arrivals: of its tokens, one for each message or event.
        tokens: what the server says it generated.
    """

    started: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass
class _Answer:
    """What came of one gRPC call so far."""

    stream: Stream
    ended: asyncio.Future[None]
    body: bytearray = field(default_factory=bytearray)
    messages: int = 0
    last: bytes = b""


class GrpcConnection(asyncio.Protocol):
    """Calls of Generate on one HTTP/2 connection. Headers that come are not read: the last message tells all."""

    def __init__(self, key: str, *, window: int = _WINDOW) -> None:
        """Prepare.

        Args:
            key: an API key, or "".
            window: bytes that the server may send in one stream; no more is ever allowed, so that a small window
                makes a reader that stops reading.
        """
        self._window = window
        self._headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", GENERATE),
            (":authority", "127.0.0.1"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *([("authorization", f"Bearer {key}")] if key else []),
        ]
        self._transport: Any = None
        self._received = bytearray()
        self._answers: dict[int, _Answer] = {}
        self._next_id = 1
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport
        settings = _INITIAL_WINDOW_SIZE.to_bytes(2) + self._window.to_bytes(4)
        more = (_WINDOW - 65_535).to_bytes(4)  # for the connection as a whole
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, more))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._received += data
        for kind, flags, number, payload in _frames(self._received):
            if kind == _DATA:
                self._data(self._answers[number], payload)
            elif kind == _SETTINGS and not flags & _ACK:
                self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
                if not self.ready.done():
                    self.ready.set_result(None)
            elif kind == _PING and not flags & _ACK:
                self._transport.write(_frame(_PING, _ACK, 0, payload))
            elif kind in (_RST_STREAM, _GOAWAY):
                self._fail(ConnectionError(f"the server ended a stream: {payload!r}"))
            if kind == _HEADERS and flags & _END_STREAM:
                self._end(self._answers.pop(number), payload)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._fail(exc or ConnectionError("the server ended the connection"))

    async def ask(self, stream: Stream, request: bytes) -> None:
        """Send one request and wait for the end of its answer."""
        number, self._next_id = self._next_id, self._next_id + 2
        answer = _Answer(stream, asyncio.get_running_loop().create_future())
        self._answers[number] = answer
        head = b"".join(_literal(name, value) for name, value in self._headers)
        body = b"\0" + len(request).to_bytes(4) + request
        stream.started = time.perf_counter()
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, number, head) + _frame(_DATA, _END_STREAM, number, body)
        )
        await answer.ended

    def close(self) -> None:
        """End the connection."""
        self._transport.close()

    def _data(self, answer: _Answer, payload: bytes) -> None:
        """Split what came into messages; the first is the header, the last the end, those between are tokens."""
        body = answer.body
        body += payload
        while len(body) >= 5 and len(body) >= (end := 5 + int.from_bytes(body[1:5])):
            answer.messages += 1
            answer.last = bytes(body[5:end])
            del body[:end]
            if answer.messages > 1:
                answer.stream.arrivals.append(time.perf_counter())

    def _end(self, answer: _Answer, trailers: bytes) -> None:
        del answer.stream.arrivals[-1:]  # the end itself
        end = generation_pb2.GenerateResponse.FromString(answer.last).end
        answer.stream.tokens = end.usage.completion_tokens
        if answer.stream.tokens:
            answer.ended.set_result(None)
        else:
            answer.ended.set_exception(ConnectionError(f"the call failed: {trailers!r}"))

    def _fail(self, error: Exception) -> None:
        while self._answers:
            self._answers.popitem()[1].ended.set_exception(error)


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + number.to_bytes(4) + payload


def _frames(received: bytearray) -> Iterator[tuple[int, int, int, bytes]]:
    """Take whole frames off the front: type, flags, stream, payload."""
    start = 0
    while len(received) - start >= 9:
        end = start + 9 + int.from_bytes(received[start : start + 3])
        if len(received) < end:
            break
        number = int.from_bytes(received[start + 5 : start + 9])
        yield received[start + 3], received[start + 4], number, bytes(received[start + 9 : end])
        start = end
    del received[:start]


def _literal(name: str, value: str) -> bytes:
    """A header field without indexing and without Huffman code (RFC 7541, section 6.2.2)."""
    return b"\0" + _text(name) + _text(value)


def _text(text: str) -> bytes:
    assert len(text) < 127
    return bytes((len(text),)) + text.encode()


class HttpConnection(asyncio.Protocol):
    """One connection that reads server-sent events: looks for the first one and the last, and for the usage."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._tail = b""
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if events := data.count(b"data: {"):
            self._stream.arrivals += [time.perf_counter()] * events
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        if b"data: [DONE]" in self._tail and not self._ended.done():
            found = _COMPLETION_TOKENS.search(self._tail)
            assert found is not None, self._tail
            self._stream.arrivals.pop()  # the usage
            self._stream.tokens = int(found[1])
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if not self._ended.done():
            self._ended.set_exception(exc or ConnectionError(f"the server ended early: {self._tail!r}"))

    async def ask(self, request: bytes) -> None:
        """Send a request and wait for the end of its stream."""
        self._stream.started = time.perf_counter()
        self._transport.write(request)
        await self._ended

    def close(self) -> None:
        """End the connection."""
        self._transport.close()
