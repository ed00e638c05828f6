"""Keeping an engine: it is started, watched, and when it dies a fresh one takes its place in the same process.

    start ──▶ serving ──── died ────▶ lost ──▶ a fresh engine starts ──▶ back ──▶ serving
                                       ▲                  │ died again     │
                                       └──────────────────┴────────────────┘

`lost` and `back` are what the rest of the server does about it; `app` has them. A dead engine is closed before the next
one starts, so that its processes and shared memory are gone. More than `restarts_max` restarts within `window_s`
seconds are not tried: then somebody has to look, and the process ends.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn, Protocol

from loraplex_server.engine.protocol import Engine
from loraplex_server.errors import EngineUnavailableError

CHECK_INTERVAL_S: Final = 0.5
"""Seconds between two looks at a living engine."""

_log = logging.getLogger(__name__)


class SupervisionEvents(Protocol):
    """What supervision tells the outside (metrics)."""

    def engine_restarted(self) -> None:
        """An engine died, and a fresh one was started."""


class Supervisor:
    """Owns the engine of a server; see the module. All in one event loop."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        restarts_max: int,
        window_s: float,
        events: SupervisionEvents,
        clock: Callable[[], float],
    ) -> None:
        """Begin with an engine that is not started.

        Args:
            make_engine: makes one; called again for each restart.
            restarts_max: most restarts within `window_s`; 0 for none.
            window_s: seconds.
            events: is told of restarts.
            clock: seconds that never go back.
        """
        self._make_engine = make_engine
        self._restarts_max = restarts_max
        self._window_s = window_s
        self._events = events
        self._clock = clock
        self._restarts: deque[float] = deque()
        self._engine = make_engine()

    @property
    def engine(self) -> Engine:
        """The engine of now, which may be starting or dead."""
        return self._engine

    async def start(self) -> None:
        """Start the first engine.

        Raises:
            ConfigError, EngineUnavailableError: why it did not start; that is not tried again.
        """
        await self._engine.start()

    async def watch(
        self,
        lost: Callable[[EngineUnavailableError], Awaitable[None]],
        back: Callable[[Engine], Awaitable[None]],
    ) -> NoReturn:
        """Watch the engine, and replace it whenever it dies.

        Args:
            lost: called when an engine has died, with what to tell its calls; before anything else is done.
            back: called when a fresh one has started; cancelled when that one dies too before it has ended.

        Raises:
            EngineUnavailableError: it died more often than it may, or the base model on disk is another one now.
            ConfigError: the base model cannot be found any more.
        """
        coming_back: asyncio.Future[None] | None = None
        try:
            while True:
                error = await self._death(coming_back)
                _log.error("the engine died: %s", error)
                await lost(error)
                await _end(coming_back)
                await self._start_another()
                coming_back = asyncio.ensure_future(back(self._engine))
        finally:
            await _end(coming_back)

    async def close(self) -> None:
        """End the engine. May be called twice."""
        await self._engine.close()

    async def _death(self, coming_back: "asyncio.Future[None] | None") -> EngineUnavailableError:
        """Wait until the engine is dead. What `back` raises is raised here."""
        while True:
            try:
                await self._engine.check()
            except EngineUnavailableError as error:
                return error
            if coming_back is not None and coming_back.done():
                coming_back.result()
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def _start_another(self) -> None:
        """Replace the engine, as often as it takes and may be."""
        base = self._engine.base.digest
        while True:
            self._count_restart()
            with contextlib.suppress(
                Exception
            ):  # a dead engine may fail at anything; what it holds goes with it
                await self._engine.close()
            self._engine = self._make_engine()
            try:
                await self._engine.start()
            except EngineUnavailableError as error:
                _log.error("the engine did not start again: %s", error)
                continue
            if self._engine.base.digest != base:
                raise EngineUnavailableError("the base model is not the one this server was started with")
            self._events.engine_restarted()
            return

    def _count_restart(self) -> None:
        now = self._clock()
        while self._restarts and now - self._restarts[0] > self._window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._restarts_max:
            raise EngineUnavailableError(
                f"the engine died; {len(self._restarts)} restarts within {self._window_s:g} s were tried already"
            )
        self._restarts.append(now)


async def _end(task: "asyncio.Future[None] | None") -> None:
    """Cancel what still runs and wait for its end."""
    if task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task])
