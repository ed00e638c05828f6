"""What settings may hold: ranges, choices, and what must be set together. Pure.

Promises: a value out of range names its key and the file; nothing opens the server beyond loopback without credentials.
"""

from pathlib import Path

from loraplex_server.config.addresses import is_loopback, split_address
from loraplex_server.config.settings import ENGINE_RANKS, SLOTS, Config
from loraplex_server.errors import ConfigError

ACCESS_LOGS = ("text", "json", "off")
TASKS = ("generate", "embed")
HANDOFFS = ("sealed", "directory")
QUANTIZATIONS = ("nf4", "int8", "none")
DTYPES = ("bfloat16", "float16", "float32")


def check(config: Config, origin: Path) -> None:
    """Refuse settings that are out of range or do not go together; `origin` is named in errors.

    Raises:
        ConfigError: the first that is wrong.
    """
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
        if key != "server.metrics_listen" and not is_loopback(host):
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
