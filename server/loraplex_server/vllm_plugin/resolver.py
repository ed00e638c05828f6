"""A LoRA resolver for a stock `vllm serve`: adapters of a registry by name, verified before vLLM sees a byte.

    LORAPLEX_RESOLVER=server.toml VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora

The file is a server's settings file; its sections `registry` and `adapters` count. A request whose `model` is
`tenant/adapter[@tag|@version|@sha256:…]` is resolved, verified by the trust policy for the base that vLLM serves, and
handed on as sealed memory, which stays as long as the process. What is refused is "not found" to the caller; the log
says why. Names that are not adapter references are left to other resolvers.

What `vllm serve` does not have, no resolver can give it: it knows no tenants, so put in front of it what checks that a
caller asks for its own adapters; and it asks a resolver once per name, so a moved tag or a revocation is seen after
`/v1/unload_lora_adapter` or a restart. `loraplex serve` does both.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraplex_registry.errors import (
    AdapterNotFoundError,
    InvalidReferenceError,
    RegistryError,
    StoreRefusedError,
)
from loraplex_registry.refs import AdapterRef

if TYPE_CHECKING:
    from loraplex_server.adapters.versions import AdapterVersion, Versions
    from loraplex_server.config import Config

RESOLVER_ENV: Final = "LORAPLEX_RESOLVER"
"""Names the settings file; without it the resolver is not registered."""

NAME: Final = "loraplex"
"""What the resolver is registered as."""

ADAPTERS_MAX: Final = 1000
"""Most names resolved by one process: each holds its bytes in memory and five file descriptors."""

_log = logging.getLogger("vllm.loraplex")  # below vLLM's own: it alone has a handler in vLLM's processes


def register() -> None:
    """Register the resolver with vLLM if LORAPLEX_RESOLVER names a settings file.

    Raises:
        ConfigError: the file is wrong, or names no registry.
    """
    path = os.environ.get(RESOLVER_ENV)
    if not path:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from loraplex_server.config import load_config
    from loraplex_server.errors import ConfigError

    config = load_config(Path(path))
    if not config.registry.url:
        raise ConfigError(f"{path}: registry.url is required for the resolver")
    LoRAResolverRegistry.register_resolver(NAME, _resolver_class()(config))


class Resolver:
    """See the module. One per process; used by the event loop of vLLM's HTTP server."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._versions: Versions | None = None
        self._starting = asyncio.Lock()
        self._staged: dict[str, asyncio.Task[str]] = {}  # by digest: names of one version share its bytes

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return vLLM's `LoRARequest` for a name, or None. See `vllm.lora.resolver.LoRAResolver`."""
        from vllm.lora.request import LoRARequest

        try:
            ref = AdapterRef.parse(lora_name)
        except InvalidReferenceError:
            return None
        try:
            versions = await self._ready(base_model_name)
            version = await versions.resolve(ref)
            path = await self._path(versions, version)
        except AdapterNotFoundError:
            return None
        except RegistryError as error:
            _log.warning("%s is refused [%s]: %s", ref, error.code, error)
            return None
        _log.info("%s is %s", ref, version.name)
        # vLLM gives the id; the path stays good until the process ends, so it may load from it again.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=path)

    async def _path(self, versions: Versions, version: AdapterVersion) -> str:
        """Return where a version's bytes are, staged once."""
        if version.digest not in self._staged and len(self._staged) >= ADAPTERS_MAX:
            raise StoreRefusedError(f"This process holds {ADAPTERS_MAX} adapters already; restart it.")
        task = self._staged.get(version.digest)
        if task is None:
            task = asyncio.create_task(_stage(versions, version), name=f"stage {version.name}")
            self._staged[version.digest] = task
        try:
            return await asyncio.shield(task)
        except RegistryError:
            self._staged.pop(version.digest, None)
            raise

    async def _ready(self, base_model_name: str) -> Versions:
        async with self._starting:
            if self._versions is None:
                self._versions = await asyncio.to_thread(_versions, self._config, base_model_name)
            return self._versions


async def _stage(versions: Versions, version: AdapterVersion) -> str:
    return str((await versions.stage(version, _silent)).path)


def _versions(config: Config, base_model_name: str) -> Versions:
    from loraplex_registry.validation.base import BaseModel
    from loraplex_registry.validation.checkpoint import checkpoint_directory
    from loraplex_server.wiring import load_policy, make_versions, open_cache

    directory = checkpoint_directory(base_model_name)
    base = BaseModel.from_directory(directory, name=Path(base_model_name).name)
    policy = load_policy(config)
    assert policy is not None  # `register` refused a file without a registry
    return make_versions(config, base, policy, open_cache(config))


def _resolver_class() -> Any:
    """Return `Resolver` as a subclass of vLLM's own base class, which is not imported before."""
    from vllm.lora.resolver import LoRAResolver

    return type("RegistryResolver", (Resolver, LoRAResolver), {})


def _silent(_phase: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""
