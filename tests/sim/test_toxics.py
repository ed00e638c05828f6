"""The proxy does to connections what it is told."""

import socket
import threading

import pytest

from tests.sim.toxics import Toxics


@pytest.fixture
def echo_port() -> int:
    """A server that answers every connection with 1,000 bytes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for _ in range(10):
            connection, _ = listener.accept()
            connection.sendall(b"x" * 1000)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def read(port: int) -> int:
    total = 0
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            while data := connection.recv(4096):
                total += len(data)
    except ConnectionError:
        pass
    return total


def test_it_forwards_cuts_refuses_and_heals(echo_port: int) -> None:
    with Toxics(echo_port) as proxy:
        assert read(proxy.port) == 1000
        proxy.cut_after(300)
        assert read(proxy.port) <= 300
        proxy.down()
        assert read(proxy.port) == 0
        proxy.heal()
        assert read(proxy.port) == 1000
