"""The server's fixtures serve the client's tests too."""

from tests.server.conftest import shop as shop
