"""Gauges whose values are asked of running parts at the moment of a scrape, from the scraping thread.

The parts belong to the event loop and take no locks: a dictionary may change while it is read here. Then the question
is asked again; a part that cannot answer shows NaN instead of taking the page away.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, Gauge

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

ATTEMPTS: Final = 8


def steady(read: Callable[[], _T], *, otherwise: _T) -> _T:
    """Ask, again when what is read changed meanwhile; `otherwise` stands for no answer."""
    for _ in range(ATTEMPTS):
        try:
            return read()
        except RuntimeError:  # "dictionary changed size during iteration"
            continue
        except Exception:
            _log.exception("a gauge cannot be read")
            break
    return otherwise


def remembered(
    read: Callable[[], _T], *, seconds: float, clock: Callable[[], float] = time.monotonic
) -> Callable[[], _T]:
    """Return a function that asks at most every so many seconds: for what is not cheap to know."""
    asked: list[tuple[float, _T]] = []

    def latest() -> _T:
        if not asked or clock() - asked[0][0] >= seconds:
            asked[:] = [(clock(), read())]
        return asked[0][1]

    return latest


class HookedGauge:
    """A gauge without labels, or one labelled series of one."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge

    def set(self, value: float) -> None:
        """Show a value that does not change by itself."""
        self._gauge.set(value)

    def set_function(self, read: Callable[[], float]) -> None:
        """Ask for the value at each scrape."""
        self._gauge.set_function(lambda: steady(read, otherwise=math.nan))


def hooked(registry: CollectorRegistry, name: str, text: str) -> HookedGauge:
    """Make a gauge without labels."""
    return HookedGauge(Gauge(name, text, registry=registry))
