"""The page with the metrics, from a thread of its own."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

SAMPLES_AT_ONCE: Final = 64
PAUSE_S: Final = 0.0001
"""Seconds between so many samples of the page. Without it the interpreter's lock is given on after 5 ms only, and the
event loop needs it several times for a token."""

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
        for metric in self._change(self._inner.collect()):
            metric.samples = _Paced(metric.samples)
            yield metric


class _Paced(list[Sample]):
    """Samples that are read with pauses, in which the event loop gets the interpreter: a long page delays no token."""

    def __iter__(self) -> Iterator[Sample]:
        for number, sample in enumerate(super().__iter__(), 1):
            yield sample
            if number % SAMPLES_AT_ONCE == 0:
                time.sleep(PAUSE_S)
