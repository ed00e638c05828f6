"""Whether the engine can follow a form of structured output at a bounded cost: found out in another process.

vLLM compiles a form in the engine's process and follows it within steps that everybody shares. So each form is tried
in `form_sandbox` first. That process is started with the first form and holds the tokenizer and nothing else: no
weights, no credentials (it gets none of the server's environment but paths).

Promises: a form is passed on only after a trial that ended well; one tenant's forms are tried one after the other and
tenants take turns, so none waits longer than one trial of each of the others; what a trial found is remembered, for the
tenant that asked.
"""

import asyncio
import hashlib
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from loraplex_server.engine.protocol import Form
from loraplex_server.errors import EngineUnavailableError, InvalidRequestError

_log = logging.getLogger(__name__)

REMEMBERED_MAX: Final = 4096
"""Most outcomes of trials that are kept."""
START_S_MAX: Final = 120.0
REPLY_S_MAX: Final = 90.0
_PASSED_ON: Final = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "HOME", "LANG")
_RETRY_AFTER_S: Final = 5.0


def sandbox_command(directory: Path, vocab_size: int) -> list[str]:
    """Return the command of `form_sandbox`, for a base model's directory and the size of its vocabulary."""
    return [sys.executable, "-m", "loraplex_server.engine.form_sandbox", str(directory), str(vocab_size)]


class FormTrials:
    """See the module. For one event loop."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start nothing yet; `command` runs `form_sandbox` for a base model's tokenizer."""
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._tenants: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._outcomes: OrderedDict[bytes, str | None] = OrderedDict()
        self._trials: set[asyncio.Task[str | None]] = set()

    async def check(self, form: Form, *, tenant: str, field: str) -> None:
        """See `Engine.check_form`; `field` is named in the refusal."""
        key = hashlib.sha256(json.dumps([tenant, asdict(form)]).encode()).digest()
        if key in self._outcomes:
            self._outcomes.move_to_end(key)
            problem = self._outcomes[key]
        else:
            problem = await self._tried(form, tenant, key)
        if problem is not None:
            raise InvalidRequestError(field, problem)

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def _tried(self, form: Form, tenant: str, key: bytes) -> str | None:
        """Wait for the tenant's turn and a trial. A caller that leaves does not end a trial that has begun."""
        mine = self._tenants.get(tenant)
        if mine is None:
            mine = self._tenants[tenant] = asyncio.Lock()
        await mine.acquire()
        if key in self._outcomes:  # tried while this one waited
            mine.release()
            return self._outcomes[key]
        trial = asyncio.create_task(self._trial(form, key))
        self._trials.add(trial)
        trial.add_done_callback(self._trials.discard)
        trial.add_done_callback(lambda _: mine.release())
        return await asyncio.shield(trial)

    async def _trial(self, form: Form, key: bytes) -> str | None:
        async with self._turn:
            reply = await self._asked(json.dumps(asdict(form)).encode() + b"\n")
        if reply is None or not reply["tried"]:
            raise EngineUnavailableError(
                "structured output cannot be checked now", retry_after_s=_RETRY_AFTER_S
            )
        problem: str | None = reply["problem"]
        self._outcomes[key] = problem
        if len(self._outcomes) > REMEMBERED_MAX:
            self._outcomes.popitem(last=False)
        return problem

    async def _asked(self, line: bytes) -> dict[str, Any] | None:
        """Return the sandbox's reply; None when there is none. It is started anew after that."""
        try:
            process = await self._started()
            assert process.stdin is not None
            process.stdin.write(line)
            await process.stdin.drain()
            return await _reply(process, REPLY_S_MAX)
        except (OSError, ValueError, TimeoutError) as error:
            _log.error("forms of structured output cannot be tried out: %s: %s", type(error).__name__, error)
            await self.close()
            return None

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # the library's warnings would show what a tenant sent
            env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        ready = await _reply(self._process, START_S_MAX)
        if ready["ready"] is not None:
            raise ValueError(ready["ready"])
        return self._process


async def _reply(process: asyncio.subprocess.Process, seconds: float) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(seconds):
        reply: dict[str, Any] = json.loads(await process.stdout.readline())
    return reply
