"""What `registry_io` measures in: adapters of chosen sizes, a registry that holds them, a server, and the rivals.

The registry is filled through a directory store, whose layout is the one of a bucket, before the server starts: that is
quick, and 100,000 adapters need not be uploaded one by one. Bodies that are the same lie there once, as hard links.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer, generate_key, load_signer
from loraplex_registry.storage.local import LocalStore
from loraplex_registry.storage.store import BlobProgress, UploadLog
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.base import BaseModel

REPOSITORY = Path(__file__).parents[1]
BENCH_BIN = REPOSITORY / ".venv-bench/bin"
BUCKET = "bucket"
HIDDEN = 4096
RANK = 64
MODULE_BYTES = RANK * (HIDDEN + HIDDEN) * 2  # one square layer's A and B in 16 bits: 1 MiB
LAYERS = 256


def base_model() -> BaseModel:
    """A base of 256 square layers."""
    layers = {f"model.layers.{n}.self_attn.q_proj": (HIDDEN, HIDDEN) for n in range(LAYERS)}
    digest = "sha256:" + hashlib.sha256(b"benchmark").hexdigest()
    return BaseModel("bench", digest, layers, 32_000, HIDDEN, 4096)


def make_adapter(directory: Path, mib: int, base: BaseModel) -> Path:
    """Write an adapter of `mib` MiB with random finite F16 weights and its base card."""
    directory.mkdir(parents=True)
    header: dict[str, Any] = {}
    position = 0
    for layer in range(mib):
        for part, shape in (("lora_A", [RANK, HIDDEN]), ("lora_B", [HIDDEN, RANK])):
            end = position + MODULE_BYTES // 2
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight"
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, end]}
            position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(mib)
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(mib):
            # Exponent bits such that every number is between 2^-11 and 2^-3.
            bits = rng.integers(0, 1 << 16, MODULE_BYTES // 2, dtype=np.uint16)
            file.write(((bits & 0x9FFF) | 0x1000).tobytes())
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "bench",
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "base_model.json").write_bytes(base.to_json())
    return directory


class LinkingStore(LocalStore):
    """A directory store whose blobs are all hard links to the first one, so that a thousand adapters fit in memory."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.prepare()
        self._place = root
        self._first: Path | None = None

    def put_blob(
        self,
        key: str,
        path: Path,
        file: FileEntry,
        *,
        progress: BlobProgress | None = None,
        upload: UploadLog | None = None,
    ) -> int:
        """Store the first blob, link the others."""
        if self._first is None:
            requests = super().put_blob(key, path, file, progress=progress, upload=upload)
            self._first = self._place / key
            return requests
        target = self._place / key
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(self._first, target)
        return 1


@dataclass
class World:
    """Where everything is.

    Attributes:
        disk: a directory on disk, for what is downloaded.
        objects: the served directory, in memory.
        base, signer, policy: of tenant acme.
        environment: of child processes: address, credentials, settings.
    """

    disk: Path
    objects: Path
    base: BaseModel
    signer: Signer
    policy: TrustPolicy
    environment: dict[str, str]
    endpoint: str = ""

    @property
    def bucket(self) -> Path:
        """The served bucket's directory."""
        return self.objects / BUCKET

    def adapter(self, mib: int) -> Path:
        """Return the directory of an adapter of this size, made on first use."""
        path = self.objects.parent / f"adapter{mib}"
        return path if path.exists() else make_adapter(path, mib, self.base)

    def seed(self, root: str, name: str, mib: int, **options: Any) -> None:
        """Publish an adapter of this size as `acme/<name>@prod` below a root in the bucket."""
        store = LocalStore(self.bucket / root)
        store.prepare()
        registry = Registry(store)
        ref = AdapterRef("acme", name)
        registry.publish(self.adapter(mib), ref, self.signer, self.base, tag="prod", **options)

    def plain(self, mib: int) -> list[str]:
        """Lay an adapter's two files into the bucket for the rivals, and return their keys."""
        names = ("adapter_config.json", "adapter_model.safetensors")
        target = self.bucket / f"plain{mib}"
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not (target / name).exists():
                shutil.copyfile(self.adapter(mib) / name, target / name)
        return [f"plain{mib}/{name}" for name in names]


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Make an empty world; everything is removed at the end. Nothing is served yet."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with (
        tempfile.TemporaryDirectory(prefix="loraplex-bench-") as disk,
        tempfile.TemporaryDirectory(prefix="loraplex-bench-", dir=memory) as objects,
    ):
        place = Path(disk)
        generate_key(place / "acme.key")
        (place / "policy.toml").write_text(
            'version = 1\ndefault = "deny"\n[[rules]]\nscope = "acme/**"\nkeys = [{ path = "acme.pub" }]\n'
        )
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": disk,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        (Path(objects) / "s3" / BUCKET).mkdir(parents=True)
        yield World(
            place,
            Path(objects) / "s3",
            base_model(),
            load_signer(place / "acme.key"),
            TrustPolicy.load(place / "policy.toml"),
            environment,
        )


@contextlib.contextmanager
def served(place: World) -> Iterator[None]:
    """Serve the world's objects, with its address in the environment of this process and of children."""
    command = [sys.executable, "-m", "benchmarks.s3_files", str(place.objects)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        word, port = process.stdout.readline().split()
        assert word == "ready"
        place.endpoint = f"http://127.0.0.1:{port}"
        place.environment["AWS_ENDPOINT_URL"] = place.endpoint
        config = place.disk / ".config/loraplex"
        config.mkdir(parents=True, exist_ok=True)
        (config / "config.toml").write_text(
            f'registry = "s3://{BUCKET}/pushed"\ntenant = "acme"\nkey = "{place.disk}/acme.key"\n'
            f'policy = "{place.disk}/policy.toml"\nendpoint_url = "{place.endpoint}"\n'
        )
        os.environ.update(
            {key: place.environment[key] for key in place.environment if key.startswith("AWS_")}
        )
        yield
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


class RivalProcess:
    """The warm process of `benchmarks.rivals`."""

    def __init__(self, place: World) -> None:
        command = [
            str(BENCH_BIN / "python"),
            str(REPOSITORY / "benchmarks/rivals.py"),
            place.endpoint,
            BUCKET,
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=place.environment
        )

    def ask(self, **order: Any) -> float:
        """Have an order carried out and return the seconds it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def command_seconds(command: Sequence[str | Path], place: World) -> float:
    """Run a command and return its wall time in seconds.

    Raises:
        RuntimeError: it failed.
    """
    import time

    started = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)), env=place.environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-500:]}")
    return seconds
