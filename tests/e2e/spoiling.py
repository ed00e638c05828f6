"""What a hostile process of the server's own user does to a staged adapter just before the engine opens it.

Everything that a publisher could do wrong is refused before vLLM sees a byte. What is left are paths that change under
its hands: links removed, or led to other files. Each harm makes vLLM itself refuse, at another place of its loader.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import load_file, save_file

from loraplex_client import AdapterRefusedError, Client, Completion
from loraplex_registry.delivery.private_dirs import TEMPORARY
from loraplex_registry.validation.lora_config import CONFIG_NAME
from loraplex_registry.validation.weights import WEIGHTS_NAME
from tests.e2e.conftest import generate
from tests.e2e.test_engine_death import engine_cores

STAGED_S_MAX: Final = 20.0
SETTLED_S: Final = 0.2  # from the first sight of the directory until the engine has been asked

Tensors = dict[str, np.ndarray]


def _weights(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def harm(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS_NAME)
        (directory / WEIGHTS_NAME).unlink()
        save_file(change(tensors), directory / WEIGHTS_NAME)

    return harm


def _cut(directory: Path) -> None:
    body = (directory / WEIGHTS_NAME).read_bytes()
    (directory / WEIGHTS_NAME).unlink()
    (directory / WEIGHTS_NAME).write_bytes(body[: len(body) // 2])


def _config(**changes: object) -> Callable[[Path], None]:
    def harm(directory: Path) -> None:
        config = json.loads((directory / CONFIG_NAME).read_bytes())
        (directory / CONFIG_NAME).unlink()
        (directory / CONFIG_NAME).write_text(json.dumps({**config, **changes}))

    return harm


def _wider(tensors: Tensors) -> Tensors:
    return {name: np.pad(tensor, ((0, 32), (0, 32))) for name, tensor in tensors.items()}


HARMS: Final[Mapping[str, Callable[[Path], None]]] = {
    "weights gone": lambda directory: (directory / WEIGHTS_NAME).unlink(),
    "settings gone": lambda directory: (directory / CONFIG_NAME).unlink(),
    "weights cut short": _cut,
    "modules nobody knows": _weights(lambda old: {n.replace("_proj.", "_oops."): t for n, t in old.items()}),
    "tensors that are no LoRA": _weights(
        lambda old: {f"{name}.more": tensor for name, tensor in old.items()}
    ),
    "shapes beyond the slot's": _weights(_wider),  # found when half of the slot is written
    "rank beyond the slots'": _config(r=4096),
    "whole layers": _config(modules_to_save=["lm_head"]),
}


def refused_by_the_engine(
    client: Client, server: int, cache: Path, adapter: str, digest: str, harm: str
) -> str:
    """Ask for an adapter and spoil it before the engine opens it; return the reason and the words of the refusal.

    The engine's process is stopped meanwhile, so that it opens what was spoiled and never what was there before.
    """
    [core] = engine_cores(server)
    os.kill(core, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as asking:
            done = asking.submit(generate, client, adapter)
            try:
                _spoil(_staged(cache, digest), harm)
            finally:
                os.kill(core, signal.SIGCONT)
            try:
                done.result()
            except AdapterRefusedError as error:
                return f"{error.code}: {error}"
    finally:
        os.kill(core, signal.SIGCONT)
    raise AssertionError(f"{harm}: served")


def _staged(cache: Path, digest: str) -> Path:
    """The directory of links that the engine is told to load, once the server has laid it out."""
    until = time.monotonic() + STAGED_S_MAX
    while time.monotonic() < until:
        found = list(cache.glob(f"{TEMPORARY}*/{digest.replace(':', '-')}"))
        if found:
            time.sleep(SETTLED_S)
            return found[0]
        time.sleep(0.005)
    raise AssertionError(f"{digest} was not staged within {STAGED_S_MAX} s")


def _spoil(directory: Path, harm: str) -> None:
    directory.chmod(0o700)
    HARMS[harm](directory)


def served_afterwards(client: Client, adapter: str) -> Completion:
    """Ask for it again, which fetches it anew, and have it leave."""
    done = generate(client, adapter)
    client.unload_adapter(adapter)
    return done
