"""Parts made from settings: the registry with its policy, the cache, names to versions, turns at the engine.

What is wrong in the settings is raised as ConfigError that names the key.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_registry.delivery.cache import Cache
from loraplex_registry.encryption.key_providers import KeyRing
from loraplex_registry.errors import RegistryError
from loraplex_registry.registry import Registry
from loraplex_registry.storage.store import open_store
from loraplex_registry.trust.marks import FileMarks, marks_directory
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.trust.verifier import Verifier
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import Limits
from loraplex_server.config import Config, TracingSettings
from loraplex_server.errors import ConfigError
from loraplex_server.metrics import Gateway, Metrics, remembered
from loraplex_server.residency import AdapterStatus, Residency, State
from loraplex_server.scheduling.fair_queue import FairQueue
from loraplex_server.scheduling.quotas import Quota, Quotas
from loraplex_server.scheduling.scheduler import Scheduler, SchedulerEvents
from loraplex_server.versions import Versions

if TYPE_CHECKING:
    from loraplex_server.tracing import Tracing

DISK_INTERVAL_S: Final = 30.0
"""Seconds for which the page remembers what is in the cache on disk."""


def cache_dir() -> Path:
    """Return where this user's derived files live: $XDG_CACHE_HOME/loraplex or ~/.cache/loraplex."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "loraplex"


def load_policy(config: Config) -> TrustPolicy | None:
    """Return the trust policy; None without a registry.

    Raises:
        ConfigError: it cannot be read or is wrong.
    """
    if not config.registry.url:
        return None
    try:
        return TrustPolicy.load(Path(config.registry.policy))
    except RegistryError as error:
        raise ConfigError(f"registry.policy: {error}") from error


def open_cache(config: Config) -> Cache:
    """Open the cache of adapters, which other servers may share, and clear up after those that died.

    Raises:
        ConfigError: its directory cannot be used.
    """
    settings = config.adapters
    try:
        cache = Cache(
            settings.cache_dir or cache_dir() / "adapters",
            max_bytes=settings.cache_bytes_max,
            wait_s=settings.load_timeout_s,
        )
        cache.prune()
    except RegistryError as error:
        raise ConfigError(f"adapters.cache_dir: {error}") from error
    return cache


def open_registry(config: Config) -> Registry:
    """Return the registry, with the keys that open encrypted versions.

    Raises:
        ConfigError: its address is wrong.
    """
    settings = config.registry
    try:
        store = open_store(
            settings.url,
            endpoint_url=settings.endpoint_url or None,
            region=settings.region or None,
            options=settings.s3,
        )
    except RegistryError as error:
        raise ConfigError(f"registry.url: {error}") from error
    return Registry(store, keys=KeyRing.parse(settings.encryption_key))


def make_versions(config: Config, base: BaseModel, policy: TrustPolicy, cache: Cache) -> Versions:
    """Return what turns names into verified versions for a base, and versions into bytes.

    Raises:
        ConfigError: as `open_registry`.
    """
    registry = open_registry(config)
    settings, adapters = config.registry, config.adapters
    verifier = Verifier(
        registry,
        policy,
        marks=FileMarks(marks_directory(Path(settings.state_dir), registry.url)),
        refresh_s=settings.revocations_ttl_s,
        clock=time.monotonic,
    )
    return Versions(
        registry=registry,
        verifier=verifier,
        base=base,
        limits=Limits(
            max_rank=adapters.rank_max, max_bytes=config.adapter_bytes_max, embeddings=adapters.embeddings
        ),
        cache=cache,
        sealed=adapters.handoff == "sealed",
        tag_ttl_s=settings.tag_ttl_s,
        stale_s_max=settings.stale_s_max,
        fetches_max=adapters.fetches_max,
        fetch_s_max=adapters.load_timeout_s,
        clock=time.monotonic,
    )


def make_scheduler(
    config: Config, *, events: SchedulerEvents, resident: Callable[[], Collection[str]]
) -> Scheduler:
    """Return what gives turns at the engine; see `Scheduler` for the arguments."""

    def quota_of(tenant: str) -> Quota:
        found = config.tenant(tenant)
        return Quota(
            requests_max=found.requests_max,
            requests_per_s=found.requests_per_s,
            tokens_per_minute=found.tokens_per_minute,
        )

    queue = FairQueue(
        weight_of=lambda tenant: config.tenant(tenant).weight,
        running_max_of=lambda tenant: config.tenant(tenant).running_max or 1 << 30,
    )
    return Scheduler(
        places=config.model.batch_requests + max(2, config.model.batch_requests // 4),
        requests_max=config.limits.requests_max,
        queue=queue,
        quotas=Quotas(quota_of, clock=time.monotonic),
        events=events,
        resident=resident,
        clock=time.monotonic,
    )


def make_tracing(settings: TracingSettings) -> Tracing | None:
    """Return what makes traces; None when they are off.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if not settings.endpoint:
        return None
    try:
        from loraplex_server.tracing import Tracing
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint: {error.name} is not installed: pip install 'loraplex[tracing]'"
        ) from error
    return Tracing.from_settings(settings)


def hook_up(
    metrics: Metrics, config: Config, *, scheduler: Scheduler, residency: Residency, cache: Cache
) -> None:
    """Have the metrics ask the running parts for what gauges show."""
    slots = config.adapters.slots
    metrics.waiting.set_function(lambda: scheduler.waiting)
    metrics.fairness_gap.set_function(lambda: scheduler.fairness_gap)
    metrics.slots_total.set(slots)
    metrics.slots_used.set_function(lambda: residency.slots_used)
    metrics.pins.set_function(lambda: residency.pins)

    def in_slots() -> list[AdapterStatus]:
        return [status for status in residency.statuses() if status.state is State.RESIDENT]

    def in_memory() -> list[AdapterStatus]:  # bytes are known from the moment they are staged
        return [status for status in residency.statuses() if status.size_bytes]

    on_disk = remembered(cache.entries, seconds=DISK_INTERVAL_S)
    metrics.tier_adapters("slot").set_function(lambda: len(in_slots()))
    metrics.tier_bytes("slot").set_function(lambda: sum(one.size_bytes for one in in_slots()))
    metrics.tier_adapters("memory").set_function(lambda: len(in_memory()))
    metrics.tier_bytes("memory").set_function(lambda: sum(one.size_bytes for one in in_memory()))
    metrics.tier_adapters("disk").set_function(lambda: len(on_disk()))
    metrics.tier_bytes("disk").set_function(lambda: sum(one.size_bytes for one in on_disk()))
    if config.server.gateway_metrics:
        metrics.show_gateway(
            Gateway(
                slots=slots,
                running=lambda: {f"{one.version.tenant}/{one.version.adapter}" for one in in_slots()},
                waiting=lambda: metrics.wanted,
                queued=lambda: scheduler.waiting,
            )
        )
