"""Every setting of a server, by section: its type, its default, its unit. Frozen.

Every limit of the server is a field here, with its unit in the name or the comment; `checks` has its range.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_registry.delivery.cache import CACHE_BYTES_MAX
from loraplex_registry.storage.s3_options import S3Options

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
    tenants_labelled_max: int = 10  # tenants with metric series of their own; the rest share "other"
    adapters_labelled_max: int = 10  # the same for adapters


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
        return self.tenants.get(name) or default_tenant(self.limits)

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


def default_tenant(limits: LimitSettings) -> TenantSettings:
    """What a tenant gets that the file does not name."""
    return TenantSettings(
        requests_max=limits.tenant_requests_max,
        running_max=limits.tenant_running_max,
        requests_per_s=limits.tenant_requests_per_s,
        tokens_per_minute=limits.tenant_tokens_per_minute,
    )
