"""Addresses to listen on, as the settings write them. Pure."""

import ipaddress
from pathlib import Path

from loraplex_server.errors import ConfigError


def split_address(address: str, *, key: str = "address", origin: Path = Path("settings")) -> tuple[str, int]:
    """Split "host:port" ("[::1]:8470" for IPv6); port 0 lets the system choose.

    Raises:
        ConfigError: no port, or one outside 0..65535.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"{origin}: {key} must look like 127.0.0.1:8470, not {address!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
