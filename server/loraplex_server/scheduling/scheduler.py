"""Turns at the engine for calls of an event loop: bounds and quotas at the door, fairness behind it.

A call is held from its arrival to its end (`hold`), which bounds what the server keeps in memory, and has the engine
from its turn to its end (`turn`). So many have a turn at once as the engine decodes together, and a few more, so that a
place that becomes free is filled within a step. A call that is cancelled or whose deadline passes leaves from wherever
it is.

Promises: `held` and `running` count exactly the calls that are inside `hold` and `turn`; a place is given on at once;
nothing waits while a place is free and it may run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Protocol

from loraplex_server.errors import QueueFullError
from loraplex_server.scheduling.fair_queue import FairQueue, Ticket
from loraplex_server.scheduling.quotas import Quotas

RETRY_AFTER_S: Final = 1.0
"""Seconds after which a caller that was refused for want of room may try again."""


class SchedulerEvents(Protocol):
    """What the scheduler tells."""

    def turn_given(self, tenant: str, waited_s: float) -> None:
        """A call has the engine after waiting so long for its turn."""


class Turn:
    """One call's time at the engine."""

    def __init__(self, queue: FairQueue, quotas: Quotas, ticket: Ticket) -> None:
        self._queue, self._quotas, self._ticket = queue, quotas, ticket

    def generated(self, tokens: int) -> None:
        """Count tokens that the engine generated."""
        self._queue.charge(self._ticket, tokens)
        self._quotas.used(self._ticket.tenant, tokens)


class Scheduler:
    """See the module. For one event loop."""

    def __init__(
        self,
        *,
        places: int,
        requests_max: int,
        queue: FairQueue,
        quotas: Quotas,
        events: SchedulerEvents,
        resident: Callable[[], Collection[str]],
        clock: Callable[[], float],
    ) -> None:
        """Begin with nobody.

        Args:
            places: most calls that have a turn at once, at least 1.
            requests_max: most calls held, those that wait included.
            queue: decides whose turn is next.
            quotas: what each tenant may use.
            events: is told of turns.
            resident: returns the digests of the adapters in the engine.
            clock: seconds that never go back.
        """
        self._places = places
        self._requests_max = requests_max
        self._queue = queue
        self._quotas = quotas
        self._events = events
        self._resident = resident
        self._clock = clock
        self._given: dict[int, asyncio.Future[None]] = {}
        self.held = 0
        self.running = 0

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether a call that comes now has to wait for its turn."""
        return self.running >= self._places

    @property
    def fairness_gap(self) -> float:
        """The most tokens of service, by weight, that one tenant with something to do is ahead of another."""
        counters = self._queue.counters().values()
        return max(counters) - min(counters) if counters else 0.0

    @contextmanager
    def hold(self, tenant: str, requests: int = 1) -> Iterator[None]:
        """Hold a call of a tenant for the length of the block; it counts as so many requests.

        Raises:
            QueueFullError: the server holds `requests_max` already.
            TenantQuotaError: the tenant has used up a quota.
        """
        if self.held + requests > self._requests_max:
            raise QueueFullError(
                f"the server may hold {self._requests_max} requests, and would hold {self.held + requests}",
                retry_after_s=RETRY_AFTER_S,
            )
        self._quotas.accept(tenant, requests)
        self.held += requests
        try:
            yield
        finally:
            self.held -= requests
            self._quotas.released(tenant, requests)

    @asynccontextmanager
    async def turn(
        self, tenant: str, *, adapter: str, prompt_tokens: int, priority: int = 0
    ) -> AsyncIterator[Turn]:
        """Wait for a turn at the engine, and have it for the length of the block.

        Args:
            tenant: who is served, and pays.
            adapter: digest of the adapter that is needed, "" for the base model.
            prompt_tokens: tokens of the prompt.
            priority: greater goes first among the tenant's own calls.
        """
        ticket = Ticket(tenant, adapter, prompt_tokens, self._clock(), priority)
        self._queue.submit(ticket)
        given = self._given[ticket.number] = asyncio.get_running_loop().create_future()
        self._give_turns()
        try:
            await given
        except asyncio.CancelledError:
            self._given.pop(ticket.number, None)
            if not self._queue.withdraw(ticket):  # it was given in the same moment
                self._end(ticket)
            raise
        self._quotas.used(tenant, prompt_tokens)
        self._events.turn_given(tenant, self._clock() - ticket.arrived_s)
        try:
            yield Turn(self._queue, self._quotas, ticket)
        finally:
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        self.running -= 1
        self._queue.done(ticket)
        self._give_turns()

    def _give_turns(self) -> None:
        while self.running < self._places:
            ticket = self._queue.take(self._clock(), self._resident())
            if ticket is None:
                return
            self.running += 1
            given = self._given.pop(ticket.number)
            if not given.done():  # else its call is being cancelled, and gives the place on
                given.set_result(None)
