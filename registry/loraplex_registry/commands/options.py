"""Options that every command has, and those that several share."""

from __future__ import annotations

import argparse
from typing import Final

REFERENCE_HELP: Final = (
    "tenant/adapter, followed by @tag, @3, @1.2.0 or @sha256:… if need be; the tenant may be left out when the "
    "settings name one"
)

ALL_SIGN: Final = "private key; may be repeated, all sign"
FIRST_SIGNS_VERSION: Final = (
    "private key: a file, or a key service's address; of several the first signs the version, all the tag"
)

_TEXTS: Final = {
    "--registry": (
        "URL",
        "file:///path or s3://bucket/prefix; default $LORAPLEX_REGISTRY, then the settings",
    ),
    "--endpoint-url": ("URL", "S3 server other than AWS; default $AWS_ENDPOINT_URL"),
    "--region": ("NAME", "AWS region"),
    "--policy": ("FILE", "trust policy; default the settings'"),
}
_SWITCHES: Final = {
    "--json": "print one JSON object, on errors too",
    "--quiet": "print nothing but errors, and no progress",
}


def keys_option(parser: argparse.ArgumentParser, text: str = ALL_SIGN) -> None:
    """Add `--key`, which may be repeated, as `keys`; see `Session.signers`."""
    parser.add_argument("--key", metavar="KEY", action="append", dest="keys", help=text)


def common_options(*, defaults: bool = False) -> argparse.ArgumentParser:
    """Return a parent parser with the options every command has.

    They may stand before or behind the command. So only the outermost parser gives them their defaults; an inner one
    that did would overwrite what was given before the command.

    Args:
        defaults: True for the outermost parser.
    """
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("options of every command")
    for name, (metavar, text) in _TEXTS.items():
        group.add_argument(name, metavar=metavar, help=text, default=None if defaults else argparse.SUPPRESS)
    for name, text in _SWITCHES.items():
        group.add_argument(
            name,
            *(["-q"] if name == "--quiet" else []),
            action="store_true",
            help=text,
            default=False if defaults else argparse.SUPPRESS,
        )
    return common
