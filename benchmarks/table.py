"""One table of the results that are kept: every figure beside its bar, whether it is met, and the run before.

Pure functions from `results/<benchmark>.json` files (see `report.save`) to rows, and from rows to Markdown. Needs the
standard library alone: the plots are made from the same rows in an environment without torch or vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Figures that are to be at least their target. All others are costs: times, sizes and their ratios, to be at most that.
AT_LEAST = frozenset(
    {
        "idle_ratio",
        "mixed8_qv_r8_ratio",
        "one_r16_all_ratio",
        "mixed16_r16_all_ratio",
        "mixed16_vs_stock",
        "prefill_ratio",
        "ws4_ratio",
        "vs_peft_mixed",
        "vs_llamacpp_16",
        "tok_s_vs_vllm_http",
        "small1000_vs_raw",
    }
)
NF4 = "nf4_"


@dataclass(frozen=True)
class Row:
    """One figure of one benchmark; `before` and `before_target` are of the run before, None where there is none."""

    benchmark: str
    name: str
    value: float
    spread: float | None
    n: int
    unit: str
    target: float | None
    before: float | None
    before_target: float | None

    @property
    def at_least(self) -> bool:
        """Tell whether more is better."""
        return self.name.removeprefix(NF4) in AT_LEAST

    @property
    def met(self) -> bool | None:
        """Tell whether the value is as good as its target, None where there is none."""
        return self._reaches(self.value, self.target)

    @property
    def met_before(self) -> bool | None:
        """Tell the same of the run before."""
        return self._reaches(self.before, self.before_target)

    def _reaches(self, value: float | None, target: float | None) -> bool | None:
        if value is None or target is None:
            return None
        return value >= target if self.at_least else value <= target


def load_results(directory: Path) -> list[dict[str, Any]]:
    """Read every benchmark's kept result, in the order of their names; reliability campaigns are no benchmarks."""
    found = (json.loads(path.read_text()) for path in sorted(directory.glob("*.json")))
    return [result for result in found if isinstance(result, dict) and "measurements" in result]


def make_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return the rows of one benchmark's result, those with a bar first."""
    before = {one["name"]: one for one in result.get("before", {}).get("measurements", ())}
    rows = [
        Row(
            benchmark=result["benchmark"],
            **{key: one[key] for key in ("name", "value", "spread", "n", "unit", "target")},
            before=before.get(one["name"], {}).get("value"),
            before_target=before.get(one["name"], {}).get("target"),
        )
        for one in result["measurements"]
    ]
    return sorted(rows, key=lambda row: row.target is None)


def as_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the page: all bars first, then each benchmark with its machine and the rest of its figures."""
    rows = {result["benchmark"]: make_rows(result) for result in results}
    bars = [row for of_one in rows.values() for row in of_one if row.target is not None]
    met = sum(1 for row in bars if row.met)
    parts = [
        "# Results",
        "Written by `make bench`; the method is in [the benchmarks' README](../README.md). Medians of interleaved "
        "rounds, the distance between their quartiles in brackets; *before* is the run before, with its own mark.",
        f"{met} of {len(bars)} bars met.",
        "\n".join(_bars(bars)),
    ]
    for result in results:
        parts += [f"## {result['benchmark']}", _origin(result), "\n".join(_rest(rows[result["benchmark"]]))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bars(rows: Iterable[Row]) -> list[str]:
    lines = ["| benchmark | name | value | unit | bar | met | before |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        sign = ">=" if row.at_least else "<="
        before = "" if row.before is None else f"{row.before:g} {_mark(row.met_before)}".strip()
        lines.append(
            f"| {row.benchmark} | {row.name} | {_value(row)} | {row.unit} | {sign} {row.target:g} | "
            f"{_mark(row.met)} | {before} |"
        )
    return lines


def _rest(rows: Iterable[Row]) -> list[str]:
    lines = [
        f"| {row.name} | {_value(row)} | {row.unit} | {row.n} | {'' if row.before is None else f'{row.before:g}'} |"
        for row in rows
        if row.target is None
    ]
    return ["| name | value | unit | n | before |", "|---|---|---|---|---|", *lines] if lines else []


def _origin(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    hardware = f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['instructions'])})"
    hardware += f", {machine['memory_gib']} GiB" + (f", {machine['gpu']}" if machine.get("gpu") else "")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    before = result.get("before")
    run_before = f" Before: {before['date']}, commit {before['commit']}." if before else ""
    return (
        f"{result['date']}, commit {result['commit']}, {hardware}, load {machine['load_1m']:.1f} at the start; "
        f"Python {machine['python']}, {versions}.{run_before}"
    )


def _value(row: Row) -> str:
    return f"{row.value:g}" + ("" if row.spread is None else f" ({row.spread:g})")


def _mark(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "no"
