"""Moments that many tasks wait for together: one timer and one wake-up of the event loop for all of them."""

import asyncio


class Beat:
    """A beat every so many seconds, while anybody waits for it. For one event loop."""

    def __init__(self, interval_s: float) -> None:
        """Begin; 0 means that `next` returns at once."""
        self._interval_s = interval_s
        self._coming: asyncio.Future[None] | None = None

    async def next(self) -> None:
        """Wait for the next beat, which is at most one interval away."""
        if not self._interval_s:
            return
        if self._coming is None or self._coming.done():
            loop = asyncio.get_running_loop()
            self._coming = loop.create_future()
            loop.call_later(self._interval_s, self._coming.set_result, None)
        await asyncio.shield(self._coming)  # who leaves does not end the others' waiting
