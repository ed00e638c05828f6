"""llama.cpp's own server as a peer: a 4-bit base, adapters named per request.

`make llamacpp-setup` builds it from a package (see `scripts/setup_llamacpp.sh`); where it was not built the
benchmarks say so and measure the others.

A request's `"lora"` list names one adapter. The server decodes together only requests with the same list
(llama.cpp #10994), so requests of different adapters take turns; `benchmarks/README.md` says what was tried.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.guard import Guard

HOME = Path(__file__).parents[1] / ".llamacpp"  # where `make llamacpp-setup` puts it
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 30
ANSWER_TIMEOUT_S = 600
QUANTIZATION = "Q4_0"  # 4 bits in the form that llama.cpp packs for the processor's vectors: its fastest here
CONTEXT_TOKENS = 128  # per sequence; a smaller cache costs nobody anything


def is_built(home: Path) -> bool:
    """Return whether llama.cpp is there."""
    return (home / "llama-server").is_file()


def ensure_gguf(home: Path, base: Path, adapters: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Convert base and adapters beside themselves unless that was done; return the quantized base and the adapters."""
    whole, *converted = [path.with_name(f"{path.name}.gguf") for path in (base, *adapters)]
    quantized = base.with_name(f"{base.name}.{QUANTIZATION}.gguf")
    pairs = [*zip([base, *adapters], [whole, *converted], strict=True)]
    if not all(target.is_file() for _, target in pairs):
        arguments = [str(path) for pair in pairs for path in pair]
        python_path = os.pathsep.join([str(home / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])])
        _run([sys.executable, "-m", "benchmarks.gguf_files", *arguments], PYTHONPATH=python_path)
    if not quantized.is_file():
        partial = quantized.with_suffix(".partial")
        _run([str(home / "llama-quantize"), str(whole), str(partial), QUANTIZATION])
        partial.rename(quantized)
    return quantized, converted


def _run(command: list[str], **environment: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **environment})


class LlamaServer:
    """A running llama-server, stopped (SIGSTOP) while it is not asked."""

    def __init__(self, home: Path, base: Path, adapters: Sequence[Path], *, rows: int, threads: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        command = [
            *(
                str(home / "llama-server"),
                "--model",
                str(base),
                "--host",
                "127.0.0.1",
                "--port",
                str(self._port),
            ),
            *("--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"),  # requests say which one
            *("--parallel", str(rows), "--ctx-size", str(rows * CONTEXT_TOKENS), "--cont-batching"),
            *("--threads", str(threads), "--threads-batch", str(threads), "--threads-http", str(rows + 2)),
            *("--cache-ram", "0", "--ctx-checkpoints", "0", "--no-ui", "--no-slots", "--offline"),
            *("--log-verbosity", "1"),
        ]
        # Threads that spin between its many small products: twice as fast with one row at a time as threads that sleep.
        environment = {**os.environ, "OMP_WAIT_POLICY": "ACTIVE"}
        self._process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True, env=environment)
        self._guard = Guard(self._process.pid)
        self._await_health()
        self.started = {"package": (home / "VERSION").read_text().strip(), "quantization": QUANTIZATION}
        self._rows = ThreadPoolExecutor(rows)
        self._signal(signal.SIGSTOP)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer as the other peers do: all rows are asked at the same moment, each with its adapter."""
        self._signal(signal.SIGCONT)
        try:
            start = time.perf_counter()
            tokens = list(self._rows.map(lambda row: self._complete(row, request), request["rows"]))
            return {"seconds": time.perf_counter() - start, "tokens": tokens}
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it; harmless when it has ended."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._guard.release()

    def _complete(self, row: int | None, request: dict[str, Any]) -> list[int]:
        body = {
            "prompt": [2 + i % 500 for i in range(request["prompt_tokens"])],
            "n_predict": request["new_tokens"],
            # An empty list would ask for what the server was started with, which is all of them.
            "lora": [{"id": row or 0, "scale": float(row is not None)}],
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,  # nobody's prompts are cached here
            "return_tokens": True,
        }
        answer = self._call("POST", "/completion", body)
        assert len(answer["tokens"]) == request["new_tokens"], answer
        found: list[int] = answer["tokens"]
        return found

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RuntimeError(f"llama-server answers {response.status}: {answer}")
        return answer

    def _await_health(self) -> None:
        """Wait until the model is loaded.

        Raises:
            RuntimeError: it ended, or took longer than `START_TIMEOUT_S`.

        """
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                self._call("GET", "/health")
            except (OSError, RuntimeError):  # does not listen yet, or still loads
                time.sleep(0.2)
            else:
                return
        self.close()
        raise RuntimeError("llama-server did not start: see its log")

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return
