"""Who calls, and what they may do: one file of hashed API keys, one table of rules, deny by default.

A key travels as `authorization: Bearer <key>` metadata. The file holds SHA-256 digests, never keys:
keys are 256 random bits, so a plain digest cannot be guessed back.

    [[keys]]
    name = "acme-app"            # shown in logs
    sha256 = "<64 hex digits>"
    tenant = "acme"
    role = "tenant"              # or "admin": every tenant, and load, unload, pin

`python -m loraplex_server.auth NAME TENANT [--admin]` makes a key and prints its entry.
"""

import argparse
import hashlib
import re
import secrets
import sys
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from loraplex_server.errors import ConfigError, UnauthenticatedError

KEYS_MAX = 100_000
KEY_CHARS_MAX = 512
_HEX = re.compile(r"[0-9a-f]{64}")


class Action(StrEnum):
    """What a call does with an adapter."""

    GENERATE = "generate"
    READ = "read"
    MANAGE = "manage"


class Role(StrEnum):
    """What kind of caller a key stands for."""

    TENANT = "tenant"
    ADMIN = "admin"


# Who may do what. A tenant acts on its own adapters only; see `may`.
_ALLOWED: dict[Role, frozenset[Action]] = {
    Role.TENANT: frozenset({Action.GENERATE, Action.READ}),
    Role.ADMIN: frozenset(Action),
}


@dataclass(frozen=True)
class Principal:
    """A caller whose credential was checked. An admin's `tenant` is only a label."""

    name: str
    tenant: str
    role: Role


LOCAL_ADMIN = Principal(name="local", tenant="local", role=Role.ADMIN)


def may_see(principal: Principal, tenant: str) -> bool:
    """Whether adapters of `tenant` exist at all for this caller."""
    return principal.role is Role.ADMIN or principal.tenant == tenant


def may(principal: Principal, action: Action) -> bool:
    """Whether this kind of caller may do this on the adapters it sees."""
    return action in _ALLOWED[principal.role]


class Authenticator:
    """Turns a credential into a principal.

    Without keys every caller is the local admin; `config` allows that on loopback only.
    """

    def __init__(self, principals: dict[str, Principal] | None) -> None:
        self._principals = principals

    @classmethod
    def from_file(cls, path: Path) -> "Authenticator":
        """Read a keys file.

        Raises:
            ConfigError: unreadable, malformed, an unknown field, a digest given twice, more than 100,000 keys.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read API keys {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
        entries = document.get("keys")
        if set(document) != {"keys"} or not isinstance(entries, list) or len(entries) > KEYS_MAX:
            raise ConfigError(f"{path}: must hold [[keys]] entries alone, at most {KEYS_MAX}")
        principals: dict[str, Principal] = {}
        for number, entry in enumerate(entries, 1):
            digest, principal = _entry(entry, where=f"{path}: key {number}")
            if digest in principals:
                raise ConfigError(f"{path}: key {number} repeats an earlier sha256")
            principals[digest] = principal
        return cls(principals)

    def principal(self, authorization: str | None) -> Principal:
        """Check the value of the `authorization` metadata.

        Raises:
            UnauthenticatedError: none, malformed or unknown. The message never repeats the credential.
        """
        if self._principals is None:
            return LOCAL_ADMIN
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key or len(key) > KEY_CHARS_MAX:
            raise UnauthenticatedError("send an API key as metadata: authorization: Bearer <key>")
        # Looked up by digest: the time taken tells nothing about the keys.
        found = self._principals.get(hashlib.sha256(key.encode()).hexdigest())
        if found is None:
            raise UnauthenticatedError("this API key is not known here")
        return found


def _entry(entry: Any, *, where: str) -> tuple[str, Principal]:
    expected = {"name", "sha256", "tenant", "role"}
    if not isinstance(entry, dict) or not set(entry) <= expected or not expected - {"role"} <= set(entry):
        raise ConfigError(f"{where}: needs name, sha256 and tenant, may have role, and nothing else")
    if any(type(value) is not str or not value for value in entry.values()):
        raise ConfigError(f"{where}: every value must be a text")
    if not _HEX.fullmatch(entry["sha256"]):
        raise ConfigError(f"{where}: sha256 must be 64 lower-case hex digits")
    try:
        role = Role(entry.get("role", "tenant"))
    except ValueError:
        raise ConfigError(f"{where}: role must be tenant or admin, not {entry['role']!r}") from None
    return entry["sha256"], Principal(name=entry["name"], tenant=entry["tenant"], role=role)


def make_key(name: str, tenant: str, *, admin: bool = False) -> tuple[str, str]:
    """Make an API key of 256 random bits; gives the key, and the TOML entry that admits it."""
    key = "lpx_" + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    role = Role.ADMIN if admin else Role.TENANT
    entry = f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\ntenant = "{tenant}"\nrole = "{role}"\n'
    return key, entry


def main() -> int:
    """Make a key: the key goes to stdout, the entry for the keys file to stderr."""
    parser = argparse.ArgumentParser(prog="python -m loraplex_server.auth", description=main.__doc__)
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
