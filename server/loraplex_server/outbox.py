"""What the engine has said and the caller has not been sent yet: so that a caller who reads slowly holds up nobody.

The engine's side puts events in and never waits; the caller's side takes what has gathered, new tokens of one
completion as one piece. Promises: events come out in order, each once, with nothing lost; what is kept is bounded by
what a call may generate (`n` times `max_tokens`), some tens of bytes a token. For one event loop and one reader.
"""

import asyncio
from collections.abc import Awaitable, Sequence

from loraplex_server.engine import EngineChunk
from loraplex_server.events import Event, Piece, Send


class Outbox:
    """See the module."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._ended = False
        self._waiting: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Add an event; a piece is joined with those of the same completion that have not been taken yet."""
        if isinstance(event, Piece):
            for place in range(len(self._events) - 1, -1, -1):
                before = self._events[place]
                if not isinstance(before, Piece):
                    break
                if before.index == event.index:
                    self._events[place] = Piece(event.index, joined(before.chunk, event.chunk))
                    return
        self._events.append(event)
        self._wake()

    def end(self) -> None:
        """Say that no event will come any more."""
        self._ended = True
        self._wake()

    async def take(self) -> Sequence[Event]:
        """Return what has gathered, at least one event; nothing when the end has come."""
        while not self._events and not self._ended:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        taken, self._events = self._events, []
        return taken

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


async def pass_on(outbox: Outbox, work: Awaitable[None], send: Send) -> None:
    """Do work that puts events into an outbox, and send them meanwhile.

    When the work fails, what it had said before is sent first. When sending fails or is cancelled, the work is
    cancelled, and has ended when this returns.

    Raises:
        Exception: what the work or `send` raised.
    """

    async def whole() -> None:
        try:
            await work
        finally:
            outbox.end()

    task = asyncio.create_task(whole())
    try:
        while events := await outbox.take():
            for event in events:
                await send(event)
        await task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def joined(first: EngineChunk, second: EngineChunk) -> EngineChunk:
    """Return two chunks of one completion that follow each other as one."""
    return EngineChunk(
        first.text + second.text,
        first.token_ids + second.token_ids,
        first.cached_tokens,
        second.finish_reason,
        first.logprobs + second.logprobs,
    )
