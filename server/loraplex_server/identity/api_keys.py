"""API keys and client certificates, by a file of hashes and names.

A key travels as `authorization: Bearer <key>` metadata. The file holds SHA-256 digests, never keys: keys are 256 random
bits, so a plain digest cannot be guessed back.

    [[keys]]
    name = "acme-app"            # shown in logs
    sha256 = "<64 hex digits>"
    tenant = "acme"
    role = "tenant"              # or "admin": every tenant, and load, unload, pin

    [[certificates]]             # with [tls] client_ca
    name = "acme-batch"
    san = "spiffe://acme.example/batch"   # a name in the certificate: URI, DNS name or address
    tenant = "acme"

`python -m loraplex_server.identity.api_keys NAME TENANT [--admin]` makes a key and prints its entry.
"""

import argparse
import hashlib
import re
import secrets
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from loraplex_registry.errors import InvalidReferenceError
from loraplex_registry.refs import check_name
from loraplex_server.errors import ConfigError
from loraplex_server.identity.principals import Principal, Role, is_printable_name

ENTRIES_MAX: Final = 100_000
"""Most keys, and most certificates, of one file."""

SAN_CHARS_MAX: Final = 2048
"""Longest name of a certificate, in characters (SPIFFE's limit of an id)."""

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Known:
    """Who is known: by the SHA-256 of an API key in hex, and by a name in a client certificate."""

    keys: Mapping[str, Principal]
    certificates: Mapping[str, Principal]

    def by_key(self, key: str) -> Principal | None:
        """Return whose API key this is. Looked up by digest: the time taken tells nothing about the keys."""
        return self.keys.get(hashlib.sha256(key.encode()).hexdigest())


def parse_known(body: bytes) -> Known:
    """Read a keys file.

    Raises:
        ConfigError: not TOML, an unknown field, a digest or certificate given twice, more than ENTRIES_MAX entries.
    """
    try:
        document = tomllib.loads(body.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid TOML: {error}") from error
    if not document or not set(document) <= {"keys", "certificates"}:
        raise ConfigError("must hold [[keys]] and [[certificates]] entries alone")
    return Known(
        _principals(document.get("keys", []), "sha256", kind="key"),
        _principals(document.get("certificates", []), "san", kind="certificate"),
    )


def make_key(name: str, tenant: str, *, admin: bool = False) -> tuple[str, str]:
    """Make an API key of 256 random bits; gives the key, and the TOML entry that admits it."""
    key = "lpx_" + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    role = Role.ADMIN if admin else Role.TENANT
    entry = f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\ntenant = "{tenant}"\nrole = "{role}"\n'
    return key, entry


def _principals(entries: Any, by: str, *, kind: str) -> dict[str, Principal]:
    if not isinstance(entries, list) or len(entries) > ENTRIES_MAX:
        raise ConfigError(f"{kind}s must be a list of at most {ENTRIES_MAX} entries")
    found: dict[str, Principal] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{kind} {number}"
        known_by, principal = _entry(entry, by, where=where)
        if known_by in found:
            raise ConfigError(f"{where} repeats an earlier {by}")
        found[known_by] = principal
    return found


def _entry(entry: Any, by: str, *, where: str) -> tuple[str, Principal]:
    expected = {"name", by, "tenant", "role"}
    if not isinstance(entry, dict) or not set(entry) <= expected or not expected - {"role"} <= set(entry):
        raise ConfigError(f"{where}: needs name, {by} and tenant, may have role, and nothing else")
    if any(type(value) is not str or not value for value in entry.values()):
        raise ConfigError(f"{where}: every value must be a text")
    if by == "sha256" and not _HEX.fullmatch(entry[by]):
        raise ConfigError(f"{where}: sha256 must be 64 lower-case hex digits")
    if by == "san" and not (len(entry[by]) <= SAN_CHARS_MAX and entry[by].isprintable()):
        raise ConfigError(f"{where}: san must be a printable name of at most {SAN_CHARS_MAX} characters")
    if not is_printable_name(entry["name"]):
        raise ConfigError(f"{where}: name must be printable, without spaces")
    try:
        check_name("tenant", entry["tenant"])
    except InvalidReferenceError as error:
        raise ConfigError(f"{where}: {error.message}") from error
    try:
        role = Role(entry.get("role", "tenant"))
    except ValueError:
        raise ConfigError(f"{where}: role must be tenant or admin, not {entry['role']!r}") from None
    return entry[by], Principal(name=entry["name"], tenant=entry["tenant"], role=role)


def main() -> int:
    """Make a key: the key goes to stdout, the entry for the keys file to stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m loraplex_server.identity.api_keys", description=main.__doc__
    )
    parser.add_argument("name", help="shown in logs")
    parser.add_argument("tenant")
    parser.add_argument("--admin", action="store_true")
    arguments = parser.parse_args()
    key, entry = make_key(arguments.name, arguments.tenant, admin=arguments.admin)
    sys.stderr.write(entry)
    sys.stdout.write(key + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
