"""The server's engine object (`VllmEngine`) in a process of its own, asked for streams, loads and turns.

The child (`python -m benchmarks.served_engine SPEC`) reads one JSON request per line from stdin and answers on what was
its stdout, as `benchmarks.engines` does. With `wrapper="stock"` the same object runs vLLM's own LoRA, which the server
itself refuses, and adapters go through `add_lora`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from benchmarks.engines import KV_CACHE_GIB, Child
from loraplex_registry.registry import StagedAdapter
from loraplex_server.adapters.residency import Residency
from loraplex_server.adapters.versions import AdapterVersion
from loraplex_server.config import AdapterSettings, Config, ModelSettings, RegistrySettings, ServerSettings
from loraplex_server.engine.protocol import EngineAdapter, EngineRequest, Sampling
from loraplex_server.engine.vllm_engine import VllmEngine
from loraplex_server.metrics import Metrics
from loraplex_server.vllm_plugin import CPU_BF16_ENV, CPU_LORA_ENV
from loraplex_server.wiring import make_residency

PROMPT_TOKENS = 8
WARM_TOKENS = 8  # of each stream, not counted: prompts are read then, and streams come together


@dataclass(frozen=True)
class ServedSpec:
    """How to start an engine.

    Attributes:
        adapters: directories below `root`.
        slots: `adapters.slots`; 0 for what the server chooses.
        rows: sequences decoded together.
    """

    base: str
    root: str
    adapters: tuple[str, ...]
    wrapper: str
    rows: int
    rank: int
    slots: int = 0
    eager: bool = False

    def config(self) -> Config:
        """As a server's settings."""
        return Config(
            server=ServerSettings(stream_interval_ms=0),  # every token as it comes
            model=ModelSettings(
                path=self.base,
                name="bench",
                quantization="none",
                batch_requests=self.rows,
                context_tokens=1024,
                eager=self.eager,
            ),
            adapters=AdapterSettings(
                slots=self.slots, rank_max=self.rank, cache_dir=self.root, memory_bytes_max=8 << 30
            ),
            registry=RegistrySettings(url="file:///nowhere"),  # adapters are served; nothing is resolved here
        )


class ServedEngine(Child):
    """A child process with the server's engine object."""

    def __init__(self, spec: ServedSpec, *, threads: int) -> None:
        environment = {
            CPU_LORA_ENV: spec.wrapper,
            CPU_BF16_ENV: "stock" if spec.wrapper == "stock" else "native",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        }
        super().__init__(
            [sys.executable, "-m", "benchmarks.served_engine", json.dumps(asdict(spec))], environment
        )


class StockEngine(VllmEngine):
    """The same with vLLM's own wrapper, for comparison."""

    async def _refuse_wrong_lora(self) -> None:
        pass


class Served:
    """What the child can do."""

    def __init__(self, engine: VllmEngine, spec: ServedSpec) -> None:
        self._engine = engine
        self._spec = spec
        self._ids = itertools.count(1)
        self._names = itertools.count()
        self._kept: list[EngineAdapter] = []
        self._residency: Residency | None = None

    async def keep(self, *, count: int) -> dict[str, Any]:
        """Load the first adapters for good."""
        self._kept = [await self._load(number) for number in range(count)]
        return {}

    async def streams(self, *, tokens: int, every_s: float, cold: bool) -> dict[str, Any]:
        """Decode on every row but one, over the kept adapters; every so often one short call more on the last row.

        Args:
            tokens: of each stream.
            every_s: from one short call to the next, in seconds.
            cold: short calls bring their adapter in, and it goes afterwards; otherwise they use one that is there.
        """
        rows, stamps = self._spec.rows - 1, list[list[float]]()
        running = [
            asyncio.create_task(self._stream(self._kept[row % len(self._kept)], tokens, stamps))
            for row in range(rows)
        ]
        calls = asyncio.create_task(self._calls(every_s, cold=cold))
        started = time.perf_counter()
        await asyncio.gather(*running)
        seconds = time.perf_counter() - started
        calls.cancel()
        firsts = await calls
        gaps = [b - a for times in stamps for a, b in itertools.pairwise(times[WARM_TOKENS:])]
        return {"gaps_s": gaps, "ttft_s": firsts, "seconds": seconds}

    async def _calls(self, every_s: float, *, cold: bool) -> list[float]:
        firsts: list[float] = []
        pending: set[asyncio.Task[None]] = set()

        async def call(number: int) -> None:
            firsts.append(await (self._cold(number) if cold else self._warm(number)))

        try:
            for number in itertools.count():
                await asyncio.sleep(every_s)
                task = asyncio.create_task(call(number))
                pending.add(task)
                task.add_done_callback(pending.discard)
        except asyncio.CancelledError:
            await asyncio.gather(*pending)
        return firsts

    async def ttft(self, *, count: int) -> dict[str, Any]:
        """Time to first token on an engine that does nothing else, cold and warm in turn."""
        cold, warm = [], []
        for number in range(count):
            warm.append(await self._warm(number))
            cold.append(await self._cold(number))
        return {"cold_s": cold, "warm_s": warm}

    async def _warm(self, number: int) -> float:
        return await self._first_token(self._kept[number % len(self._kept)], time.perf_counter())

    async def _cold(self, number: int) -> float:
        others = len(self._spec.adapters) - len(self._kept)
        started = time.perf_counter()
        adapter = await self._load(len(self._kept) + number % others)
        first_s = await self._first_token(adapter, started)
        await self._engine.unload(adapter.slot_id)
        return first_s

    async def _load(self, number: int) -> EngineAdapter:
        slot_id = next(self._ids)
        adapter = EngineAdapter(
            name=f"bench/a{number}@{slot_id}", slot_id=slot_id, path=Path(self._spec.adapters[number])
        )
        await self._engine.load(adapter)
        return adapter

    async def _first_token(self, adapter: EngineAdapter, started: float) -> float:
        first = 0.0
        async for _ in self._engine.generate(self._request(adapter, 1)):
            first = first or time.perf_counter() - started
        return first

    async def _stream(self, adapter: EngineAdapter, tokens: int, stamps: list[list[float]]) -> None:
        times: list[float] = []
        stamps.append(times)
        async for chunk in self._engine.generate(self._request(adapter, tokens)):
            times += [time.perf_counter()] * len(chunk.token_ids)

    def _request(self, adapter: EngineAdapter, tokens: int) -> EngineRequest:
        name = f"r{next(self._names)}"  # a salt of its own: no prompt is found in the prefix cache
        return EngineRequest(
            request_id=name,
            prompt_ids=tuple(2 + i % 500 for i in range(PROMPT_TOKENS)),
            sampling=Sampling(max_tokens=tokens, temperature=0, ignore_eos=True),
            adapter=adapter,
            cache_salt=name,
        )

    async def turns(self, *, adapters: int, calls: int, tokens: int, through_server: bool) -> dict[str, Any]:
        """Call over so many adapters in turn, as many calls at once as there are rows.

        Args:
            adapters: there are; the same files again and again where there are fewer.
            calls: in all, each of `tokens`.
            tokens: new ones of each call.
            through_server: the server's residency brings adapters in; otherwise calls name them, and vLLM does.
        """
        lease = self._leases() if through_server else self._named()
        numbers = iter(range(calls))

        async def work() -> None:
            for number in numbers:
                async with lease(number % adapters) as adapter:
                    async for _ in self._engine.generate(self._request(adapter, tokens)):
                        pass

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(self._spec.rows)))
        return {"tok_s": calls * tokens / (time.perf_counter() - started)}

    def _named(self) -> Any:
        @contextlib.asynccontextmanager
        async def lease(number: int) -> AsyncIterator[EngineAdapter]:
            path = Path(self._spec.adapters[number % len(self._spec.adapters)])
            name = f"bench/n{number}"
            yield EngineAdapter(name=name, slot_id=1_000_000 + number, path=path)

        return lease

    def _leases(self) -> Any:
        residency = self._residency or make_residency(
            self._spec.config(),
            engine=self._engine,
            source=_Directories(self._spec),
            events=Metrics(tenants_max=1),
        )
        self._residency = residency

        @contextlib.asynccontextmanager
        async def lease(number: int) -> AsyncIterator[EngineAdapter]:
            async with residency.lease(_version(number)) as held:
                yield held.adapter

        return lease


class _Directories:
    """Adapters as they lie on disk, unchecked, as where residency gets their bytes."""

    def __init__(self, spec: ServedSpec) -> None:
        self._paths = spec.adapters

    async def stage(self, version: AdapterVersion, progress: Any) -> StagedAdapter:  # noqa: ARG002
        path = Path(self._paths[int(version.adapter) % len(self._paths)])
        size = (path / "adapter_model.safetensors").stat().st_size
        return StagedAdapter(
            digest=version.digest, path=path, manifest=cast("Any", None), size_bytes=size, rank=1
        )

    async def confirm(self, staged: StagedAdapter) -> None:
        pass

    async def settle(self, staged: StagedAdapter) -> None:
        pass

    async def discard(self, staged: StagedAdapter) -> None:
        pass

    def pieces(self, staged: StagedAdapter) -> int:  # noqa: ARG002
        return 0

    async def recheck(self, staged: StagedAdapter, piece: int) -> float:  # noqa: ARG002
        return 0.0


def _version(number: int) -> AdapterVersion:
    manifest = SimpleNamespace(file=lambda _: SimpleNamespace(size=0), lora=SimpleNamespace(rank=1))
    digest = f"sha256:{number:064x}"
    verified = cast("Any", SimpleNamespace(manifest=manifest))
    return AdapterVersion(f"bench/{number}@{digest}", "bench", str(number), "1", digest, verified)


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile of at least two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


async def _serve(spec: ServedSpec, out: Any) -> None:
    kind = StockEngine if spec.wrapper == "stock" else VllmEngine
    engine = kind(spec.config(), cache_dir=Path(spec.root))
    await engine.start()
    try:
        served = Served(engine, spec)
        ready = {"keeps_bytes": engine.keeps_bytes}
        print(json.dumps(ready), file=out, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            found = await getattr(served, request.pop("do"))(**request)
            print(json.dumps(found), file=out, flush=True)
    finally:
        await engine.close()


def _main() -> None:
    fields = json.loads(sys.argv[1])
    spec = ServedSpec(**(fields | {"adapters": tuple(fields["adapters"])}))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import uvloop

    uvloop.run(_serve(spec, answers))


if __name__ == "__main__":
    _main()
