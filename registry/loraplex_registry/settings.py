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

[s3]                           # see `S3Options`; in the environment LORAPLEX_S3_SSE and so on
sse = "aws:kms"                # encryption at rest: "AES256" or "aws:kms"; default the bucket's
sse_kms_key_id = "arn:aws:kms:…"
lock_mode = "GOVERNANCE"       # object lock: "GOVERNANCE" or "COMPLIANCE", with lock_days
lock_days = 30
checksums = "when_required"    # or "when_supported"
timeout_s = 30                 # longest silence within one request
```
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from .encryption.key_providers import anchored_addresses
from .errors import SettingsError
from .refs import check_name
from .signing.signers import is_signer_uri
from .storage.s3_options import S3Options, environment_options, read_options

SETTINGS_BYTES_MAX: Final = 64 << 10
"""Longest settings file, in bytes (64 KiB)."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the file and the environment say, with paths made absolute. None means that they do not say."""

    registry: str | None = None
    tenant: str | None = None
    key: str | None = None
    policy: str | None = None
    base: str | None = None
    endpoint_url: str | None = None
    region: str | None = None
    encryption_key: str | None = None
    audit: str | None = None
    s3: S3Options = field(default_factory=S3Options)

    def overridden(self, **values: str | None) -> Settings:
        """Return these settings with every value that is given replaced."""
        given: dict[str, Any] = {key: value for key, value in values.items() if value}
        return replace(self, **given)

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
    """Read the settings file, then what the environment overrides (`LORAPLEX_REGISTRY`, `LORAPLEX_S3_…`).

    Raises:
        SettingsError: unreadable, an unknown key (the nearest or the known ones are named), or a value of the wrong
            kind.
    """
    path = settings_path(environment)
    table = _table(path) if path.exists() else {}
    given, here = environment_options(environment), table.pop("s3", {})
    where = (
        "The environment" if given and not here else f"{path}: [s3]" + " and the environment" * bool(given)
    )
    s3 = read_options({**here, **given}, where=where)
    return Settings(**table, s3=s3).overridden(registry=environment.get("LORAPLEX_REGISTRY"))


def _table(path: Path) -> dict[str, Any]:
    """Return the file's keys and values, all known and of the right kind; `s3` is a table still to be read."""
    try:
        with path.open("rb") as file:
            table = tomllib.loads(file.read(SETTINGS_BYTES_MAX).decode("utf-8"))
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be opened ({error.strerror}); it must be a file you can read."
        ) from error
    except ValueError as error:
        raise SettingsError(f"{path} is not TOML ({error}); correct it there.") from error
    for key, value in table.items():
        _check_key(path, key, value)
    if "tenant" in table:
        check_name("tenant", table["tenant"])
    for key in ("key", "policy", "base"):
        if key in table and not (key == "key" and is_signer_uri(table[key])):
            table[key] = str(path.parent / Path(table[key]).expanduser())
    if table.get("audit", "on") not in {"on", "off"}:
        raise SettingsError(f'{path}: audit must be "on" or "off".')
    if "encryption_key" in table:
        table["encryption_key"] = anchored_addresses(table["encryption_key"], path.parent)
    return table


def _check_key(path: Path, key: str, value: Any) -> None:
    known = [item.name for item in fields(Settings)]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
        raise SettingsError(f"{path} has the unknown key {key!r}; {hint}")
    if key == "s3":
        if not isinstance(value, dict):
            raise SettingsError(f"{path}: s3 must be a section, [s3].")
    elif not isinstance(value, str) or not value:
        raise SettingsError(f"{path}: {key} must be a text in quotes.")


def _xdg(environment: Mapping[str, str], variable: str, default: str) -> Path:
    named = environment.get(variable, "")
    # The specification says that a relative path is to be ignored.
    return Path(named) if named.startswith("/") else Path(environment.get("HOME") or Path.home()) / default
