"""Request ids that callers choose: two calls of one caller with one id and one content are one generation.

The second joins while the first runs: it is told every event from the beginning, then each as it comes. The generation
goes on while anybody listens and is cancelled when the last one leaves. An answer that is complete is told again for a
while. The same id with other content is refused. What failed is not remembered: the next call tries again.

An answer is told again only while every adapter version that gave it may be used (`reconsider`, as of those in the
engine); else it is forgotten, and the call is one like any other, which is refused if the adapter is. Ids belong to the
whole principal: a caller whose role changed finds nothing of before.

Promises: a call that joined or was told again generates nothing and is no accepted generation of its own; it is held
like one (`Scheduler.hold`), so its tenant's quotas bound it. Memory is bounded whatever readers do: a generation's
events are kept in full up to ANSWER_BYTES_MAX; beyond that it can no longer be joined, only what its slowest reader has
yet to be told is kept, and when that reaches the bound the rest waits in the generation's outbox. Complete answers are
kept for `keep_s` seconds, ANSWERS_MAX of them and KEPT_BYTES_MAX in all at most, the oldest forgotten first.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Literal, Protocol

from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_server.adapters.reconsider import refusal
from loraplex_server.adapters.versions import AdapterVersion
from loraplex_server.calls.events import Event, Piece, Send
from loraplex_server.calls.gate import Backend, Gate
from loraplex_server.calls.generation import Generation
from loraplex_server.calls.guard import current_call
from loraplex_server.engine.protocol import EngineChunk
from loraplex_server.errors import EngineUnavailableError, RequestIdReusedError
from loraplex_server.identity.principals import Principal
from loraplex_server.requests.messages import GenerateCall, is_request_id

ANSWER_BYTES_MAX: Final = 4 << 20
KEPT_BYTES_MAX: Final = 64 << 20
ANSWERS_MAX: Final = 10_000
EVENT_BYTES: Final = 512
"""What an event takes without its tokens, about."""
TOKEN_BYTES: Final = 256
"""What a token, or a candidate of its log-probabilities, takes without its text, about."""
LETTER_BYTES: Final = 4
"""What a character of text takes at most."""

Key = tuple[Principal, str]
"""The caller with what it may do, and its request id."""


class ReplayEvents(Protocol):
    """What is told of calls that repeat others."""

    def request_repeated(self, how: Literal["joined", "replayed", "refused"]) -> None:
        """A call came with the id of another."""


class Replays:
    """See the module. One per server; for one event loop."""

    def __init__(self, generation: Generation, gate: Gate, events: ReplayEvents, *, keep_s: float) -> None:
        """Begin with nothing; complete answers are kept for `keep_s` seconds, 0 for not at all."""
        self._generation = generation
        self._gate = gate
        self._events = events
        self._keep_s = keep_s
        self._running: dict[Key, _Telling] = {}
        self._complete: OrderedDict[Key, _Telling] = OrderedDict()
        self._complete_bytes = 0

    async def run(
        self, message: gpb.GenerateRequest, parse: Callable[[Backend], GenerateCall], send: Send
    ) -> None:
        """Have the current call answered, by a generation of its own or by what another one's has told.

        Args:
            message: the request.
            parse: as of `Generation.run`.
            send: likewise.

        Raises:
            RequestIdReusedError: its id stands for something else.
            ServerError, RegistryError: as `Generation.run`.
        """
        if not is_request_id(message.request_id):
            await self._generation.run(parse, send)
            return
        principal, fingerprint = current_call().principal, _fingerprint(message)
        key = principal, message.request_id
        telling = self._running.get(key) or self._complete.get(key)
        if telling is None:
            await self._listen(key, self._begin(key, fingerprint, parse), send)
            return
        if telling.fingerprint != fingerprint or not telling.whole:
            self._events.request_repeated("refused")
            same = telling.fingerprint == fingerprint
            stands_for = "an answer that is too long to be told twice" if same else "another call"
            raise RequestIdReusedError(
                f"request_id {message.request_id} stands for {stands_for}", metadata={"field": "request_id"}
            )
        with self._gate.backend.scheduler.hold(principal.tenant):
            if await self._may_be_told(telling):
                self._events.request_repeated("replayed" if telling.done else "joined")
                await self._listen(key, telling, send)
                return
        self._forget(key, telling)
        await self.run(message, parse, send)

    async def _may_be_told(self, telling: "_Telling") -> bool:
        """Judge who gave a complete answer by the time of now; residency watches over those that still give one."""
        versions = self._gate.backend.versions
        for version in telling.answered:
            if versions is None or await refusal(versions, version) is not None:
                return False
        return True

    def _begin(self, key: Key, fingerprint: bytes, parse: Callable[[Backend], GenerateCall]) -> "_Telling":
        """Start generating, in a task that no single caller's leaving ends."""
        telling = self._running[key] = _Telling(fingerprint)
        telling.task = asyncio.create_task(self._generation.run(parse, telling.tell), name=f"generate {key}")
        telling.task.add_done_callback(lambda task: self._ended(key, telling, task))
        return telling

    async def _listen(self, key: Key, telling: "_Telling", send: Send) -> None:
        """Tell one caller. The last one that leaves before the end ends the generation, and waits for that."""
        try:
            await telling.listen(send)
        finally:
            if not telling.listened and telling.task is not None and not telling.task.done():
                self._drop(key, telling)
                telling.task.cancel()
                await asyncio.wait({telling.task})

    def _ended(self, key: Key, telling: "_Telling", task: "asyncio.Task[list[AdapterVersion]]") -> None:
        self._drop(key, telling)
        if task.cancelled():
            telling.end(EngineUnavailableError("the generation was cancelled", retry_after_s=1.0))
            return
        error = task.exception()
        telling.answered = [] if error else task.result()
        telling.end(error)
        if error is None and telling.whole and self._keep_s:
            self._keep(key, telling)

    def _drop(self, key: Key, telling: "_Telling") -> None:
        if self._running.get(key) is telling:
            del self._running[key]

    def _keep(self, key: Key, telling: "_Telling") -> None:
        """Keep a complete answer for its time, as far as there is room."""
        self._complete[key] = telling
        self._complete_bytes += telling.kept_bytes
        asyncio.get_running_loop().call_later(self._keep_s, self._forget, key, telling)
        while self._complete_bytes > KEPT_BYTES_MAX or len(self._complete) > ANSWERS_MAX:
            self._forget(*next(iter(self._complete.items())))

    def _forget(self, key: Key, telling: "_Telling") -> None:
        if self._complete.get(key) is telling:
            del self._complete[key]
            self._complete_bytes -= telling.kept_bytes


class _Telling:
    """The events of one generation, and where each of its readers is."""

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.task: asyncio.Task[list[AdapterVersion]] | None = None
        self.answered: list[AdapterVersion] = []  # known at the end
        self.whole = True  # whether every event is still there
        self.done = False
        self.kept_bytes = 0
        self._error: BaseException | None = None
        self._events: list[Event] = []
        self._dropped = 0  # events that were before those
        self._positions: dict[object, int] = {}
        self._change = asyncio.Event()

    @property
    def listened(self) -> bool:
        """Whether anybody listens."""
        return bool(self._positions)

    async def tell(self, event: Event) -> None:
        """Take the next event; waits while the slowest reader is too far behind."""
        self._events.append(event)
        self.kept_bytes += _bytes(event)
        self.whole = self.whole and self.kept_bytes <= ANSWER_BYTES_MAX
        self._changed()
        while not self.whole and self.kept_bytes > ANSWER_BYTES_MAX:
            self._forget_told()
            if self.kept_bytes > ANSWER_BYTES_MAX:
                await self._change.wait()

    def end(self, error: BaseException | None) -> None:
        """Say that no event will come any more."""
        self.done, self._error = True, error
        self._changed()

    async def listen(self, send: Send) -> None:
        """Send every event, and then raise what ended them if it was an error."""
        reader = object()
        self._positions[reader] = 0
        try:
            while not self.done or self._positions[reader] < self._dropped + len(self._events):
                await self._next(reader, send)
        finally:
            del self._positions[reader]
            self._changed()
        if self._error is not None:
            raise self._error

    async def _next(self, reader: object, send: Send) -> None:
        place = self._positions[reader] - self._dropped
        if place == len(self._events):
            await self._change.wait()
            return
        await send(self._events[place])
        self._positions[reader] += 1
        if not self.whole:
            self._forget_told()
            self._changed()

    def _forget_told(self) -> None:
        """Let go of what every reader was told."""
        end = self._dropped + len(self._events)
        told = min(self._positions.values(), default=end) - self._dropped
        self.kept_bytes -= sum(map(_bytes, self._events[:told]))
        del self._events[:told]
        self._dropped += told

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


def _fingerprint(message: gpb.GenerateRequest) -> bytes:
    """Digest of a request's content, whatever its id."""
    content = gpb.GenerateRequest()
    content.CopyFrom(message)
    content.ClearField("request_id")
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


def _bytes(event: Event) -> int:
    """What an event takes in memory, about."""
    if not isinstance(event, Piece):
        return EVENT_BYTES
    return EVENT_BYTES + _chunk_bytes(event.chunk)


def _chunk_bytes(chunk: EngineChunk) -> int:
    candidates = [candidate for each in chunk.logprobs for candidate in each.top]
    entries = len(chunk.token_ids) + len(chunk.logprobs) + len(candidates)
    letters = sum(len(each.text) for each in chunk.logprobs) + sum(len(each.text) for each in candidates)
    return LETTER_BYTES * (len(chunk.text) + letters) + TOKEN_BYTES * entries
