"""From a checked call to a place at the engine, whatever the engine is to do there: generate, or embed.

The order of things: a place is held, the prompt becomes tokens, the adapter's name a verified version, the call waits
for its turn, the adapter is leased. Everything that is held is given back in the opposite order, also when the call is
cancelled. Every call that begins is counted in exactly one of completed, failed, cancelled and expired.
"""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from loraplex_registry.refs import AdapterRef
from loraplex_server.calls import current_call
from loraplex_server.engine import Engine, EngineAdapter
from loraplex_server.errors import InvalidRequestError, UnsupportedByBaseError
from loraplex_server.gate import Backend, Gate
from loraplex_server.metrics import Metrics
from loraplex_server.requests import Prompt, check_token_ids
from loraplex_server.residency import Lease
from loraplex_server.scheduling.scheduler import Turn
from loraplex_server.versions import AdapterVersion


@dataclass(frozen=True, kw_only=True)
class Started:
    """Who answers. Names and digests of the adapter are "" for the base model."""

    request_id: str
    base_model: str
    base_digest: str
    adapter: str
    adapter_digest: str
    adapter_was_resident: bool


@dataclass(frozen=True)
class Place:
    """A place at the engine, for one request of it."""

    turn: Turn
    adapter: EngineAdapter | None
    started: Started


class Account:
    """Whose call it is, and its times; tells the metrics as it goes."""

    def __init__(self, metrics: Metrics, *, tenant: str, arrived: float) -> None:
        """Begin; `arrived` is when the call did, in seconds of `time.monotonic`."""
        self.tenant = tenant
        self.metrics = metrics
        self.arrived = arrived
        self.last = arrived
        self.adapter_s = 0.0

    @property
    def total_s(self) -> float:
        """Seconds from arrival to the last thing the engine gave."""
        return self.last - self.arrived

    def adapter_ready(self, *, was_resident: bool) -> None:
        """The adapter is leased; counted when it is so for the first time."""
        if not self.adapter_s:
            self.adapter_s = time.monotonic() - self.arrived
            self.metrics.adapter_ready(self.adapter_s, was_resident=was_resident)


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
        account = Account(self._metrics, tenant=call.principal.tenant, arrived=call.arrived)
        self._metrics.request_started()
        outcome = "failed"
        try:
            yield account
            outcome = "completed"
            self._metrics.request_completed(account.tenant, account.total_s)
        except asyncio.CancelledError:
            expired = asyncio.get_running_loop().time() >= call.deadline
            outcome = "expired" if expired else "cancelled"
            raise
        finally:
            self._metrics.request_ended(account.tenant, outcome)

    async def version(self, adapter: AdapterRef | None, account: Account) -> AdapterVersion | None:
        """Resolve the adapter for the current caller; None for the base model.

        Raises:
            ServerError, RegistryError: it is not there for this caller, or must not be used.
        """
        if adapter is None:
            return None
        version = await self._gate.resolve(adapter, current_call().principal)
        account.tenant = version.tenant
        return version

    @asynccontextmanager
    async def place(
        self,
        account: Account,
        version: AdapterVersion | None,
        *,
        prompt_tokens: int,
        request_id: str,
        priority: int = 0,
    ) -> AsyncIterator[Place]:
        """Wait for a turn at the engine with the adapter in it, and have both for the length of the block.

        Args:
            account: whose call it is.
            version: the adapter, None for the base model.
            prompt_tokens: tokens of the prompt.
            request_id: the caller's, "" where the server's own is told.
            priority: greater goes first among the tenant's own.
        """
        backend = self._gate.backend
        turn = backend.scheduler.turn(
            account.tenant,
            adapter=version.digest if version else "",
            prompt_tokens=prompt_tokens,
            priority=priority,
        )
        async with turn as given, self._lease(version, account) as lease:
            self._metrics.prompt_seen(account.tenant, tokens=prompt_tokens)
            started = Started(
                request_id=request_id or current_call().id,
                base_model=backend.model_name,
                base_digest=backend.engine.base.digest,
                adapter=version.name if version else "",
                adapter_digest=version.digest if version else "",
                adapter_was_resident=lease.was_resident if lease else False,
            )
            yield Place(given, lease.adapter if lease else None, started)

    @asynccontextmanager
    async def _lease(self, version: AdapterVersion | None, account: Account) -> AsyncIterator[Lease | None]:
        """Have the adapter in the engine; None for the base model."""
        if version is None:
            yield None
            return
        async with self._gate.backend.residency.lease(version) as lease:
            account.adapter_ready(was_resident=lease.was_resident)
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
