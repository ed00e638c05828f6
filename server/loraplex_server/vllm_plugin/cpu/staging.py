"""Adapters read, checked, cast and packed in the worker's process while the engine goes on, asked for over a socket.

`Staging` listens on a Unix socket (`staging_wire`) in a directory that only the server's user may enter. Asked for an
adapter it has a reader make a block of it, and puts that into a store where requests find it. Questions are taken at
any time; the making takes turns with the engine's steps, which wait for it a little (`pace`).

Promises: only the process that it was told of is listened to, as the kernel names it; only paths below the given roots
are read, once links are resolved; at most QUEUE_MAX adapters wait, and what is malformed ends the connection; one
adapter is made at a time. A dropped one is not made any further. A failure is the
answer to one question and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

from loraplex_server.vllm_plugin.cpu.pace import PACE, Pace
from loraplex_server.vllm_plugin.cpu.staging_wire import (
    LINE_BYTES_MAX,
    SOCKET_NAME,
    Question,
    WireError,
    answer,
    refusal,
)

QUEUE_MAX: Final = 256
"""Adapters that may wait to be made."""

CONNECTIONS_MAX: Final = 4
"""Connections at the same time; the server needs one."""

_log = logging.getLogger("vllm.loraplex")  # below vLLM's own: it alone has a handler in vLLM's processes


SEND_TIMEOUT_S: Final = 10
"""A connection whose other end has not taken an answer for so long, in seconds, is ended."""

OF_THE_MACHINE: Final = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EINTR})
"""Errors that say nothing of the adapter."""


class Block(Protocol):
    """What a reader makes of an adapter."""

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that it takes."""


B = TypeVar("B", bound=Block)
B_in = TypeVar("B_in", bound=Block, contravariant=True)


class Store(Protocol[B_in]):
    """Where blocks are kept until they are dropped; for any thread."""

    def put(self, adapter_id: int, block: B_in) -> None:
        """Keep a block. Raises RuntimeError when there is no room."""

    def drop(self, adapter_id: int) -> bool:
        """Forget a block; whether there was one."""

    def ids(self) -> frozenset[int]:
        """Adapters whose blocks are kept."""


Read = Callable[[str, Callable[[], None]], B]
"""Makes a block of a directory, calling its second argument often. Raises ValueError or OSError for a bad one."""


class _StopError(Exception):
    """The block that is being made is not wanted any more."""


class Staging(Generic[B]):
    """See the module. `start`, then `close`; for one process and its lifetime."""

    def __init__(
        self,
        directory: Path,
        *,
        read: Read[B],
        store: Store[B],
        peer_pid: int,
        roots: Sequence[str],
        pace: Pace = PACE,
    ) -> None:
        """Begin with a socket that does not listen yet.

        Args:
            directory: private to this user; the socket is made in it.
            read: makes blocks.
            store: takes them.
            peer_pid: the process that may ask.
            roots: directories below which adapters may lie.
            pace: says when to go on.
        """
        self._directory = directory
        self._read = read
        self._store = store
        self._peer = (peer_pid, os.geteuid())
        self._roots = [Path(root) for root in roots]
        self._pace = pace
        self._lock = threading.Lock()
        self._coming: set[int] = set()  # asked for, not yet in the store and not dropped
        self._jobs: queue.Queue[tuple[Question, _Line]] = queue.Queue(QUEUE_MAX)
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._listener: socket.socket | None = None

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the directory is not there, or not private, or has a socket already.
        """
        found = self._directory.lstat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"{self._directory} is not private to this user")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short(self._directory) as address:
            self._listener.bind(address)
        self._listener.listen()
        for work in (self._listen, self._make_all):
            threading.Thread(target=work, name=f"loraplex-{work.__name__.strip('_')}", daemon=True).start()

    def close(self) -> None:
        """Listen no more. What is being made is not waited for."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _listen(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            if _peer(connection) != self._peer or not self._places.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(
                target=self._serve, args=(connection,), name="loraplex-staging", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        line = _Line(connection)
        try:
            with connection, connection.makefile("rb") as questions:
                while body := questions.readline(LINE_BYTES_MAX + 1):
                    self._take(Question.parse(body), line)
        except WireError as error:
            _log.error("staging: a connection was ended: %s", error)
        except OSError:
            pass  # the server went away
        finally:
            self._places.release()

    def _take(self, question: Question, line: _Line) -> None:
        """Answer at once, or queue."""
        if question.op == "list":
            line.send(answer(question.n, ids=sorted(self._store.ids())))
        elif question.op == "drop":
            with self._lock:
                coming = question.adapter_id in self._coming
                self._coming.discard(question.adapter_id)
                dropped = self._store.drop(question.adapter_id) or coming
            line.send(answer(question.n, dropped=dropped))
        else:
            self._queue(question, line)

    def _queue(self, question: Question, line: _Line) -> None:
        if refused := self._refused(question, line):
            line.send(refused)  # not under the lock: the peer may be slow to read

    def _refused(self, question: Question, line: _Line) -> bytes | None:
        with self._lock:
            if question.adapter_id in self._coming or question.adapter_id in self._store.ids():
                return refusal(question.n, "refused", f"id {question.adapter_id} is taken")
            try:
                self._jobs.put_nowait((question, line))
            except queue.Full:
                return refusal(question.n, "busy", f"{QUEUE_MAX} adapters wait already")
            self._coming.add(question.adapter_id)
        return None

    def _make_all(self) -> None:
        while True:
            question, line = self._jobs.get()
            try:
                reply = answer(question.n, bytes=self._make(question))
            except _StopError:
                reply = refusal(question.n, "gone", "dropped meanwhile")
            except (ValueError, OSError) as error:
                of_machine = isinstance(error, OSError) and error.errno in OF_THE_MACHINE
                reply = refusal(question.n, "failed" if of_machine else "refused", error)
            except Exception as error:  # whatever it is, this thread goes on
                _log.exception("staging: %s could not be made", question.path)
                reply = refusal(question.n, "failed", type(error).__name__)
            with self._lock:
                self._coming.discard(question.adapter_id)
            line.send(reply)

    def _make(self, question: Question) -> int:
        path = self._allowed(question.path)

        def pause() -> None:
            self._go_on(question.adapter_id)
            self._pace.turn()

        with self._pace.making(self._jobs.qsize):
            pause()
            block = self._read(path, pause)
        with self._lock:
            self._go_on(question.adapter_id)
            self._store.put(question.adapter_id, block)
        return block.n_bytes

    def _go_on(self, adapter_id: int) -> None:
        if adapter_id not in self._coming:
            raise _StopError

    def _allowed(self, path: str) -> str:
        """Return a path with its links resolved.

        Raises:
            PermissionError: it leads out of the roots.
        """
        real = Path(path).resolve(strict=True)
        if not Path(path).is_absolute() or not any(
            real.is_relative_to(root.resolve()) for root in self._roots
        ):
            raise PermissionError("the path is outside of where this server keeps adapters")
        return path


class _Line:
    """The answering side of a connection; for any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        # Of sending alone (socket(7)): a connection may be silent for as long as nothing is asked.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))

    def send(self, body: bytes) -> None:
        """Send an answer, unless nobody is there any more; a connection that does not take it is ended."""
        with self._lock, contextlib.suppress(OSError):
            try:
                self._connection.sendall(body)
            except BlockingIOError:  # half an answer may be on its way: nothing can follow it
                self._connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """Name the socket by way of a descriptor: a socket's path has 107 characters at most (unix(7))."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as of when it connected (SO_PEERCRED, unix(7))."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid
