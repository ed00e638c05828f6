"""The server's end of the socket over which a worker stages adapters (`vllm_plugin.cpu.staging_wire`).

Promises: any number of callers ask at the same time over one connection; an answer reaches the one who asked, and one
that nobody waits for any more is passed over; when the connection ends, everybody who waits learns it, and everybody
who asks from then on.
"""

import asyncio
import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

from loraplex_registry.errors import UnsupportedAdapterError
from loraplex_server.errors import AdapterNotReadyError, EngineUnavailableError
from loraplex_server.vllm_plugin.cpu.staging_wire import (
    ANSWER_BYTES_MAX,
    SOCKET_NAME,
    Operation,
    Question,
    parse_answer,
)

RETRY_AFTER_S = 1.0


class StagingClient:
    """See the module. `connect`, then `close`, in one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._listening = asyncio.create_task(self._listen(reader), name="answers about staging")

    @classmethod
    async def connect(cls, directory: Path) -> "StagingClient":
        """Connect to the socket in a directory.

        Raises:
            OSError: nobody listens.
        """
        # By way of a descriptor: the path of a socket has 107 characters at most (unix(7)).
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            reader, writer = await asyncio.open_unix_connection(
                f"/proc/self/fd/{descriptor}/{SOCKET_NAME}", limit=ANSWER_BYTES_MAX
            )
        finally:
            os.close(descriptor)
        return cls(reader, writer)

    async def stage(self, adapter_id: int, path: Path) -> int:
        """Have a block made of the adapter in a directory; its bytes.

        Raises:
            UnsupportedAdapterError: the worker refuses these weights.
            AdapterNotReadyError: too many wait, or it was dropped meanwhile.
            EngineUnavailableError: the worker died.
        """
        answer = await self._ask("stage", adapter_id, str(path))
        size: int = answer["bytes"]
        return size

    async def drop(self, adapter_id: int) -> bool:
        """Have a block forgotten, or not made any further; whether there was one.

        Raises:
            EngineUnavailableError: the worker died.
        """
        return bool((await self._ask("drop", adapter_id))["dropped"])

    async def staged(self) -> frozenset[int]:
        """Ids whose blocks the worker keeps.

        Raises:
            EngineUnavailableError: the worker died.
        """
        return frozenset((await self._ask("list"))["ids"])

    async def close(self) -> None:
        """End the connection. May be called twice."""
        self._listening.cancel()
        self._writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._listening
        self._end()

    async def _ask(self, op: Operation, adapter_id: int = 0, path: str = "") -> dict[str, Any]:
        if self._listening.done():
            raise _gone()
        question = Question(next(self._numbers), op, adapter_id, path)
        answer = self._waiting[question.n] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(question.line())
            found: dict[str, Any] = await answer
        finally:
            self._waiting.pop(question.n, None)
        if "error" in found:
            raise _refused(found)
        return found

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                number, found = parse_answer(line)
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(found)
        except (OSError, ValueError):  # the worker died, or speaks another language; both end it here
            pass
        finally:
            self._end()

    def _end(self) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_gone())


def _gone() -> EngineUnavailableError:
    return EngineUnavailableError("the engine stopped", retry_after_s=5.0)


def _refused(found: dict[str, Any]) -> Exception:
    if found.get("code") == "refused":
        return UnsupportedAdapterError(str(found["error"]))
    return AdapterNotReadyError(f"the engine did not take it: {found['error']}", retry_after_s=RETRY_AFTER_S)
