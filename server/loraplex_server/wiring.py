"""Parts made from settings: the registry with its policy, the cache, names to versions, turns at the engine.

What is wrong in the settings is raised as ConfigError that names the key.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Final

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
from loraplex_server.adapters.preflight import slot_bytes
from loraplex_server.adapters.residency import Residency, ResidencyEvents
from loraplex_server.adapters.versions import AdapterSource, NoSource, Versions
from loraplex_server.calls.gate import Backend
from loraplex_server.config import SLOTS, Config
from loraplex_server.engine.protocol import Engine
from loraplex_server.engine.supervision import SupervisionEvents, Supervisor
from loraplex_server.errors import ConfigError
from loraplex_server.metrics import Metrics
from loraplex_server.rollout.judge import Limits as RolloutLimits
from loraplex_server.rollout.rollouts import RolloutEvents, Rollouts
from loraplex_server.rollout.splits import Splits
from loraplex_server.scheduling.fair_queue import FairQueue
from loraplex_server.scheduling.quotas import Quota, Quotas
from loraplex_server.scheduling.scheduler import Scheduler, SchedulerEvents
from loraplex_server.watched import WatchedFile

DESCRIPTORS_PER_ADAPTER: Final = 5
"""File descriptors that an adapter's sealed bytes hold; where the engine keeps the bytes, its lease holds one."""

STAGED_MAX: Final = 2000
"""Most adapters ready in memory, however small; the books are looked through at each change."""


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


def watch_splits(config: Config) -> WatchedFile[Splits] | None:
    """Return the file of splits; None where the settings name none.

    Raises:
        ConfigError: it cannot be read or is wrong.
    """
    if not config.rollouts.splits:
        return None
    path = Path(config.rollouts.splits)
    try:
        return WatchedFile(path, partial(Splits.parse, origin=path))
    except ConfigError as error:
        raise ConfigError(f"rollouts.splits: {error}") from error


def make_rollouts(config: Config, splits: WatchedFile[Splits] | None, *, events: RolloutEvents) -> Rollouts:
    """Return what splits calls between tags."""
    settings, none = config.rollouts, Splits({})
    limits = RolloutLimits(
        window_s=settings.window_s,
        requests_min=settings.requests_min,
        error_rate_max=settings.error_rate_max,
        latency_ratio_max=settings.latency_ratio_max,
    )
    return Rollouts(
        lambda: splits.value if splits else none,
        limits,
        absent_s=config.registry.tag_ttl_s,
        events=events,
        clock=time.monotonic,
    )


def make_residency(
    config: Config, *, engine: Engine, source: AdapterSource, events: ResidencyEvents
) -> Residency:
    """Return what keeps adapters in an engine; see `Residency` for the arguments."""
    adapters = config.adapters
    slots = adapters.slots or (config.places if engine.keeps_bytes else SLOTS)
    return Residency(
        engine=engine,
        source=source,
        events=events,
        slots=slots,
        memory_bytes_max=adapters.memory_bytes_max,
        staged_max=_staged_max(slots, each=1 if engine.keeps_bytes else DESCRIPTORS_PER_ADAPTER),
        ahead_max=max(1, adapters.fetches_max // 2),
        load_timeout_s=adapters.load_timeout_s,
        clock=time.monotonic,
    )


def make_supervisor(
    config: Config, make_engine: Callable[[], Engine], *, events: SupervisionEvents
) -> Supervisor:
    """Return what keeps an engine alive; see `Supervisor` for the arguments."""
    return Supervisor(
        make_engine,
        restarts_max=config.server.engine_restarts_max,
        window_s=config.server.engine_restarts_window_s,
        events=events,
        clock=time.monotonic,
    )


def make_backend(
    config: Config,
    engine: Engine,
    versions: Versions | None,
    splits: WatchedFile[Splits] | None,
    *,
    metrics: Metrics,
) -> Backend:
    """Return what the services work with, around an engine that has started."""
    residency = make_residency(config, engine=engine, source=versions or NoSource(), events=metrics)
    return Backend(
        engine=engine,
        versions=versions,
        residency=residency,
        scheduler=make_scheduler(config, events=metrics, resident=lambda: residency.resident),
        rollouts=make_rollouts(config, splits, events=metrics),
        model_name=config.model.name,
        prompt_chars_max=config.limits.prompt_chars_max,
        slot_bytes=0 if engine.keeps_bytes else _slot_bytes(config, engine),
    )


def _slot_bytes(config: Config, engine: Engine) -> int:
    return slot_bytes(
        engine.base,
        rank=config.engine_rank,
        element_bytes=4 if config.model.dtype == "float32" else 2,
        embeddings=config.adapters.embeddings,
    )


def _staged_max(slots: int, *, each: int) -> int:
    """Adapters without a slot that half of this process's file descriptors hold, the slots taken off."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return STAGED_MAX
    return max(0, min(STAGED_MAX, descriptors // 2 // each - slots))


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
        places=config.places,
        requests_max=config.limits.requests_max,
        queue=queue,
        quotas=Quotas(quota_of, clock=time.monotonic),
        events=events,
        resident=resident,
        clock=time.monotonic,
    )
