"""Several vLLM engines alive at once, one of them running at a time.

Each engine lives in a child process with an environment of its own (our LoRA path or vLLM's, LoRA on or off,
compiled or not), so that rounds can go from one to the next within one run: a slow minute of the machine then
falls on all of them. An engine that is not being measured is stopped with SIGSTOP, its whole process group: an
idle vLLM still polls, and on few cores that would be measured too.

The child (`python -m benchmarks.engines SPEC`) reads one JSON request per line from stdin and answers on
what was its stdout; its log goes to stderr.

With a GPU at hand vLLM takes it, with its stock kernels: the wrappers are a matter of the CPU, and `started` of an
engine names the one that the model's layers really hold. (Written for one GPU; not run on one so far.)
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

import torch

from benchmarks.guard import Guard
from loraplex_server.engine.vllm_settings import SPIN_COUNT
from loraplex_server.vllm_plugin import CPU_BF16_ENV, CPU_LORA_ENV, CPU_NF4_ENV, WORKER_EXTENSION
from loraplex_server.vllm_plugin.worker import process_memory_bytes

KV_CACHE_GIB = 1
MAX_SEQS = 16
MAX_MODEL_LEN = 1024
GPU_MEMORY_SHARE = 0.15  # of one engine: five are alive at once, and vLLM wants as much free as it is allowed
STOP_TIMEOUT_S = 30
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "VLLM_CPU_OMP_THREADS_BIND",
                    "VLLM_ENABLE_V1_MULTIPROCESSING")  # fmt: skip


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine. With neither adapters nor slots LoRA is off."""

    base: str
    adapters: tuple[str, ...] = ()  # directories, all loaded at start
    wrapper: str = "native"  # LORAPLEX_CPU_LORA: "native", "grouped" or "stock"
    rank: int = 16
    quantization: str | None = None
    linear: str = "native"  # LORAPLEX_CPU_NF4; LORAPLEX_CPU_BF16 is stock where this is, else native
    slots: int = 0  # adapters in one batch; 0: as many as there are adapters
    cpu_adapters: int = 0  # adapters that vLLM keeps loaded; 0: as many as slots
    target_modules: tuple[str, ...] = ()  # wrap only these; empty: every module vLLM can wrap
    shipped: bool = False  # threads, processes and kernels as vLLM comes, nothing chosen
    compile: bool = False  # torch.compile, which vLLM itself switches off on CPU as soon as LoRA is on
    trace_directory: str = ""  # where `profile` requests write; empty: no profiler


class Child:
    """A child process that answers requests; `ask` wakes it, asks, and stops it again."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str | None]) -> None:
        """Start it and wait for its first line, which is `started`; None takes a variable away."""
        variables: dict[str, str | None] = {**os.environ, **environment}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in variables.items() if value is not None},
            text=True,
            start_new_session=True,  # a process group of its own, to be stopped as a whole
        )
        self._guard = Guard(self._process.pid)
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
        self._guard.release()

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


def _cpu_environment(spec: EngineSpec, threads: int) -> dict[str, str | None]:
    if spec.shipped:
        return {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB)} | dict.fromkeys(THREAD_VARIABLES)
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM's own binding leaves a core out
        "OMP_NUM_THREADS": str(threads),
        # Without this vLLM puts the model into a process of its own on CPU, and the engine core polls for
        # its answers: with as many cores as threads that polling takes a third of the throughput.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": SPIN_COUNT,
    }


class Engine(Child):
    """A child process with one engine."""

    def __init__(self, spec: EngineSpec, *, threads: int) -> None:
        environment: dict[str, str | None] = {CPU_LORA_ENV: spec.wrapper, "HF_HUB_OFFLINE": "1"}
        environment |= {
            CPU_NF4_ENV: spec.linear,
            CPU_BF16_ENV: "stock" if spec.linear == "stock" else "native",
        }
        if spec.trace_directory:
            environment["VLLM_CUSTOM_SCOPES_FOR_PROFILING"] = "1"  # names the parts of a step
        if not torch.cuda.is_available():
            environment |= _cpu_environment(spec, threads)
        super().__init__([sys.executable, "-m", "benchmarks.engines", json.dumps(asdict(spec))], environment)


def _engine_options(spec: EngineSpec) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": spec.base,
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enforce_eager": not spec.compile,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_SEQS,
        "max_num_batched_tokens": MAX_MODEL_LEN,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if torch.cuda.is_available():
        options |= {"gpu_memory_utilization": GPU_MEMORY_SHARE, "kv_cache_memory_bytes": KV_CACHE_GIB * 2**30}
    if spec.trace_directory:
        options["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": spec.trace_directory,
            "torch_profiler_with_stack": False,
            "ignore_frontend": True,
        }
    slots = spec.slots or len(spec.adapters)
    if slots:
        options |= {
            "enable_lora": True,
            "max_loras": slots,
            "max_lora_rank": spec.rank,
            "max_cpu_loras": spec.cpu_adapters or slots,
        }
    if spec.target_modules:
        options["lora_target_modules"] = list(spec.target_modules)
    if spec.quantization:
        options["quantization"] = spec.quantization
    return options


async def _serve(spec: EngineSpec, out: Any) -> None:
    """Answer requests, one at a time; reading the next one blocks the loop, and nothing runs then.

    ``{"rows": [adapter number or null], "prompt_tokens": n, "new_tokens": n}`` generates, driven as the server
    drives the engine. ``{"load": [directories]}`` loads more adapters, numbered on from those there are.
    ``{"profile": true}`` starts the engine's profiler, false ends it. All are answered with the ``seconds`` they took
    and the ``tokens`` of each row.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_vllm_config(AsyncEngineArgs(**_engine_options(spec)).create_engine_config())
    try:
        adapters = await _load(llm, spec.adapters, 0)
        wrapper = (await llm.collective_rpc("loraplex_lora_wrapper"))[0]
        print(json.dumps({"wrapper": wrapper}), file=out, flush=True)
        for number, line in enumerate(sys.stdin):
            request = json.loads(line)
            tokens: list[list[int]] = []
            start = time.perf_counter()
            if "load" in request:
                adapters += await _load(llm, request["load"], len(adapters))
            elif "profile" in request:
                await (llm.start_profile() if request["profile"] else llm.stop_profile())
            else:
                chosen = [None if row is None else adapters[row] for row in request.pop("rows")]
                tokens = await asyncio.gather(
                    *(_generate(llm, f"{number}-{i}", adapter, **request) for i, adapter in enumerate(chosen))
                )
            answer = {"seconds": time.perf_counter() - start, "tokens": tokens}
            print(json.dumps(answer), file=out, flush=True)
    finally:
        llm.shutdown()
        del llm  # now, not at interpreter exit, where its destructor fails


async def _load(llm: Any, directories: Sequence[str], present: int) -> list[Any]:
    """Load adapters beside those `present`, and return what a request names them by."""
    from vllm.lora.request import LoRARequest

    adapters = [LoRARequest(f"a{n}", n, path) for n, path in enumerate(directories, present + 1)]
    for adapter in adapters:
        await llm.add_lora(adapter)
    return adapters


async def _generate(llm: Any, name: str, adapter: Any, *, prompt_tokens: int, new_tokens: int) -> list[int]:
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
    tokens: list[int] = []
    async for output in llm.generate(prompt, sampling, name, lora_request=adapter):
        tokens += output.outputs[0].token_ids
    return tokens


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
