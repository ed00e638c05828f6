"""Settings of a server: one TOML file, read once, frozen; refused where anything is unknown or out of range."""

from loraplex_server.config.addresses import split_address
from loraplex_server.config.reading import load_config, parse_config
from loraplex_server.config.settings import (
    SLOTS,
    AdapterSettings,
    AuthSettings,
    Config,
    LimitSettings,
    ModelSettings,
    RegistrySettings,
    RolloutSettings,
    ServerSettings,
    TenantSettings,
    TlsSettings,
    TracingSettings,
)

__all__ = [
    "SLOTS",
    "AdapterSettings",
    "AuthSettings",
    "Config",
    "LimitSettings",
    "ModelSettings",
    "RegistrySettings",
    "RolloutSettings",
    "ServerSettings",
    "TenantSettings",
    "TlsSettings",
    "TracingSettings",
    "load_config",
    "parse_config",
    "split_address",
]
