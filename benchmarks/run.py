"""Run the benchmarks one after the other, or those named, and write the table of all that are kept.

    python -m benchmarks.run [NAME ...]

Each is a process of its own with ``--save``. One that fails is named at the end, with exit status 1; the others run all
the same, and its figures of an earlier run stay in the table. Writes `results/table.md` and `results/table.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict

from benchmarks.guard import Guard
from benchmarks.report import RESULTS
from benchmarks.table import as_markdown, load_results, make_rows
from loraplex_server.engine.vllm_settings import SPIN_COUNT

BENCHMARKS = (
    "registry_io",
    "frontend",
    "kernels",
    "nf4",
    "lora_overhead",
    "working_set",
    "swap_stall",
    "peers",
    "memory",
)
LIMIT_S = 3600  # of one benchmark
TABLE_JSON = "table.json"
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPIN_COUNT}  # as in a server


def run(names: list[str]) -> list[str]:
    """Run the benchmarks in turn, and return the names of those that failed."""
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--save"]
        process = subprocess.Popen(command, env=THREADS | os.environ, start_new_session=True)
        guard = Guard(process.pid)
        try:
            status: int | str = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = f"{process.wait()}, after {LIMIT_S} s"
        guard.release()
        if status:
            print(f"{name} ended with status {status}", file=sys.stderr)
            failed.append(name)
    return failed


def write_table() -> str:
    """Write both forms of the table, and return the Markdown."""
    results = load_results(RESULTS)
    rows = [asdict(row) | {"met": row.met} for result in results for row in make_rows(result)]
    origins = {
        result["benchmark"]: {
            key: result[key] for key in ("date", "commit", "machine", "versions", "settings")
        }
        for result in results
    }
    (RESULTS / TABLE_JSON).write_text(json.dumps({"rows": rows, "origins": origins}, indent=1) + "\n")
    page = as_markdown(results)
    (RESULTS / "table.md").write_text(page)
    return page


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser("benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    failed = run(names)
    print(write_table())
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
