"""What a hostile process of the server's own user does to a staged adapter just before the engine opens it.

Everything that a publisher could do wrong is refused before vLLM sees a byte. What is left are paths that change under
its hands: links removed, or led to other files. Each harm makes vLLM itself refuse, at another place of its loader.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import load_file, save_file

from loraplex_client import AdapterRefusedError, Client, Completion
from loraplex_registry.delivery.private_dirs import TEMPORARY
from loraplex_registry.validation.lora_config import CONFIG_NAME
from loraplex_registry.validation.weights import WEIGHTS_NAME
from tests.e2e.conftest import generate

TRIES: Final = 5
"""The server looks at bytes at rest again, and may find the harm before the engine does."""

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


def spoil(cache: Path, digest: str, harm: str) -> None:
    """Do harm to what is staged of a version: one directory of links, reached by the engine only when it loads."""
    [directory] = cache.glob(f"{TEMPORARY}*/{digest.replace(':', '-')}")
    directory.chmod(0o700)
    HARMS[harm](directory)


def refused_by_the_engine(client: Client, cache: Path, adapter: str, digest: str, harm: str) -> str:
    """Stage an adapter, spoil it, ask for it; return the reason and the words of the refusal."""
    for _ in range(TRIES):
        list(client.load_adapter(adapter, stage_only=True))
        spoil(cache, digest, harm)
        try:
            generate(client, adapter)
        except AdapterRefusedError as error:
            return f"{error.code}: {error}"
        client.unload_adapter(adapter)
    raise AssertionError(f"{harm}: served {TRIES} times")


def served_afterwards(client: Client, adapter: str) -> Completion:
    """Ask for it again, which fetches it anew, and have it leave."""
    done = generate(client, adapter)
    client.unload_adapter(adapter)
    return done
