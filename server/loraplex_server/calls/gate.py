"""What the services work with, and whether they may: one place that is empty until the engine answers."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from loraplex_registry.errors import AdapterNotFoundError
from loraplex_registry.refs import AdapterRef
from loraplex_server.adapters.preflight import Report, examine
from loraplex_server.adapters.residency import Residency
from loraplex_server.adapters.versions import AdapterVersion, Progress, Versions
from loraplex_server.engine.protocol import Engine
from loraplex_server.errors import EngineUnavailableError, NotFoundError
from loraplex_server.identity.principals import Principal, may_see
from loraplex_server.rollout.rollouts import Rollouts
from loraplex_server.scheduling.scheduler import Scheduler

_T = TypeVar("_T")


@dataclass(frozen=True)
class Backend:
    """What the services work with, once the engine is up. `versions` is None without a registry."""

    engine: Engine
    versions: Versions | None
    residency: Residency
    scheduler: Scheduler
    rollouts: Rollouts
    model_name: str
    prompt_chars_max: int
    slot_bytes: int


class Gate:
    """Holds the backend from the moment it is ready; until then, and after closing, calls are refused."""

    def __init__(self) -> None:
        self._backend: Backend | None = None

    def open(self, backend: Backend) -> None:
        """Let calls through."""
        self._backend = backend

    def close(self) -> None:
        """Refuse calls again."""
        self._backend = None

    @property
    def backend(self) -> Backend:
        """The backend. Raises EngineUnavailableError while there is none."""
        if self._backend is None:
            raise EngineUnavailableError(
                "the server is starting, stopping, or replacing its engine", retry_after_s=2.0
            )
        return self._backend

    async def resolve(
        self, ref: AdapterRef, principal: Principal, progress: Progress | None = None
    ) -> AdapterVersion:
        """Resolve a reference for a caller; what it may not see does not exist.

        Raises:
            NotFoundError: unknown, or another tenant's: the same words for both.
        """
        return await self._hiding(ref, principal, lambda versions: versions.resolve(ref, progress))

    async def examine(self, ref: AdapterRef, principal: Principal) -> Report:
        """Make every check of a load for a caller; see `preflight`.

        Raises:
            NotFoundError: as `resolve`.
        """
        return await self._hiding(ref, principal, lambda versions: examine(versions, ref))

    async def _hiding(
        self, ref: AdapterRef, principal: Principal, work: Callable[[Versions], Awaitable[_T]]
    ) -> _T:
        missing = NotFoundError(f"no adapter {ref} here", metadata={"adapter": str(ref)})
        versions = self.backend.versions
        if versions is None or not may_see(principal, ref.tenant):
            raise missing
        try:
            return await work(versions)
        except AdapterNotFoundError:
            raise missing from None
