"""What the engine has said and the caller has not been sent yet: so that a caller who reads slowly holds up nobody.

The engine's side puts events in and never waits; the caller's side takes what has gathered, new tokens of one
completion as one piece. Promises: events come out in order, each once, with nothing lost; what is kept is bounded by
what a call may generate (`n` times `max_tokens`), some tens of bytes a token. For one event loop and one reader.
"""

import asyncio
from collections.abc import Awaitable, Sequence

from loraplex_server.calls.events import Event, Piece, Send
from loraplex_server.engine.protocol import EngineChunk, TokenLogprobs


class _Gathered:
    """Chunks of one completion, put together only when they are taken: so that a long wait costs no copies."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._cached_tokens: int | None = None
        self._finish: str | None = None

    def add(self, chunk: EngineChunk) -> None:
        """Add the next chunk."""
        self._texts.append(chunk.text)
        self._token_ids += chunk.token_ids
        self._logprobs += chunk.logprobs
        if self._cached_tokens is None:
            self._cached_tokens = chunk.cached_tokens
        self._finish = chunk.finish_reason

    def piece(self) -> Piece:
        """Return all of them as one."""
        chunk = EngineChunk(
            "".join(self._texts),
            tuple(self._token_ids),
            self._cached_tokens or 0,
            self._finish,
            tuple(self._logprobs),
        )
        return Piece(self.index, chunk)


class Outbox:
    """See the module."""

    def __init__(self) -> None:
        self._events: list[Event | _Gathered] = []
        self._ended = False
        self._waiting: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Add an event; a piece is gathered with those of the same completion that have not been taken yet."""
        if isinstance(event, Piece):
            self._gathered(event.index).add(event.chunk)
        else:
            self._events.append(event)
        self._wake()

    def _gathered(self, index: int) -> "_Gathered":
        for before in reversed(self._events):
            if not isinstance(before, _Gathered):
                break
            if before.index == index:
                return before
        found = _Gathered(index)
        self._events.append(found)
        return found

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
        return [event.piece() if isinstance(event, _Gathered) else event for event in taken]

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
