"""Waiting requests of many tenants, and whose turn it is: weighted fairness by virtual token counters. Pure.

Every tenant has a counter of the service it was given, in tokens divided by its weight: prompt tokens and the cost of
bringing an adapter in when its request goes to the engine, generated tokens as they come. The tenant with the smallest
counter is next. A tenant that comes back after having nothing to do starts where the least served one is, so idleness
is not saved up; one that was served more than that keeps its counter. This is VTC of Sheng et al., "Fairness in Serving
Large Language Models" (OSDI 2024), with two additions:

- working set: among tenants whose counters differ by less than `slack_tokens`, one whose adapter is in the engine goes
  first, so that more adapters than slots degrade gently;
- ageing: a request that waited `patience_s` is not passed over for that reason any more, so a cold adapter is never
  starved.

A tenant's own requests go by priority, then by arrival; no priority passes over another tenant.

Laws, for requests of at most `P` prompt tokens and `G` generated ones, `n` in the engine at most:

- fairness: two tenants without a limit of their own that had requests waiting all through an interval were served in
  it, each divided by its weight, with a difference of at most `2 * (slack + (P + switch + n * G) / w)`, `w` being the
  smaller weight (as theorem 4.3 there: who is taken has at most `slack` more than the other, and can then grow by this
  prompt and by what its `n` requests still generate);
- work conservation: `take` gives a request whenever one waits that may run;
- every ticket leaves by exactly one of `take` and `withdraw`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Final

SLACK_TOKENS: Final = 512.0
"""Tokens of service (weight 1) for which another tenant may be preferred because its adapter is in the engine."""

SWITCH_TOKENS: Final = 64.0
"""What bringing an adapter in costs, in tokens: on a CPU it takes as long as a few decoding steps of a full batch."""

REMEMBERED_MAX: Final = 10_000
"""Most tenants with nothing to do whose counters are kept."""

PATIENCE_S: Final = 2.0
"""Seconds after which a waiting request is not passed over for an adapter in the engine any more."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that waits for its turn.

    Attributes:
        tenant: whose it is; pays for it.
        adapter: digest of the adapter it needs, "" for the base model.
        prompt_tokens: charged when it goes to the engine.
        arrived_s: when it began to wait, in seconds of the clock of `FairQueue.take`.
        priority: greater goes first among its tenant's own.
    """

    tenant: str
    adapter: str
    prompt_tokens: int
    arrived_s: float
    priority: int = 0
    number: int = 0
    waiting: bool = False


@dataclass(slots=True)
class _Tenant:
    weight: float
    counter: float
    waiting: list[tuple[int, int, Ticket]] = field(
        default_factory=list
    )  # heap of (-priority, number, ticket)
    count: int = 0  # of them that were not withdrawn
    running: int = 0

    def idle(self) -> bool:
        return not self.count and not self.running

    def settle(self) -> None:
        """Let go of withdrawn tickets at the front."""
        while self.waiting and not self.waiting[0][2].waiting:
            heapq.heappop(self.waiting)

    def tickets(self) -> Iterator[Ticket]:
        """The waiting ones in their order; O(n log n), asked for when the first one's adapter is not there."""
        return (ticket for _, _, ticket in sorted(self.waiting) if ticket.waiting)


class FairQueue:
    """See the module. Not for several threads at once."""

    def __init__(
        self,
        *,
        weight_of: Callable[[str], float] = lambda _tenant: 1.0,
        running_max_of: Callable[[str], int] = lambda _tenant: 1 << 30,
        switch_tokens: float = SWITCH_TOKENS,
        slack_tokens: float = SLACK_TOKENS,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Begin empty.

        Args:
            weight_of: a tenant's share, above 0; asked for when it comes.
            running_max_of: most requests of a tenant in the engine at once, at least 1.
            switch_tokens: see SWITCH_TOKENS.
            slack_tokens: see SLACK_TOKENS.
            patience_s: see PATIENCE_S.
        """
        self._weight_of = weight_of
        self._running_max_of = running_max_of
        self._switch_tokens = switch_tokens
        self._slack_tokens = slack_tokens
        self._patience_s = patience_s
        self._tenants: dict[str, _Tenant] = {}  # those with something to do
        self._remembered: dict[str, float] = {}  # counters of the others, latest last
        self._floor = 0.0
        self._numbers = count(1)
        self._waiting = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return self._waiting

    def waiting_of(self, tenant: str) -> int:
        """Requests of a tenant that wait."""
        found = self._tenants.get(tenant)
        return found.count if found else 0

    def counters(self) -> dict[str, float]:
        """The counter of every tenant that has something to do, in tokens divided by weight."""
        return {name: tenant.counter for name, tenant in self._tenants.items()}

    def submit(self, ticket: Ticket) -> None:
        """Let a request wait for its turn."""
        tenant = self._tenants.get(ticket.tenant)
        if tenant is None:
            counter = max(self._remembered.pop(ticket.tenant, 0.0), self._least())
            tenant = self._tenants[ticket.tenant] = _Tenant(self._weight_of(ticket.tenant), counter)
        ticket.number, ticket.waiting = next(self._numbers), True
        heapq.heappush(tenant.waiting, (-ticket.priority, ticket.number, ticket))
        tenant.count += 1
        self._waiting += 1

    def take(self, now_s: float, resident: Collection[str] = ()) -> Ticket | None:
        """Return the request whose turn it is, or None when none may run; `done` must follow.

        Args:
            now_s: the time.
            resident: digests of the adapters in the engine.
        """
        able = [tenant for name, tenant in self._tenants.items() if self._able(name, tenant)]
        if not able:
            return None
        able.sort(key=lambda tenant: (tenant.counter, tenant.waiting[0][1]))
        ticket = self._choice(able, now_s, resident)
        tenant = self._tenants[ticket.tenant]
        self._leave(tenant, ticket)
        tenant.running += 1
        cost = ticket.prompt_tokens + (0.0 if _there(ticket, resident) else self._switch_tokens)
        tenant.counter += cost / tenant.weight
        return ticket

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """Count tokens generated for a request that was taken."""
        tenant = self._tenants[ticket.tenant]
        tenant.counter += tokens / tenant.weight

    def done(self, ticket: Ticket) -> None:
        """Say that a request which was taken has left the engine."""
        tenant = self._tenants[ticket.tenant]
        tenant.running -= 1
        self._forget_idle(ticket.tenant, tenant)

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a waiting request away; False when it had left already."""
        if not ticket.waiting:
            return False
        tenant = self._tenants[ticket.tenant]
        self._leave(tenant, ticket)
        self._forget_idle(ticket.tenant, tenant)
        return True

    def _able(self, name: str, tenant: _Tenant) -> bool:
        return tenant.count > 0 and tenant.running < self._running_max_of(name)

    def _choice(self, able: list[_Tenant], now_s: float, resident: Collection[str]) -> Ticket:
        """Return the next ticket of the tenants in order of their counters."""
        first = able[0].waiting[0][2]
        if _there(first, resident) or now_s - first.arrived_s >= self._patience_s:
            return first
        for tenant in able:
            if tenant.counter > able[0].counter + self._slack_tokens:
                break
            for ticket in tenant.tickets():
                if _there(ticket, resident):
                    return ticket
        return first

    def _leave(self, tenant: _Tenant, ticket: Ticket) -> None:
        ticket.waiting = False
        tenant.count -= 1
        tenant.settle()
        self._waiting -= 1

    def _forget_idle(self, name: str, tenant: _Tenant) -> None:
        if tenant.idle():
            least = self._least()
            del self._tenants[name]
            if not self._tenants:
                self._floor = least = tenant.counter
            if tenant.counter > least:
                self._remembered[name] = tenant.counter
                if len(self._remembered) > REMEMBERED_MAX:
                    del self._remembered[next(iter(self._remembered))]

    def _least(self) -> float:
        """Return where a tenant that comes starts: at the least served one that has something to do."""
        if self._tenants:
            self._floor = max(self._floor, min(tenant.counter for tenant in self._tenants.values()))
        return self._floor


def _there(ticket: Ticket, resident: Collection[str]) -> bool:
    return not ticket.adapter or ticket.adapter in resident
