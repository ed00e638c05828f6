"""Several vLLM engines alive at once, one of them running at a time.

Each engine lives in a child process with an environment of its own (stock or grouped LoRA wrapper, LoRA on or
off), so that rounds can go from one to the next within one run: a slow minute of the machine then falls on
all of them. An engine that is not being measured is stopped with SIGSTOP, its whole process group: an idle
vLLM still polls, and on few cores that would be measured too.

The child (`python -m benchmarks.engines SPEC`) reads one JSON request per line from stdin and answers on
what was its stdout; its log goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraplex_server.vllm_plugin import CPU_LORA_ENV, WORKER_EXTENSION
from loraplex_server.vllm_plugin.worker import process_memory_bytes

KV_CACHE_GIB = 1
MAX_SEQS = 16
MAX_MODEL_LEN = 1024
STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine. With no adapters LoRA is off."""

    base: str
    adapters: tuple[str, ...] = ()  # directories; as many slots, all loaded at start
    wrapper: str = "grouped"  # or "stock"
    rank: int = 16
    quantization: str | None = None
    target_modules: tuple[str, ...] = ()  # wrap only these; empty: every module vLLM can wrap
    worker_process: bool = False  # vLLM's default layout on CPU, see `Engine`


class Child:
    """A child process that answers requests; `ask` wakes it, asks, and stops it again."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it and wait for its first line, which is `started`."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
            start_new_session=True,  # a process group of its own, to be stopped as a whole
        )
        self.started = self._receive()
        self._signal(signal.SIGSTOP)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Let the process run for one request and return its answer.

        Raises:
            RuntimeError: the process ended.

        """
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._receive()
        finally:
            self._signal(signal.SIGSTOP)

    def memory_bytes(self) -> dict[str, int]:
        """Return the memory of all processes of its group together, in bytes."""
        group = os.getpgid(self._process.pid)
        processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        totals: dict[str, int] = {"rss": 0, "peak_rss": 0, "pss": 0}
        for pid in processes:
            try:
                if os.getpgid(pid) != group:
                    continue
                for name, size in process_memory_bytes(pid).items():
                    totals[name] += size
            except (OSError, KeyError):  # ended meanwhile
                continue
        return totals

    def close(self) -> None:
        """End its processes; harmless when they have ended."""
        self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self._process.wait()}: see its log")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


class Engine(Child):
    """A child process with one engine."""

    def __init__(self, spec: EngineSpec, *, threads: int) -> None:
        environment = {
            CPU_LORA_ENV: spec.wrapper,
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM's own binding leaves a core out
            "OMP_NUM_THREADS": str(threads),
            # Without this vLLM puts the model into a process of its own on CPU, and the engine core polls for
            # its answers: with as many cores as threads that polling takes a third of the throughput.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if spec.worker_process else "0",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
        }
        super().__init__([sys.executable, "-m", "benchmarks.engines", json.dumps(asdict(spec))], environment)


def _engine_options(spec: EngineSpec) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": spec.base,
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_SEQS,
        "max_num_batched_tokens": MAX_MODEL_LEN,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if spec.adapters:
        options |= {"enable_lora": True, "max_loras": len(spec.adapters), "max_lora_rank": spec.rank}
    if spec.target_modules:
        options["lora_target_modules"] = list(spec.target_modules)
    if spec.quantization:
        options["quantization"] = spec.quantization
    return options


async def _serve(spec: EngineSpec, out: Any) -> None:
    """Answer requests ``{"rows": [adapter number or null], "prompt_tokens": n, "new_tokens": n}``.

    The engine is driven as the server drives it. Reading the next request blocks the loop; nothing runs then.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_vllm_config(AsyncEngineArgs(**_engine_options(spec)).create_engine_config())
    try:
        adapters = [LoRARequest(f"a{i}", i + 1, path) for i, path in enumerate(spec.adapters)]
        for adapter in adapters:
            await llm.add_lora(adapter)
        wrapper = (await llm.collective_rpc("loraplex_lora_wrapper"))[0]
        print(json.dumps({"wrapper": wrapper}), file=out, flush=True)
        for number, line in enumerate(sys.stdin):
            request = json.loads(line)
            chosen = [None if row is None else adapters[row] for row in request.pop("rows")]
            start = time.perf_counter()
            await asyncio.gather(
                *(_generate(llm, f"{number}-{i}", adapter, **request) for i, adapter in enumerate(chosen))
            )
            print(json.dumps({"seconds": time.perf_counter() - start}), file=out, flush=True)
    finally:
        llm.shutdown()
        del llm  # now, not at interpreter exit, where its destructor fails


async def _generate(llm: Any, name: str, adapter: Any, *, prompt_tokens: int, new_tokens: int) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    prompt = {"prompt_token_ids": [2 + i % 500 for i in range(prompt_tokens)]}
    sampling = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    async for _ in llm.generate(prompt, sampling, name, lora_request=adapter):
        pass


def _main() -> None:
    fields = json.loads(sys.argv[1])
    lists = {name: tuple(fields[name]) for name in ("adapters", "target_modules")}
    spec = EngineSpec(**(fields | lists))
    # The answers keep the real stdout; whatever vLLM prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(_serve(spec, answers))


if __name__ == "__main__":
    _main()
