"""Asking for the passphrase of a new key. A passphrase is never an argument."""

from __future__ import annotations

import getpass
import sys

from ..errors import SettingsError
from .session import Session


def new_passphrase(session: Session) -> str | None:
    """Return the passphrase for a new key: of a file, asked for on the terminal, or None when that is wanted.

    Raises:
        SettingsError: there is nobody to ask, or both answers differ.
    """
    arguments = session.arguments
    if arguments.no_passphrase and arguments.passphrase_file:
        raise SettingsError("--no-passphrase and --passphrase-file exclude each other; give one.")
    if arguments.no_passphrase:
        return None
    if arguments.passphrase_file:
        return session.passphrase(arguments.passphrase_file)
    if not sys.stdin.isatty():
        raise SettingsError(
            "A private key is encrypted with a passphrase; give --passphrase-file FILE, or --no-passphrase on purpose."
        )
    first = getpass.getpass("Passphrase for the new key: ")
    if not first or getpass.getpass("The same again: ") != first:
        raise SettingsError("The passphrases differ or are empty; no key was made.")
    return first
