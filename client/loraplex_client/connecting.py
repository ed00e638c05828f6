"""How commands reach a server: the options that say so, and the client they make. Keys: LORAPLEX_API_KEY."""

import argparse
import os

from loraplex_client.client import Client
from loraplex_client.types import Tls


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add `--server`, `--tls`, `--ca`, `--cert` and `--key`."""
    default = os.environ.get("LORAPLEX_SERVER", "127.0.0.1:8470")
    parser.add_argument("--server", default=default, metavar="HOST:PORT", help="default: LORAPLEX_SERVER")
    parser.add_argument("--tls", action="store_true", help="encrypt the connection; the others imply it")
    parser.add_argument("--ca", metavar="FILE", default="", help="believe these issuers (PEM)")
    parser.add_argument("--cert", metavar="FILE", default="", help="the client's own certificate (PEM)")
    parser.add_argument("--key", metavar="FILE", default="", help="its private key (PEM)")


def connected(options: argparse.Namespace) -> Client:
    """Return a client for these options; close it.

    Raises:
        OSError: a certificate or key cannot be read.
    """
    secure = options.tls or options.ca or options.cert or options.key
    tls = Tls(ca=options.ca, certificate=options.cert, key=options.key) if secure else None
    return Client(options.server, api_key=os.environ.get("LORAPLEX_API_KEY"), tls=tls)
