"""The page with the metrics, from a thread of its own."""

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import Metric

Change = Callable[[Iterable[Metric]], Iterator[Metric]]


class MetricsPage:
    """The HTTP page; `port` is the one really taken."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, change: Change) -> None:
        """Show what a registry holds, as `change` gives it on.

        Raises:
            OSError: the address cannot be used.
        """
        server, self._thread = start_http_server(port, host, registry=ChangedRegistry(registry, change))
        self._server: WSGIServer = server
        self._host = host
        self.port = server.server_port

    def close(self) -> None:
        """Stop answering."""
        stopping = Thread(target=self._server.shutdown)
        stopping.start()
        with contextlib.suppress(OSError):  # its loop looks twice a second, and when somebody comes
            socket.create_connection((self._host, self.port), timeout=1).close()
        stopping.join()
        self._server.server_close()
        self._thread.join(timeout=5)


class ChangedRegistry(CollectorRegistry):
    """A view of a registry."""

    def __init__(self, inner: CollectorRegistry, change: Change) -> None:
        super().__init__()
        self._inner = inner
        self._change = change

    def collect(self) -> Iterator[Metric]:
        """Return what the registry holds, changed."""
        return self._change(self._inner.collect())
