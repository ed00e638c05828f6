"""The two ways an adapter gets into vLLM: through its engine loop, or past it.

`ThroughEngine` asks vLLM itself (`add_lora`), which reads and copies between two steps, and everybody waits for that:
every engine can do it. `Staged` has the worker make a block of memory beside its steps (`vllm_plugin.cpu.staging`), and
the first step that has a request for it writes its pointers down: CPU engines in native mode.

With Staged no step can read an adapter: the path that vLLM is told does not exist. A request whose block is not there
is ended by itself, before any step has it (`vllm_plugin.cpu.hooks`), and never answered by the base.
"""

import asyncio
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loraplex_registry.errors import UnsupportedAdapterError
from loraplex_server.engine.protocol import EngineAdapter
from loraplex_server.engine.staging_client import StagingClient
from loraplex_server.engine.vllm_values import lora_request
from loraplex_server.errors import EngineUnavailableError
from loraplex_server.vllm_plugin.cpu.staging_wire import STAGED_PREFIX

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_log = logging.getLogger(__name__)


class Loading(Protocol):
    """How adapters come and go; see `engine.Engine` for `load`, `unload`, `loaded` and `keeps_bytes`."""

    keeps_bytes: bool

    def request(self, adapter: EngineAdapter) -> Any:
        """The adapter as vLLM's requests name it."""

    async def load(self, adapter: EngineAdapter) -> int:
        """See `Engine.load`."""

    async def unload(self, slot_id: int) -> None:
        """See `Engine.unload`."""

    async def loaded(self) -> frozenset[int]:
        """See `Engine.loaded`."""

    async def close(self) -> None:
        """Let go of what it holds beside the engine. May be called twice."""


class ThroughEngine:
    """See the module."""

    keeps_bytes = False

    def __init__(self, llm: "AsyncLLM") -> None:
        self._llm = llm

    def request(self, adapter: EngineAdapter) -> Any:
        """See `Loading`."""
        return lora_request(adapter)

    async def load(self, adapter: EngineAdapter) -> int:
        """See `Loading`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            loaded = await self._llm.add_lora(lora_request(adapter))
        except EngineDeadError:
            raise EngineUnavailableError("the engine stopped", retry_after_s=5.0) from None
        except Exception as error:
            raise _refused(adapter, error) from error
        if not loaded:
            raise UnsupportedAdapterError(f"{adapter.name}: the engine did not take these weights")
        return 0

    async def unload(self, slot_id: int) -> None:
        """See `Loading`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._llm.remove_lora(slot_id)
        except EngineDeadError:
            raise EngineUnavailableError("the engine stopped", retry_after_s=5.0) from None

    async def loaded(self) -> frozenset[int]:
        """See `Loading`."""
        return frozenset(await self._llm.list_loras())

    async def close(self) -> None:
        """See `Loading`."""


class Staged:
    """See the module. `open` makes one."""

    keeps_bytes = True

    def __init__(self, llm: "AsyncLLM", client: StagingClient) -> None:
        self._through = ThroughEngine(llm)
        self._client = client

    @classmethod
    async def open(cls, llm: "AsyncLLM", *, pid: int, roots: list[str]) -> "Staged":
        """Have the worker listen, connect to it, and leave nothing to connect to behind.

        Args:
            llm: an engine in native mode.
            pid: this process.
            roots: directories below which adapters lie.

        Raises:
            EngineUnavailableError: it does not listen.
        """
        directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="loraplex-"))
        try:
            await llm.collective_rpc("loraplex_stage_at", args=(str(directory), pid, roots))
            return cls(llm, await StagingClient.connect(directory))
        except Exception as error:
            raise EngineUnavailableError(f"the engine cannot stage adapters: {error}") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    def request(self, adapter: EngineAdapter) -> Any:
        """See `Loading`."""
        # vLLM's prefix cache goes by name and path: both say which bytes, and neither which file.
        return lora_request(adapter, path=STAGED_PREFIX + adapter.name)

    async def load(self, adapter: EngineAdapter) -> int:
        """See `Loading`."""
        try:
            return await self._client.stage(adapter.slot_id, adapter.path)
        except UnsupportedAdapterError as error:
            raise _refused(adapter, error) from error

    async def unload(self, slot_id: int) -> None:
        """See `Loading`."""
        await self._client.drop(slot_id)
        await self._through.unload(slot_id)  # what a step has bound is let go of between two steps

    async def loaded(self) -> frozenset[int]:
        """See `Loading`."""
        return await self._client.staged()

    async def close(self) -> None:
        """See `Loading`."""
        await self._client.close()


def _refused(adapter: EngineAdapter, error: Exception) -> UnsupportedAdapterError:
    _log.warning("vLLM refused %s: %s", adapter.name, error)
    return UnsupportedAdapterError(f"{adapter.name}: the engine refused these weights")
