"""Residency over the deterministic engine and bytes that are an empty directory: for tests."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from loraplex_registry.errors import DigestMismatchError
from loraplex_registry.registry import StagedAdapter
from loraplex_registry.validation.base import BaseModel
from loraplex_server.adapters.residency import Residency
from loraplex_server.adapters.versions import AdapterVersion, Progress
from loraplex_server.errors import EngineUnavailableError
from tests.sim.engine import SimEngine

BASE = BaseModel("sim", "sha256:" + "0" * 64, {"layer": (4, 4)}, 1000, 4, 64)


SIZE = 10  # bytes of every adapter


def version(name: str) -> AdapterVersion:
    digest = f"sha256:{name:0>64}"
    weights = SimpleNamespace(size=SIZE)
    manifest = SimpleNamespace(file=lambda _: weights, lora=SimpleNamespace(rank=4))
    verified = cast("Any", SimpleNamespace(manifest=manifest))
    return AdapterVersion(f"acme/{name}@{digest}", "acme", name, "1", digest, verified)


@dataclass
class SimSource:
    """Lays down an empty directory per adapter, counts, and fails on order."""

    root: Path
    errors: dict[str, Exception] = field(default_factory=dict)
    staged: Counter[str] = field(default_factory=Counter)
    swapped: set[str] = field(default_factory=set)
    delay_s: float = 0.0
    recheck_s: float = 0.0
    rechecked: list[tuple[str, int]] = field(default_factory=list)

    async def stage(self, wanted: AdapterVersion, progress: Progress) -> StagedAdapter:
        self.staged[wanted.adapter] += 1
        progress("fetch", 5, 10)
        await asyncio.sleep(self.delay_s)
        if wanted.adapter in self.errors:
            raise self.errors[wanted.adapter]
        path = self.root / wanted.adapter
        path.mkdir()
        return StagedAdapter(
            digest=wanted.digest, path=path, manifest=cast("Any", None), size_bytes=SIZE, rank=4
        )

    async def confirm(self, staged: StagedAdapter) -> None:
        if staged.path.name in self.swapped:
            raise DigestMismatchError("swapped")

    async def settle(self, staged: StagedAdapter) -> None:
        staged.path.rmdir()

    async def discard(self, staged: StagedAdapter) -> None:
        with contextlib.suppress(FileNotFoundError):  # settled before
            staged.path.rmdir()

    def pieces(self, staged: StagedAdapter) -> int:
        return int(staged.path.is_dir())

    async def recheck(self, staged: StagedAdapter, piece: int) -> float:
        self.rechecked.append((staged.path.name, piece))
        return self.recheck_s


@dataclass
class Events:
    """Keeps what residency tells."""

    requested: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    gone: Counter[str] = field(default_factory=Counter)
    ahead: Counter[str] = field(default_factory=Counter)

    def adapter_requested(self, result: str) -> None:
        self.requested[result] += 1

    def adapter_phase(self, phase: str, seconds: float) -> None:
        assert seconds >= 0

    def adapter_load_ended(self, reason: str) -> None:
        self.ended[reason] += 1

    def adapter_gone(self, tier: str, cause: str) -> None:
        self.gone[f"{tier} {cause}"] += 1

    def adapter_ahead(self, result: str) -> None:
        self.ahead[result] += 1


@dataclass
class Rig:
    engine: SimEngine
    source: SimSource
    events: Events
    residency: Residency

    def directories(self) -> set[str]:
        """Adapters whose bytes are held."""
        return {item.name for item in self.source.root.iterdir()}

    def states(self) -> dict[str, str]:
        """Every adapter's state."""
        return {status.version.adapter: str(status.state) for status in self.residency.statuses()}

    async def restart(self) -> None:
        """The engine dies, and a fresh one takes its place."""
        self.engine.dead = True
        await self.residency.engine_lost(EngineUnavailableError("the engine stopped"))
        keeps_bytes = self.engine.keeps_bytes
        self.engine = SimEngine(BASE, slots=self.residency.slots_total, keeps_bytes=keeps_bytes)
        await self.residency.restore(self.engine)


def make_rig(
    root: Path,
    *,
    slots: int = 2,
    load_timeout_s: float = 5.0,
    staged_max: int = 0,
    ahead_max: int = 2,
    keeps_bytes: bool = False,
) -> Rig:
    """Build one; memory has room for `staged_max` adapters."""
    engine = SimEngine(BASE, slots=slots, keeps_bytes=keeps_bytes)
    source, events = SimSource(root), Events()
    clock: Callable[[], float] = asyncio.get_running_loop().time
    residency = Residency(
        engine=engine,
        source=source,
        events=events,
        slots=slots,
        load_timeout_s=load_timeout_s,
        clock=clock,
        memory_bytes_max=staged_max * SIZE,
        ahead_max=ahead_max,
    )
    return Rig(engine, source, events, residency)


async def use(rig: Rig, name: str) -> None:
    async with rig.residency.lease(version(name)):
        pass
