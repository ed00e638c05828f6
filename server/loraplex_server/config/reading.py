"""From a TOML file to settings, read once.

Promises: an unknown key refuses to start and names the nearest known one; a value of the wrong type names its key and
the file; relative paths are taken from the file's own directory.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from loraplex_registry.encryption.key_providers import KeyRing, anchored_addresses
from loraplex_registry.errors import InvalidReferenceError, SettingsError
from loraplex_registry.refs import check_name
from loraplex_registry.settings import state_directory
from loraplex_registry.storage.s3_options import READING, S3Options, read_options
from loraplex_server.config.checks import check
from loraplex_server.config.settings import (
    Config,
    LimitSettings,
    RegistrySettings,
    TenantSettings,
    TlsSettings,
    default_tenant,
)
from loraplex_server.errors import ConfigError


def load_config(path: Path) -> Config:
    """Read and check a settings file.

    Paths in it that are relative are taken from the file's own directory.

    Raises:
        ConfigError: unreadable file, unknown section or key, wrong type, value out of range.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read settings {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return parse_config(document, origin=path)


def parse_config(document: Mapping[str, Any], *, origin: Path) -> Config:
    """Turn a parsed TOML document into settings; `origin` is named in errors and anchors relative paths.

    Raises:
        ConfigError: as `load_config`.
    """
    hints = get_type_hints(Config)
    _refuse_unknown(document, known=hints, where="", origin=origin)
    sections: dict[str, Any] = {}
    for name, kind in hints.items():
        values = document.get(name, {})
        if not isinstance(values, Mapping):
            raise ConfigError(f"{origin}: [{name}] must be a section")
        if name != "tenants":
            sections[name] = _section(kind, values, name=name, origin=origin)
    tenants = _tenants(document.get("tenants", {}), sections["limits"], origin=origin)
    config = Config(**sections, tenants=tenants)
    check(config, origin)
    config = _anchored(config, origin.parent)
    try:
        KeyRing.parse(config.registry.encryption_key)
    except SettingsError as error:
        raise ConfigError(f"{origin}: registry.encryption_key: {error.message}") from error
    return config


def _section(kind: type, values: Mapping[str, Any], *, name: str, origin: Path) -> Any:
    hints = get_type_hints(kind)
    _refuse_unknown(values, known=hints, where=name, origin=origin)
    for item in fields(kind):
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{origin}: {name}.{item.name} is required")
    checked = {
        key: _typed(value, hints[key], key=f"{name}.{key}", origin=origin) for key, value in values.items()
    }
    return kind(**checked)


def _tenants(
    document: Mapping[str, Any], limits: LimitSettings, *, origin: Path
) -> Mapping[str, TenantSettings]:
    """Read [tenants.NAME]; what is not said there is as [limits] has it."""
    found: dict[str, TenantSettings] = {}
    for tenant, values in document.items():
        name = f"tenants.{tenant}"
        try:
            check_name("tenant", tenant)
        except InvalidReferenceError as error:
            raise ConfigError(f"{origin}: [{name}]: {error.message}") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{origin}: [{name}] must be a section")
        said = _section(TenantSettings, values, name=name, origin=origin)
        found[tenant] = replace(default_tenant(limits), **{key: getattr(said, key) for key in values})
    return MappingProxyType(found)


def _refuse_unknown(values: Mapping[str, Any], *, known: Mapping[str, Any], where: str, origin: Path) -> None:
    for key in values:
        if key not in known:
            full = f"{where}.{key}" if where else f"[{key}]"
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(f"{origin}: unknown setting {full}; did you mean {near[0]!r}?")


def _typed(value: Any, kind: type, *, key: str, origin: Path) -> Any:
    if kind is S3Options:
        return _s3_options(value, where=f"{origin}: {key}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{origin}: {key} must be {kind.__name__}, not {type(value).__name__} ({value!r})")
    return value


def _s3_options(value: Any, *, where: str) -> S3Options:
    """Read [registry.s3]. A server writes nothing, so what asks for something with every write is refused."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a section")
    try:
        return read_options(value, where=where, known=READING)
    except SettingsError as error:
        raise ConfigError(error.message) from error


def _anchored(config: Config, folder: Path) -> Config:
    """Make relative file names absolute, and a model path too where such a directory exists."""

    def anchor(name: str) -> str:
        return str((folder / name).resolve()) if name else name

    model_dir = folder / config.model.path
    model = replace(config.model, path=str(model_dir.resolve())) if model_dir.is_dir() else config.model
    return replace(
        config,
        model=replace(model, name=model.name or Path(config.model.path).name),
        registry=_anchored_registry(config.registry, folder, anchor),
        rollouts=replace(config.rollouts, splits=anchor(config.rollouts.splits)),
        auth=replace(config.auth, keys=anchor(config.auth.keys), jwks=anchor(config.auth.jwks)),
        tls=TlsSettings(
            certificate=anchor(config.tls.certificate),
            key=anchor(config.tls.key),
            client_ca=anchor(config.tls.client_ca),
        ),
        adapters=replace(config.adapters, cache_dir=anchor(config.adapters.cache_dir)),
    )


def _anchored_registry(
    registry: RegistrySettings, folder: Path, anchor: Callable[[str], str]
) -> RegistrySettings:
    keys = anchored_addresses(registry.encryption_key, folder) if registry.encryption_key else ""
    state = anchor(registry.state_dir) or str(state_directory(os.environ))
    return replace(registry, policy=anchor(registry.policy), state_dir=state, encryption_key=keys)
