"""Plots of the table that `benchmarks.run` wrote, as SVG beside it.

    .venv-bench/bin/python -m benchmarks.plots

`bars.svg`: how near every figure is to its bar. `lora_overhead.svg`: throughput with LoRA on as a share of that with
LoRA off, ours and vLLM's own. Needs matplotlib, which is in the benchmarks' environment alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
NEAR_MOST = 2.0  # how much better than its bar a figure is shown
MET, MISSED, OTHERS = "#3a7d44", "#b5442e", "#9a9a9a"
CASES = {
    "idle": "no adapter\nin the batch",
    "mixed8_qv_r8": "8 adapters,\nr=8 on q,v",
    "one_r16_all": "1 adapter,\nr=16 all linear",
    "mixed16_r16_all": "16 adapters,\nr=16 all linear",
    "prefill": "prefill of 600,\none adapter",
}

Row = Mapping[str, Any]


def plot_bars(rows: list[Row], path: Path) -> None:
    """Draw value over bar, or bar over value where less is better, so that 1 is met and more is better."""
    held = [row for row in rows if row["target"] is not None and row["value"] and row["target"]]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.24 * len(held)))
    for place, row in enumerate(reversed(held)):
        over = row["value"] / row["target"]
        # Where a bar is met, being on the better side of it is being above 1 in the one form or the other.
        nearness = max(over, 1 / over) if row["met"] else min(over, 1 / over)
        axes.barh(place, min(nearness, NEAR_MOST), color=MET if row["met"] else MISSED)
    axes.set_yticks(
        range(len(held)), [f"{row['benchmark']}: {row['name']}" for row in reversed(held)], fontsize=7
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, NEAR_MOST)
    axes.set_xlabel(f"nearness to the bar (1: met; cut at {NEAR_MOST:g})")
    _finish(figure, path)


def plot_overhead(rows: list[Row], path: Path) -> None:
    """Draw the shares of LoRA-off throughput, bf16 above NF4, spread as error bars, bars as lines."""
    found = {row["name"]: row for row in rows if row["benchmark"] == "lora_overhead"}
    bases = {"": "bf16 base", "nf4_": "NF4 base"}
    figure, panels = plt.subplots(len(bases), 1, figsize=(8, 3.2 * len(bases)), sharex=True, squeeze=False)
    for (prefix, title), axes in zip(bases.items(), panels[:, 0], strict=True):
        for place, case in enumerate(CASES):
            for shift, kind, colour in ((-0.2, "", MET), (0.2, "stock_", OTHERS)):
                row = found.get(f"{prefix}{kind}{case}_ratio")
                if row is None:
                    continue
                axes.bar(
                    place + shift, row["value"], 0.38, yerr=(row["spread"] or 0) / 2, color=colour, capsize=2
                )
                if row["target"] is not None:
                    axes.hlines(row["target"], place + shift - 0.2, place + shift + 0.2, color="black")
        axes.axhline(1, color="black", linewidth=0.5, linestyle=":")
        axes.set_title(
            f"{title}: share of throughput with LoRA off (green ours, grey vLLM's own, line: bar)", fontsize=9
        )
        axes.set_xticks(range(len(CASES)), list(CASES.values()), fontsize=8)
    _finish(figure, path)


def _finish(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "loraplex"  # the same table gives the same file
    table = json.loads((RESULTS / "table.json").read_text())["rows"]
    plot_bars(table, RESULTS / "bars.svg")
    plot_overhead(table, RESULTS / "lora_overhead.svg")
