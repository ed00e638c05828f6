"""Looking again, while nothing is loaded, whether books, engine and bytes still agree; never more than 1 % of one core.

Every `AUDIT_INTERVAL_S` the books are compared with the engine's own list. In between the bytes of adapters in memory
and in slots, which a restarted engine would read, are hashed again, one piece of 8 MiB at most at a time, round and
round. After each piece there is a rest of 99 times the processor time it took, so 1 GiB is looked through in some
minutes. An adapter whose bytes changed, or that the engine has lost, leaves once its calls have ended, and is fetched
again when it is asked for: logged, and counted as removals with the cause `integrity`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from loraplex_registry.errors import DigestMismatchError
from loraplex_registry.registry import StagedAdapter
from loraplex_server.adapters.residency import Residency
from loraplex_server.adapters.versions import AdapterSource
from loraplex_server.errors import EngineUnavailableError

CPU_SHARE_MAX: Final = 0.01
"""Most of one core's time that hashing takes."""

PAUSE_S_MIN: Final = 0.5
"""Least rest between two pieces, in seconds."""

AUDIT_INTERVAL_S: Final = 10.0
"""Seconds between two looks at the engine's list."""

_log = logging.getLogger(__name__)


class Patrol:
    """See the module. One per server."""

    def __init__(self, residency: Residency, source: AdapterSource, *, clock: Callable[[], float]) -> None:
        self._residency = residency
        self._source = source
        self._clock = clock
        self._audited_s = clock()
        self._left: deque[tuple[StagedAdapter, int]] = deque()  # pieces of this round

    async def run(self) -> None:
        """Look again and again, until cancelled; no failure ends it."""
        while True:
            pause_s = PAUSE_S_MIN
            try:
                pause_s = await self.step()
            except EngineUnavailableError:
                pass  # it died; `supervision` sees to it
            except Exception:  # a bug, or a machine in trouble: the next step may see it too
                _log.exception("adapters could not be looked at again; the next round tries")
            await asyncio.sleep(pause_s)

    async def step(self) -> float:
        """Look at one thing, unless adapters are coming or going; the seconds to rest afterwards."""
        if self._residency.moving:
            return PAUSE_S_MIN
        if self._clock() - self._audited_s >= AUDIT_INTERVAL_S:
            self._audited_s = self._clock()
            for found in await self._residency.audit():
                _log.error("integrity: %s", found)
        return max(PAUSE_S_MIN, await self._look() * (1 / CPU_SHARE_MAX - 1))

    async def _look(self) -> float:
        """Hash the next piece; the processor time it took, in seconds."""
        if not self._left:
            self._left.extend(
                (staged, piece)
                for staged in self._residency.at_rest()
                for piece in range(self._source.pieces(staged))
            )
        while self._left:
            staged, piece = self._left.popleft()
            if piece < self._source.pieces(staged):  # else it has left since the round began
                return await self._recheck(staged, piece)
        return 0.0

    async def _recheck(self, staged: StagedAdapter, piece: int) -> float:
        try:
            return await self._source.recheck(staged, piece)
        except DigestMismatchError as error:
            if await self._residency.damaged(staged):
                _log.error(
                    "integrity: %s leaves, and is fetched again when asked for: %s", staged.digest, error
                )
        return 0.0
