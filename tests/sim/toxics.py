"""A TCP proxy on loopback that can be told to misbehave: refuse, or cut a reply after so many bytes."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

CHUNK_BYTES = 16_384


class Toxics:
    """Forwards 127.0.0.1:`port` to a target port; orders take effect for connections made afterwards."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._down = False
        self._cut_after: int | None = None
        self._open: set[socket.socket] = set()
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def down(self) -> None:
        """Close every connection at once, old and new."""
        self._down = True
        for connection in list(self._open):
            _close(connection)

    def cut_after(self, reply_bytes: int) -> None:
        """Close connections after so many bytes of reply each."""
        self._cut_after = reply_bytes
        for connection in list(self._open):
            _close(connection)

    def heal(self) -> None:
        """Forward everything again."""
        self._down, self._cut_after = False, None
        for connection in list(self._open):
            _close(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self._down:
                _close(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target_port), 5)
            except OSError:
                _close(client)
                continue
            self._open |= {client, server}
            threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, self._cut_after), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                sink.sendall(data if left is None else data[:left])
                if left is not None:
                    left -= len(data)
                    if left <= 0:
                        break
        for side in (source, sink):
            _close(side)
            self._open.discard(side)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.down()


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
