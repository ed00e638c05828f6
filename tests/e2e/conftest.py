"""Real processes on loopback: an S3 server, a proxy before it that can fail, and `loraplex serve` on vLLM.

The engine is started once for all tests here. Its base is the tiny Llama of the demo, trained for one step only:
what it says is noise, but greedy noise is repeatable and every adapter changes it.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import boto3
import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplex_client import GREEDY, Client, Completion, TokenIds
from loraplex_examples import s3_server
from loraplex_examples.tiny_base import Recipe, ensure_tiny_base
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Published, Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage.store import open_store
from loraplex_registry.validation.base import BaseModel
from tests.registry.builders import adapter_config, make_signer
from tests.server.conftest import POLICY
from tests.sim.toxics import Toxics

START_TIMEOUT_S = 180.0
BUCKET = "adapters"
SLOTS = 4
RANK_MAX = 16
RANK = 8
MODULES = ("q_proj", "v_proj", "down_proj")
SIXTEEN = replace(GREEDY, max_tokens=16, ignore_eos=True)
PROMPT = TokenIds((1, 20, 30, 40, 50))


def write_adapter(
    base: BaseModel,
    directory: Path,
    *,
    seed: int,
    rank: int = RANK,
    modules: Sequence[str] = MODULES,
    std: float = 0.5,
) -> Path:
    """Write a random adapter, strong enough to change greedy tokens, for any base."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (width_in, width_out) in base.layers.items():
        if module.rpartition(".")[2] in modules:
            parts = "lora_A.weight", "lora_B.weight"
            if module.endswith("embed_tokens"):  # PEFT's own layout: from a token to its vector
                parts, width_in, width_out = ("lora_embedding_A", "lora_embedding_B"), width_out, width_in
            for part, size in zip(parts, ((rank, width_in), (width_out, rank)), strict=True):
                tensors[f"base_model.model.{module}.{part}"] = rng.normal(0, std, size).astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    import json

    config = adapter_config(rank=rank, target_modules=list(modules))
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


class Stage:
    """Everything the end-to-end tests share."""

    def __init__(self, root: Path, base_dir: Path, s3: s3_server.S3Server, toxics: Toxics) -> None:
        self.root = root
        self.base_dir = base_dir
        self.base = BaseModel.from_directory(base_dir)
        self.s3 = s3
        self.toxics = toxics
        self.url = f"s3://{BUCKET}/registry"
        self.signers: dict[str, Signer] = {t: make_signer(root, t) for t in ("acme", "globex")}
        (root / "policy.toml").write_text(POLICY)
        self.objects = boto3.client("s3", endpoint_url=s3.endpoint_url)
        self.registry = Registry(open_store(self.url, endpoint_url=s3.endpoint_url))
        self.port = 0
        self.metrics_port = 0
        self.http_port = 0
        self.pid = 0  # of the shared server
        self.encrypted: set[str] = set()  # digests whose bytes the server must keep off its disk

    @property
    def cache(self) -> Path:
        """Where the server keeps verified adapters."""
        return self.root / "cache"

    def client(self) -> Client:
        """A client of the shared server."""
        return Client(f"127.0.0.1:{self.port}", timeout_s=60)

    def publish(
        self, ref: str, *, seed: int, rank: int = RANK, signer: str | None = None, tag: str | None = None
    ) -> Published:
        """Make, sign and push an adapter from a seed."""
        parsed = AdapterRef.parse(ref)
        directory = write_adapter(self.base, self.root / f"{parsed.adapter}-{seed}", seed=seed, rank=rank)
        key = self.signers[signer or parsed.tenant]
        return self.registry.publish(directory, parsed, key, self.base, tag=tag)

    def keys_of(self, ref: str) -> list[str]:
        """Object names of one adapter."""
        parsed = AdapterRef.parse(ref)
        prefix = f"registry/t/{parsed.tenant}/a/{parsed.adapter}/"
        found = self.objects.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return sorted(item["Key"] for item in found.get("Contents", []))

    def read(self, key: str) -> bytes:
        """An object's bytes."""
        body: bytes = self.objects.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return body

    def write(self, key: str, body: bytes) -> None:
        """Replace an object behind the registry's back."""
        self.objects.put_object(Bucket=BUCKET, Key=key, Body=body)

    def remove(self, key: str) -> None:
        """Delete an object behind the registry's back."""
        self.objects.delete_object(Bucket=BUCKET, Key=key)


def write_settings(stage: Stage, path: Path, **changes: str) -> Path:
    """Write a server's settings file; `changes` replace values by "section.key"."""
    values = {
        "server.listen": '"127.0.0.1:0"',
        "server.metrics_listen": '"127.0.0.1:0"',
        "server.http_listen": '"127.0.0.1:0"',
        "model.path": f'"{stage.base_dir}"',
        "model.name": '"tiny"',
        "model.context_tokens": "128",
        "model.eager": "true",
        "adapters.slots": str(SLOTS),
        "adapters.rank_max": str(RANK_MAX),
        "adapters.cache_dir": '"cache"',
        "adapters.cache_bytes_max": "0",
        "registry.url": f'"{stage.url}"',
        "registry.endpoint_url": f'"http://127.0.0.1:{stage.toxics.port}"',
        "registry.policy": '"policy.toml"',
        "registry.encryption_key": '"file:keys/{tenant}.kek"',
        "registry.tag_ttl_s": "0",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    lines = []
    for section in sorted({key.split(".")[0] for key in values}):
        lines.append(f"[{section}]")
        lines += [f"{k.split('.')[1]} = {v}" for k, v in values.items() if k.startswith(section + ".")]
    path.write_text("\n".join(lines) + "\n")
    return path


class Served(NamedTuple):
    """A running server: its ports and its process."""

    grpc_port: int
    http_port: int
    metrics_port: int
    process: subprocess.Popen[str]


@contextlib.contextmanager
def serving(settings: Path) -> Iterator[Served]:
    """Run `loraplex serve` until the block ends."""
    log = settings.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "loraplex_server", "--config", str(settings)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=settings.parent,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ready: "):
                    grpc_port = int(line.split("gRPC on ")[1].split(",")[0].rpartition(":")[2])
                    http_port = int(line.split("HTTP on port ")[1].split(",")[0])
                    metrics_port = int(line.split("http://")[1].split("/")[0].rpartition(":")[2])
                    break
            else:
                raise AssertionError(f"the server ended before it was ready:\n{log.read_text()[-4000:]}")
            yield Served(grpc_port, http_port, metrics_port, process)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, trained for one step."""
    return ensure_tiny_base(tmp_path_factory.mktemp("base"), recipe=Recipe(steps=1, batch_rows=2))


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> Iterator[Stage]:
    """The S3 server, the proxy, keys and policy; no engine yet."""
    with s3_server.running() as s3, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        s3.make_bucket(BUCKET)
        with Toxics(int(s3.endpoint_url.rpartition(":")[2])) as toxics:
            stage = Stage(tmp_path_factory.mktemp("stage"), base_dir, s3, toxics)
            stage.registry.initialise()
            yield stage


@pytest.fixture(scope="session")
def server(stage: Stage) -> Iterator[Stage]:
    """The shared server. It is started while the S3 server cannot be reached, and must not mind."""
    stage.toxics.down()
    with serving(write_settings(stage, stage.root / "server.toml")) as served:
        stage.port, stage.http_port, stage.metrics_port = served[:3]
        stage.pid = served.process.pid
        with stage.client() as client:
            stage.down_at_start = _first_error(client)
        stage.toxics.heal()
        stage.publish("acme/good", seed=1)
        yield stage


def _first_error(client: Client) -> str:
    from loraplex_client import LoraplexError

    try:
        client.generate(PROMPT, adapter="acme/good", sampling=SIXTEEN)
    except LoraplexError as error:
        return error.code
    return "none"


@pytest.fixture
def client(server: Stage) -> Iterator[Client]:
    """A client; after each test the good adapter must still serve and nothing half-loaded may be left."""
    with server.client() as client:
        yield client
        assert_healthy(server, client)


def generate(client: Client, adapter: str = "") -> Completion:
    """Sixteen greedy tokens."""
    return client.generate(PROMPT, adapter=adapter, sampling=SIXTEEN)


def assert_healthy(server: Stage, client: Client) -> None:
    """The engine serves, and books, slots and disk agree."""
    assert generate(client, "acme/good").usage.completion_tokens == 16
    deadline = time.monotonic() + 10
    while True:
        adapters = list(client.list_adapters())
        names = {path.name for path in server.cache.glob("sha256-*")}
        kept = {adapter.digest for adapter in adapters} - server.encrypted
        expected = {digest.replace(":", "-") for digest in kept}
        if all(adapter.state in ("resident", "staged") for adapter in adapters) and names == expected:
            return
        assert time.monotonic() < deadline, f"left behind: {adapters}, {names}"
        time.sleep(0.1)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
