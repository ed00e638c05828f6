"""Settings of a server: one TOML file, read once, frozen.

Promises: an unknown key refuses to start and names the nearest known one; a value of the wrong type or
out of range names its key and the file; no default opens the server beyond loopback without credentials.
Every limit of the server is a field here, with its unit in the name or the comment.
"""

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from loraplex_registry.delivery.cache import CACHE_BYTES_MAX
from loraplex_registry.encryption.key_providers import KeyRing, anchored_addresses
from loraplex_registry.errors import InvalidReferenceError, SettingsError
from loraplex_registry.refs import check_name
from loraplex_registry.settings import state_directory
from loraplex_registry.storage.s3_options import READING, S3Options, read_options
from loraplex_server.errors import ConfigError

ACCESS_LOGS = ("text", "json", "off")
TASKS = ("generate", "embed")
HANDOFFS = ("sealed", "directory")
QUANTIZATIONS = ("nf4", "int8", "none")
DTYPES = ("bfloat16", "float16", "float32")
# vLLM sizes its slots by one of these (vllm/config/lora.py).
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SLOTS = 16
"""Adapters in an engine whose slots take memory, unless the settings say otherwise."""
_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens and how it stops."""

    listen: str = "127.0.0.1:8470"
    http_listen: str = ""  # OpenAI-compatible HTTP; empty: none
    metrics_listen: str = "127.0.0.1:8471"
    reflection: bool = True
    default_deadline_s: float = 300.0  # for calls that bring none
    drain_s: float = 20.0  # given to running calls after SIGTERM
    engine_restarts_max: int = 3  # of an engine that died, within the window; beyond them the process ends
    engine_restarts_window_s: float = 600.0
    message_mib_max: int = 4  # one gRPC message
    access_log: str = "text"  # one line per call: text, json or off
    gateway_metrics: bool = True  # what routers of the Gateway API Inference Extension read
    stream_interval_ms: float = (
        20.0  # tokens of one stream that come within it go out together; the first at once
    )
    replay_s: float = 60.0  # an answer is told again to calls with the same request id; 0: only while it runs
    plaintext: bool = False  # True: other machines may connect without TLS, as behind a proxy that ends it


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model: a Hugging Face id or a directory, and how the engine holds it."""

    path: str
    name: str = ""  # empty: the last part of `path`
    task: str = "generate"  # or "embed": vectors instead of text
    quantization: str = "nf4"
    dtype: str = "bfloat16"
    context_tokens: int = 0  # 0: the model's own
    batch_requests: int = 16  # sequences decoded together
    kv_cache_gib: int = 1  # CPU only
    gpu_memory_fraction: float = 0.9  # GPU only
    eager: bool = False  # True: no compilation, quick start
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How many adapters are held at once, and of what size."""

    slots: int = 0  # adapters that calls use at the same time; 0: SLOTS, or `places` where slots cost nothing
    rank_max: int = 16
    size_mib_max: int = 512  # one adapter's weights file
    embeddings: bool = (
        False  # True: adapters of embedding and output layer too; costs slots x rank x vocabulary x 4 B
    )
    cache_dir: str = ""  # verified bytes on disk, shared by servers; empty: under the user's cache
    cache_bytes_max: int = CACHE_BYTES_MAX  # adapters in the engine are kept beyond it
    memory_bytes_max: int = 1 << 30  # adapters ready in memory beside those in slots; 0: none
    handoff: str = "sealed"  # what the engine reads: "sealed" memory, or the cache's own "directory"
    load_timeout_s: float = 60.0  # from first byte to serving, waiting for a slot included
    fetches_max: int = 4  # at the same time


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    """Where adapters come from and whose signatures count. Without `url` only the base model is served."""

    url: str = ""
    policy: str = ""  # trust policy file
    endpoint_url: str = ""  # S3 servers other than AWS
    region: str = ""
    tag_ttl_s: float = 5.0  # a moved tag is seen after at most this
    stale_s_max: float = 3600.0  # resolved names keep serving this long while the store is down
    revocations_ttl_s: float = 30.0  # a longer revocation list is seen after at most this
    state_dir: str = ""  # remembers the newest tags and lists seen; default in $XDG_STATE_HOME
    encryption_key: str = ""  # keys that unwrap encrypted versions: file:, awskms:, vault:
    s3: S3Options = field(default_factory=S3Options)  # [registry.s3]: checksums, timeout_s


@dataclass(frozen=True, kw_only=True)
class AuthSettings:
    """Who may call. Without `keys` and `jwks` only loopback may be listened on. The files may change while serving."""

    keys: str = ""  # file of hashed API keys, and of names in client certificates
    jwks: str = ""  # key set (JWKS) of the issuer of tokens (JWT)
    issuer: str = ""  # what tokens must say in iss
    audience: str = ""  # and in aud
    tenant_claim: str = "tenant"  # the claim that holds a token's tenant
    role_claim: str = "role"  # and its role, tenant or admin; absent: tenant
    leeway_s: float = 30.0  # by which clocks may differ


@dataclass(frozen=True, kw_only=True)
class TlsSettings:
    """Encryption of the gRPC port. The files may be renewed while serving."""

    certificate: str = ""  # PEM, the server's certificate and its issuers
    key: str = ""  # PEM, its private key
    client_ca: str = ""  # PEM; set: every client must bring a certificate of these issuers


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """Bounds on what callers can make the server hold."""

    requests_max: int = 256  # accepted and not yet ended
    tenant_requests_max: int = 64  # the same, for one tenant
    tenant_running_max: int = 0  # in the engine at once, for one tenant; 0: no limit
    tenant_requests_per_s: float = 0.0  # on average; 0: no limit
    tenant_tokens_per_minute: float = 0.0  # prompt and answer together, on average; 0: no limit
    prompt_chars_max: int = 1_000_000
    tenants_labelled_max: int = 64  # tenants with metric series of their own; the rest share "other"
    adapters_labelled_max: int = 64  # the same for adapters


@dataclass(frozen=True, kw_only=True)
class TracingSettings:
    """Where traces of calls go: OTLP over HTTP. Off without `endpoint`; needs the extra "tracing"."""

    endpoint: str = ""  # such as http://collector:4318/v1/traces
    sample_ratio: float = 1.0  # share of the traces that begin here; callers choose for their own


@dataclass(frozen=True, kw_only=True)
class TenantSettings:
    """What one tenant gets, where it differs from [limits]."""

    weight: float = 1.0  # share of the engine among the tenants that have something to do
    requests_max: int = 64
    running_max: int = 0
    requests_per_s: float = 0.0
    tokens_per_minute: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How calls are split between tags, and when a canary is rolled back."""

    splits: str = ""  # file of lines such as "acme/orders" = "prod=95,canary=5"; may change while serving
    window_s: float = 300.0  # for which a call counts
    requests_min: int = 20  # of a canary, before it is judged
    error_rate_max: float = 0.05  # by which its rate of failed calls may be above the stable version's
    latency_ratio_max: float = 1.5  # times the stable version's median times


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole file; one field per section."""

    model: ModelSettings
    server: ServerSettings = field(default_factory=ServerSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    tenants: Mapping[str, TenantSettings] = field(default_factory=dict)  # [tenants.NAME]

    def tenant(self, name: str) -> TenantSettings:
        """What a tenant gets."""
        return self.tenants.get(name) or _default_tenant(self.limits)

    @property
    def serves_adapters(self) -> bool:
        """Whether the engine needs slots for adapters at all: without a registry there is none to bring in."""
        return bool(self.registry.url)

    @property
    def places(self) -> int:
        """Calls at the engine at the same time: a batch, and those that take the places of the first to end."""
        return self.model.batch_requests + max(2, self.model.batch_requests // 4)

    @property
    def adapter_bytes_max(self) -> int:
        """Largest weights file accepted, in bytes."""
        return self.adapters.size_mib_max * _MIB

    @property
    def message_bytes_max(self) -> int:
        """Largest gRPC message accepted, in bytes."""
        return self.server.message_mib_max * _MIB

    @property
    def engine_rank(self) -> int:
        """Rank of the engine's slots: the smallest vLLM allows that holds `adapters.rank_max`."""
        return next(rank for rank in ENGINE_RANKS if rank >= self.adapters.rank_max)


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
    _check(config, origin)
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


def _default_tenant(limits: LimitSettings) -> TenantSettings:
    return TenantSettings(
        requests_max=limits.tenant_requests_max,
        running_max=limits.tenant_running_max,
        requests_per_s=limits.tenant_requests_per_s,
        tokens_per_minute=limits.tenant_tokens_per_minute,
    )


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
        found[tenant] = replace(_default_tenant(limits), **{key: getattr(said, key) for key in values})
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


def _check(config: Config, origin: Path) -> None:
    model, adapters, limits = config.model, config.adapters, config.limits
    one_of: list[tuple[str, str, tuple[str, ...]]] = [
        ("model.task", model.task, TASKS),
        ("model.quantization", model.quantization, QUANTIZATIONS),
        ("model.dtype", model.dtype, DTYPES),
        ("adapters.handoff", adapters.handoff, HANDOFFS),
        ("server.access_log", config.server.access_log, ACCESS_LOGS),
    ]
    for key, value, allowed in one_of:
        if value not in allowed:
            raise ConfigError(f"{origin}: {key} must be one of {', '.join(allowed)}, not {value!r}")
    ranges: list[tuple[str, float, float, float]] = [
        ("model.context_tokens", model.context_tokens, 0, 10_000_000),
        ("model.batch_requests", model.batch_requests, 1, 4096),
        ("model.kv_cache_gib", model.kv_cache_gib, 1, 4096),
        ("model.gpu_memory_fraction", model.gpu_memory_fraction, 0.05, 1),
        ("model.seed", model.seed, 0, 2**32 - 1),
        ("adapters.slots", adapters.slots or SLOTS, 2, 1024),
        ("adapters.rank_max", adapters.rank_max, 1, ENGINE_RANKS[-1]),
        ("adapters.size_mib_max", adapters.size_mib_max, 1, 65_536),
        ("adapters.cache_bytes_max", adapters.cache_bytes_max, 0, 1 << 60),
        ("adapters.memory_bytes_max", adapters.memory_bytes_max, 0, 1 << 50),
        ("adapters.load_timeout_s", adapters.load_timeout_s, 0.1, 3600),
        ("adapters.fetches_max", adapters.fetches_max, 1, 64),
        ("registry.tag_ttl_s", config.registry.tag_ttl_s, 0, 3600),
        ("registry.stale_s_max", config.registry.stale_s_max, 0, 7 * 86_400),
        ("registry.revocations_ttl_s", config.registry.revocations_ttl_s, 0, 86_400),
        ("auth.leeway_s", config.auth.leeway_s, 0, 300),
        ("server.default_deadline_s", config.server.default_deadline_s, 1, 86_400),
        ("server.drain_s", config.server.drain_s, 0, 3600),
        ("server.engine_restarts_max", config.server.engine_restarts_max, 0, 100),
        ("server.engine_restarts_window_s", config.server.engine_restarts_window_s, 1, 86_400),
        ("server.message_mib_max", config.server.message_mib_max, 1, 256),
        ("server.stream_interval_ms", config.server.stream_interval_ms, 0, 1000),
        ("server.replay_s", config.server.replay_s, 0, 3600),
        ("limits.requests_max", limits.requests_max, 1, 100_000),
        ("limits.tenant_requests_max", limits.tenant_requests_max, 1, 100_000),
        ("limits.tenant_running_max", limits.tenant_running_max, 0, 100_000),
        ("limits.tenant_requests_per_s", limits.tenant_requests_per_s, 0, 1e6),
        ("limits.tenant_tokens_per_minute", limits.tenant_tokens_per_minute, 0, 1e9),
        ("limits.prompt_chars_max", limits.prompt_chars_max, 1, 100_000_000),
        ("limits.tenants_labelled_max", limits.tenants_labelled_max, 1, 1000),
        ("rollouts.window_s", config.rollouts.window_s, 1, 86_400),
        ("rollouts.requests_min", config.rollouts.requests_min, 5, 1000),
        ("rollouts.error_rate_max", config.rollouts.error_rate_max, 0, 1),
        ("rollouts.latency_ratio_max", config.rollouts.latency_ratio_max, 1, 1000),
        ("limits.adapters_labelled_max", limits.adapters_labelled_max, 1, 1000),
        ("tracing.sample_ratio", config.tracing.sample_ratio, 0, 1),
    ]
    for name, tenant in config.tenants.items():
        ranges += [
            (f"tenants.{name}.weight", tenant.weight, 0.01, 100),
            (f"tenants.{name}.requests_max", tenant.requests_max, 1, 100_000),
            (f"tenants.{name}.running_max", tenant.running_max, 0, 100_000),
            (f"tenants.{name}.requests_per_s", tenant.requests_per_s, 0, 1e6),
            (f"tenants.{name}.tokens_per_minute", tenant.tokens_per_minute, 0, 1e9),
        ]
    for key, number, low, high in ranges:
        if not low <= number <= high:
            raise ConfigError(f"{origin}: {key} must be from {low:g} to {high:g}, not {number:g}")
    if config.registry.url and not config.registry.policy:
        raise ConfigError(
            f"{origin}: registry.policy is required with registry.url: nothing is trusted without"
        )
    for key, address in (
        ("server.listen", config.server.listen),
        ("server.http_listen", config.server.http_listen or "127.0.0.1:0"),
        ("server.metrics_listen", config.server.metrics_listen),
    ):
        host, _ = split_address(address, key=key, origin=origin)
        if key != "server.metrics_listen" and not _is_loopback(host):
            _check_open(config, f"{origin}: {key} = {address!r} is open to other machines")
    _check_identity(config, origin)
    if config.tracing.endpoint and not config.tracing.endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"{origin}: tracing.endpoint must be an address such as http://collector:4318/v1/traces"
        )


def _check_open(config: Config, what: str) -> None:
    """Refuse what must not be reachable from elsewhere: a server without credentials, or with readable ones."""
    if not config.auth.keys and not config.auth.jwks:
        raise ConfigError(f"{what}: set auth.keys or auth.jwks, or listen on 127.0.0.1")
    if not config.tls.certificate and not config.server.plaintext:
        raise ConfigError(
            f"{what}: set tls.certificate and tls.key, or server.plaintext = true behind a proxy that ends TLS"
        )


def _check_identity(config: Config, origin: Path) -> None:
    auth, tls = config.auth, config.tls
    if auth.jwks and not (auth.issuer and auth.audience):
        raise ConfigError(f"{origin}: auth.issuer and auth.audience are required with auth.jwks")
    if not auth.jwks and (auth.issuer or auth.audience):
        raise ConfigError(f"{origin}: auth.issuer and auth.audience belong to auth.jwks, which is not set")
    if bool(tls.certificate) != bool(tls.key):
        raise ConfigError(f"{origin}: tls.certificate and tls.key are set together")
    if tls.client_ca and not tls.certificate:
        raise ConfigError(f"{origin}: tls.client_ca needs tls.certificate and tls.key")
    if tls.client_ca and not (auth.keys or auth.jwks):
        raise ConfigError(f"{origin}: tls.client_ca names nobody: set auth.keys, with [[certificates]] in it")


def split_address(address: str, *, key: str = "address", origin: Path = Path("settings")) -> tuple[str, int]:
    """Split "host:port" ("[::1]:8470" for IPv6); port 0 lets the system choose.

    Raises:
        ConfigError: no port, or one outside 0..65535.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"{origin}: {key} must look like 127.0.0.1:8470, not {address!r}")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
