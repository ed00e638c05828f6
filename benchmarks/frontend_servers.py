"""The servers that `benchmarks.frontend` measures: ours and vLLM's own, on the same base with the same engine settings.

Each is a process group of its own. A server that is not measured is stopped with SIGSTOP, as `benchmarks.engines` does
it: on two cores whatever an idle one does would be measured too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.guard import Guard
from benchmarks.models import Shape, ensure_base
from loraplex_examples.tiny_base import Recipe, ensure_tiny_base
from loraplex_registry.registry import Registry
from loraplex_registry.storage.store import open_store
from loraplex_registry.validation.base import BaseModel
from loraplex_server.engine.vllm_settings import SPIN_COUNT, inner_modules
from loraplex_server.identity.api_keys import make_key

START_S_MAX = 240.0
STOP_S_MAX = 60.0
TINY = Recipe(
    steps=1,
    batch_rows=2,
    vocab_size=640,
    hidden_size=256,
    layers=4,
    heads=8,
    ffn_size=688,
    context_tokens=512,
)
"""The base: a Llama of 4 layers x 256, bf16, trained for one step. What it says is noise; how fast is not."""

ENVIRONMENT: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM's own binding leaves a core out
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in the engine core's process, see README
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": SPIN_COUNT,
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

OWN_ENVIRONMENT: Mapping[str, str] = {
    key: ENVIRONMENT[key]
    for key in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE")
}
"""vLLM as it starts by itself: threads bound by its own rule, the model in a process beside the engine core."""


@dataclass(frozen=True)
class EngineSettings:
    """What both servers' engines are told."""

    context_tokens: int = 512
    batch_requests: int = 64
    slots: int = 4
    rank: int = 16
    lora: bool = False  # slots for adapters; no call of the comparison uses one


@dataclass
class Server:
    """A running server.

    Attributes:
        port: of gRPC for ours, of HTTP for vLLM's.
        bare_port: see `benchmarks.bare_port`; 0 where there is none.
        key: API key that it asks for; "" for none.
    """

    process: subprocess.Popen[str]
    port: int
    key: str = ""
    bare_port: int = 0

    def stop(self) -> None:
        """Freeze every process of it."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        os.killpg(self.process.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for the length of the block."""
        self.resume()
        try:
            yield
        finally:
            self.stop()

    def cpu_s(self) -> tuple[float, float]:
        """Processor seconds so far: of the front end's process, and of all others of the group."""
        front, others = 0.0, 0.0
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                with contextlib.suppress(OSError):  # ended meanwhile
                    pid, seconds = int(path.name), 0.0
                    if os.getpgid(pid) == self.process.pid:
                        fields = (path / "stat").read_text().rpartition(")")[2].split()
                        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                    if pid == self.process.pid:
                        front += seconds
                    else:
                        others += seconds
        return front, others


def ensure_tiny(directory: Path) -> Path:
    """The tiny base with its tokenizer, made on first use."""
    return ensure_tiny_base(directory, recipe=TINY)


def ensure_servable(shape: Shape, directory: Path) -> Path:
    """A base of random weights (see `benchmarks.models`) with the tiny base's tokenizer, so that a server takes it."""
    base = ensure_base(shape, directory)
    for path in ensure_tiny(directory).glob("*token*"):
        shutil.copyfile(path, base / path.name)
    return base


def write_settings(place: Path, base: Path, engine: EngineSettings, *, more: str = "") -> tuple[Path, str]:
    """Write our server's settings and a keys file; returns the path and the API key, of tenant acme."""
    key, entry = make_key("bench", "acme")
    (place / "keys.toml").write_text(entry)
    path = place / "server.toml"
    path.write_text(
        f"""
[server]
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
[model]
path = "{base}"
name = "tiny"
quantization = "none"
eager = true
context_tokens = {engine.context_tokens}
batch_requests = {engine.batch_requests}
[adapters]
slots = {engine.slots}
rank_max = {engine.rank}
cache_dir = "{place}/cache"
[limits]
tenant_requests_max = 256
[auth]
keys = "keys.toml"
{_registry(place) if engine.lora else ""}
{more}"""
    )
    return path, key


def _registry(place: Path) -> str:
    """Settings of a registry with nothing in it."""
    registry = Registry(open_store((place / "registry").as_uri()))
    registry.initialise()
    (place / "policy.toml").write_text('version = 1\ndefault = "deny"\n')
    return f'[registry]\nurl = "{registry.url}"\npolicy = "policy.toml"'


@contextlib.contextmanager
def our_server(
    place: Path,
    settings: Path,
    key: str,
    *,
    module: str = "loraplex_server",
    environment: Mapping[str, str] = ENVIRONMENT,
) -> Iterator[Server]:
    """Run `loraplex serve`, or another module with the same command line, until the block ends."""
    command = [sys.executable, "-m", module, "--config", str(settings)]
    with _process(command, place / "ours.log", environment) as process:
        assert process.stdout is not None
        bare_port = 0
        for line in process.stdout:
            if line.startswith("bare: "):
                bare_port = int(line.split()[1])
            if line.startswith("ready: "):
                port = int(line.split("gRPC on ")[1].split(",")[0].rpartition(":")[2])
                yield Server(process, port, key, bare_port)
                return
        raise RuntimeError(f"our server ended early: {(place / 'ours.log').read_text()[-2000:]}")


@contextlib.contextmanager
def vllm_server(
    place: Path, base: Path, engine: EngineSettings, *, environment: Mapping[str, str]
) -> Iterator[Server]:
    """Run vLLM's own OpenAI server with the settings that our server gives its engine, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_vllm_options(base, engine, port)]
    log = place / f"vllm-{port}.log"
    with _process(command, log, {**environment, "LORAPLEX_CPU_LORA": "grouped"}, talks=False) as process:
        until = time.monotonic() + START_S_MAX
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"vLLM's server did not come up: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield Server(process, port)


def _vllm_options(base: Path, engine: EngineSettings, port: int) -> list[str]:
    """The command line that says what `vllm_settings.engine_arguments` says for our settings."""
    slots = str(engine.slots)
    lora = (
        *(
            "--enable-lora",
            "--max-loras",
            slots,
            "--max-cpu-loras",
            slots,
            "--max-lora-rank",
            str(engine.rank),
        ),
        *("--lora-target-modules", *inner_modules(BaseModel.from_directory(base))),
    )
    return [
        *("--model", str(base), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--seed", "0", "--enforce-eager", "--enable-prefix-caching"),
        *("--max-model-len", str(engine.context_tokens), "--max-num-seqs", str(engine.batch_requests)),
        *(lora if engine.lora else ()),
        "--disable-uvicorn-access-log",
    ]


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def _process(
    command: Sequence[str], log: Path, environment: Mapping[str, str], *, talks: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a process group of its own and end the whole group; `talks`: its stdout is read, not logged."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE if talks else stderr,
            stderr=stderr,
            text=True,
            env={key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
            | dict(environment),
            start_new_session=True,
        )
    guard = Guard(process.pid)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            process.terminate()
            try:
                process.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        guard.release()
        if process.stdout is not None:
            process.stdout.close()
