"""From a checked call to a place at the engine, whatever the engine is to do there: generate, or embed.

The order of things: a place is held, the prompt becomes tokens, the adapter's name a verified version, the call waits
for its turn, the adapter is leased. Everything that is held is given back in the opposite order, also when the call is
cancelled. Every call that begins is counted in exactly one of completed, failed, cancelled and expired.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from loraplex_server.adapters.residency import Lease
from loraplex_server.calls.account import Account
from loraplex_server.calls.events import Started
from loraplex_server.calls.gate import Backend, Gate
from loraplex_server.calls.guard import current_call
from loraplex_server.engine.protocol import Engine, EngineAdapter
from loraplex_server.errors import InvalidRequestError, UnsupportedByBaseError
from loraplex_server.metrics import Metrics
from loraplex_server.requests.messages import Prompt, check_token_ids
from loraplex_server.rollout.splits import Target
from loraplex_server.scheduling.scheduler import Turn


@dataclass(frozen=True)
class Place:
    """A place at the engine, for one request of it."""

    turn: Turn
    adapter: EngineAdapter | None
    started: Started


class Admission:
    """See the module. One per server."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self._gate = gate
        self._metrics = metrics
        # One tenant's cached prefixes are never looked up for another; new at every start.
        self._salt_key = secrets.token_bytes(32)

    def backend(self, task: str) -> Backend:
        """Return what to work with.

        Raises:
            EngineUnavailableError: nothing is there yet.
            UnsupportedByBaseError: the base model is served for something else.
        """
        backend = self._gate.backend
        if backend.engine.task != task:
            serves = {"generate": "text", "embed": "vectors"}
            raise UnsupportedByBaseError(
                f"the base model {backend.model_name} is served for {serves[backend.engine.task]} here, "
                f"not for {serves[task]}"
            )
        return backend

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[Account]:
        """Give the current call exactly one outcome."""
        call = current_call()
        account = Account(self._metrics, call.journey)
        self._metrics.request_started()
        outcome = "failed"
        try:
            yield account
            outcome = "completed"
            account.completed()
        except asyncio.CancelledError:
            expired = asyncio.get_running_loop().time() >= call.deadline
            outcome = "expired" if expired else "cancelled"
            if expired:
                account.failed(TimeoutError())
            raise
        except Exception as error:
            account.failed(error)
            raise
        finally:
            account.ended(outcome)

    async def pick(self, adapter: Target | None, account: Account, *, session: str = "") -> None:
        """Find the adapter's version that answers the current caller; `account.pick` is None for the base model.

        Raises:
            ServerError, RegistryError: it is not there for this caller, or must not be used.
        """
        if adapter is None:
            account.serves(None)
            return
        call, backend = current_call(), self._gate.backend
        call.journey.enter("resolve")
        pick = await backend.rollouts.pick(
            adapter,
            lambda ref: self._gate.resolve(ref, call.principal, call.journey.progress),
            session=session or call.id,
        )
        account.serves(pick)
        if backend.scheduler.full:
            backend.residency.prefetch(pick.version)

    @asynccontextmanager
    async def place(
        self,
        account: Account,
        *,
        prompt_tokens: int,
        request_id: str,
        priority: int = 0,
    ) -> AsyncIterator[Place]:
        """Wait for a turn at the engine with the adapter in it, and have both for the length of the block.

        Args:
            account: whose call it is.
            prompt_tokens: tokens of the prompt.
            request_id: the caller's, "" where the server's own is told.
            priority: greater goes first among the tenant's own.
        """
        backend, journey, pick = self._gate.backend, current_call().journey, account.pick
        journey.enter("queue")
        turn = backend.scheduler.turn(
            account.tenant,
            adapter=pick.version.digest if pick else "",
            prompt_tokens=prompt_tokens,
            priority=priority,
        )
        async with turn as given, self._lease(account) as lease:
            account.prompt_seen(prompt_tokens)
            started = Started(
                request_id=request_id or current_call().id,
                base_model=backend.model_name,
                base_digest=backend.engine.base.digest,
                adapter=pick.version.name if pick else "",
                adapter_digest=pick.version.digest if pick else "",
                adapter_was_resident=lease.was_resident if lease else False,
                adapter_tag=pick.tag if pick else "",
            )
            journey.enter("engine")
            yield Place(given, lease.adapter if lease else None, started)

    @asynccontextmanager
    async def _lease(self, account: Account) -> AsyncIterator[Lease | None]:
        """Have the adapter in the engine, the stable version for a canary that cannot be; None for the base model."""
        pick, journey, residency = account.pick, current_call().journey, self._gate.backend.residency
        if pick is None:
            yield None
            return
        journey.enter("adapter")
        async with AsyncExitStack() as leases:
            while True:
                tried = pick.version
                try:
                    lease = await leases.enter_async_context(residency.lease(tried, journey.progress))
                    break
                except Exception as error:
                    # Another completion of the same call may have gone over to the stable version meanwhile.
                    if pick.version is tried and not await pick.instead(error):
                        raise
                    account.serves_instead(pick.version)
            account.adapter_ready(tried, was_resident=lease.was_resident)
            yield lease

    def salt(self, account: Account) -> str:
        """Return what keeps the tenant's cached prefixes from others."""
        return hmac.new(self._salt_key, account.tenant.encode(), hashlib.sha256).hexdigest()


async def encode(engine: Engine, prompt: Prompt) -> tuple[int, ...]:
    """Return the prompt's tokens.

    Raises:
        InvalidRequestError: it has none, or ids that the base model does not know.
    """
    if prompt.token_ids is not None:
        check_token_ids(prompt.token_ids, vocab_size=engine.vocab_size)
        return prompt.token_ids
    if prompt.chat is not None:
        return tuple(await engine.encode_chat(prompt.chat))
    ids = await engine.encode_text(prompt.text or "")
    if not ids:
        raise InvalidRequestError("text", "has no tokens")
    return tuple(ids)


async def together(works: Sequence[Awaitable[Any]]) -> None:
    """Do everything at once. What fails first ends the others, and is raised as it is.

    One alone is done here and now, without a task of its own.
    """
    if len(works) == 1:
        await works[0]
        return
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(_await(work))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def _await(work: Awaitable[Any]) -> None:
    await work
