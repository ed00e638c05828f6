"""Deciding again about adapters in the engine: revoked ones leave, and their calls end, without anybody asking.

Every `interval_s` each adapter in the engine is verified once more: by the list of revocations as it is then (asked for
at most every `registry.revocations_ttl_s`), by the dates of keys, and by how old the list may be. One that is refused
now is expelled: running calls end with the reason within a step of the engine. While the storage is silent, what was
decided last holds for as long as the policy allows. Kept answers (`replays`) are judged in the same way.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from loraplex_registry.errors import RegistryError, TrustError
from loraplex_server.adapters.residency import Residency
from loraplex_server.adapters.versions import AdapterVersion, Versions

_log = logging.getLogger(__name__)

INTERVAL_S_MIN: Final = 0.5
"""Seconds between two rounds at least, also where lists are asked for every time."""


async def reconsider_for_ever(versions: Versions, residency: Residency, *, interval_s: float) -> None:
    """Decide again and again, until cancelled; no failure ends it."""
    while True:
        await asyncio.sleep(max(interval_s, INTERVAL_S_MIN))
        try:
            await reconsider_all(versions, residency)
        except Exception:  # an engine that is dying, a bug: revocations must not stop being seen
            _log.exception("adapters could not be looked at again; the next round tries")


async def reconsider_all(versions: Versions, residency: Residency) -> list[str]:
    """Decide once about every adapter that is here; return the names of those that were expelled."""
    expelled = []
    for status in residency.statuses():
        version = status.version
        error = await refusal(versions, version)
        if error is not None:
            _log.warning("%s is expelled: %s", version.name, error)
            await residency.expel(version.digest, error)
            expelled.append(version.name)
    return expelled


async def refusal(versions: Versions, version: AdapterVersion) -> TrustError | None:
    """Return why a version that was let in before must not be used any more; None when it may."""
    try:
        await versions.reconsider(version)
    except TrustError as error:
        return error
    except RegistryError as error:  # the storage; what was decided before holds
        _log.info("%s could not be looked at again: %s", version.name, error)
    return None
