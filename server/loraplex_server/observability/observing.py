"""What is observed of the running parts: values that gauges ask for, what routers ask for, and traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_registry.delivery.cache import Cache
from loraplex_server.adapters.residency import AdapterStatus, Residency, State
from loraplex_server.config import Config, TracingSettings
from loraplex_server.errors import ConfigError
from loraplex_server.metrics import Gateway, Metrics, remembered
from loraplex_server.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from loraplex_server.observability.tracing import Tracing

DISK_INTERVAL_S: Final = 30.0
"""Seconds for which the page remembers what is in the cache on disk."""


def make_tracing(settings: TracingSettings) -> Tracing | None:
    """Return what makes traces; None when they are off.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if not settings.endpoint:
        return None
    try:
        from loraplex_server.observability.tracing import Tracing
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint: {error.name} is not installed: pip install 'loraplex[tracing]'"
        ) from error
    return Tracing.from_settings(settings)


def hook_up(
    metrics: Metrics, config: Config, *, scheduler: Scheduler, residency: Residency, cache: Cache
) -> None:
    """Have the metrics ask the running parts for what gauges show."""
    slots = residency.slots_total  # what the settings leave open is decided by then
    metrics.waiting.set_function(lambda: scheduler.waiting)
    metrics.fairness_gap.set_function(lambda: scheduler.fairness_gap)
    metrics.slots_total.set(slots)
    metrics.slots_used.set_function(lambda: residency.slots_used)
    metrics.pins.set_function(lambda: residency.pins)

    def in_slots() -> list[AdapterStatus]:
        return [status for status in residency.statuses() if status.state is State.RESIDENT]

    def in_memory() -> list[AdapterStatus]:
        return [status for status in residency.statuses() if status.state is State.STAGED]

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
