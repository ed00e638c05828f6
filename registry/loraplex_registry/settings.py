"""Settings of the `registry` command: one small TOML file, read once, every key known.

```toml
# ~/.config/loraplex/config.toml   ($XDG_CONFIG_HOME is honoured)
registry = "file:///home/you/.local/share/loraplex/registry"   # or "s3://bucket/prefix"
tenant = "acme"                # whose adapters `registry push ./adapter` means
key = "keys/acme.key"          # private key, or "awskms:alias/…"; paths are relative to this file
policy = "policy.toml"         # trust policy
base = "/models/base"          # base model directory or base card, when the adapter carries none
endpoint_url = "http://…"      # S3 server other than AWS
region = "eu-central-1"
encryption_key = "file:keys/acme.kek"   # or "awskms:arn:…", "vault:…"; the first wraps, others after commas unwrap
audit = "on"                   # record in the tenant's audit log what is done with the key
```
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from .encryption.key_providers import anchored_addresses
from .errors import SettingsError
from .refs import check_name
from .signing.signers import is_signer_uri

SETTINGS_BYTES_MAX: Final = 64 << 10
"""Longest settings file, in bytes (64 KiB)."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the file says, with paths made absolute. None means that it does not say."""

    registry: str | None = None
    tenant: str | None = None
    key: str | None = None
    policy: str | None = None
    base: str | None = None
    endpoint_url: str | None = None
    region: str | None = None
    encryption_key: str | None = None
    audit: str | None = None

    def overridden(self, **values: str | None) -> Settings:
        """Return these settings with every value that is given replaced."""
        return replace(self, **{key: value for key, value in values.items() if value})

    def require(self, name: str, *, option: str) -> str:
        """Return one setting.

        Raises:
            SettingsError: it is not set; the sentence names the option that sets it.
        """
        value: str | None = getattr(self, name)
        if not value:
            raise SettingsError(
                f"No {name} is set; run `registry init --tenant NAME` once, or give {option}."
            )
        return value


def config_directory(environment: Mapping[str, str]) -> Path:
    """Return the directory of the settings file (XDG Base Directory Specification)."""
    return _xdg(environment, "XDG_CONFIG_HOME", ".config") / "loraplex"


def data_directory(environment: Mapping[str, str]) -> Path:
    """Return the directory of a local registry."""
    return _xdg(environment, "XDG_DATA_HOME", ".local/share") / "loraplex"


def state_directory(environment: Mapping[str, str]) -> Path:
    """Return the directory of what was seen before (high-water marks)."""
    return _xdg(environment, "XDG_STATE_HOME", ".local/state") / "loraplex"


def settings_path(environment: Mapping[str, str]) -> Path:
    """Return the path of the settings file."""
    return config_directory(environment) / "config.toml"


def load_settings(environment: Mapping[str, str]) -> Settings:
    """Read the settings file, then what the environment overrides (`LORAPLEX_REGISTRY`).

    Raises:
        SettingsError: unreadable, an unknown key (the nearest is named), or a value that is not text.
    """
    path = settings_path(environment)
    settings = _from_file(path) if path.is_file() else Settings()
    return settings.overridden(registry=environment.get("LORAPLEX_REGISTRY"))


def _from_file(path: Path) -> Settings:
    known = [field.name for field in fields(Settings)]
    try:
        with path.open("rb") as file:
            table = tomllib.loads(file.read(SETTINGS_BYTES_MAX).decode("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be opened ({error.strerror}).") from error
    except ValueError as error:
        raise SettingsError(f"{path} is not TOML ({error}).") from error
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise SettingsError(
                f"{path} has the unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        if not isinstance(value, str) or not value:
            raise SettingsError(f"{path}: {key} must be a text in quotes.")
    if "tenant" in table:
        check_name("tenant", table["tenant"])
    for key in ("key", "policy", "base"):
        if key in table and not (key == "key" and is_signer_uri(table[key])):
            table[key] = str(path.parent / Path(table[key]).expanduser())
    if table.get("audit", "on") not in {"on", "off"}:
        raise SettingsError(f'{path}: audit must be "on" or "off".')
    if "encryption_key" in table:
        table["encryption_key"] = anchored_addresses(table["encryption_key"], path.parent)
    return Settings(**table)


def _xdg(environment: Mapping[str, str], variable: str, default: str) -> Path:
    named = environment.get(variable, "")
    # The specification says that a relative path is to be ignored.
    return Path(named) if named.startswith("/") else Path(environment.get("HOME") or Path.home()) / default
