"""Real server processes over the deterministic engine: started, asked for their metrics, ended in every way."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.server.conftest import Shop

END_S_MAX = 30.0
REPOSITORY = Path(__file__).parents[2]
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? ([0-9.e+-]+)$", re.MULTILINE)


@dataclass
class ServerProcess:
    """A running server; `log` is its stderr."""

    process: subprocess.Popen[str]
    port: int
    metrics_port: int
    log: Path

    @property
    def target(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self.port}"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    def exit_status(self) -> int:
        """Wait for the end."""
        return self.process.wait(END_S_MAX)

    def rss_bytes(self) -> int:
        """Resident memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]

    def metrics(self) -> "Page":
        """What its metrics page says now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as reply:
            return Page(reply.read().decode())


class Page:
    """A metrics page."""

    def __init__(self, text: str) -> None:
        self._samples = [(name, labels, float(value)) for name, labels, value in _SAMPLE.findall(text)]

    def total(self, name: str, label: str = "") -> float:
        """The sum of a metric's series, of those with this text among the labels."""
        return sum(value for found, labels, value in self._samples if found == name and label in labels)

    def outcomes(self) -> dict[str, int]:
        """Ended calls by outcome."""
        return {
            outcome: int(self.total("loraplex_requests_total", f'outcome="{outcome}"'))
            for outcome in ("completed", "failed", "cancelled", "expired")
        }


def write_settings(shop: Shop, **sections: Mapping[str, Any]) -> Path:
    """Write the settings of a server of this registry; `sections` add to them and replace."""
    document: dict[str, dict[str, Any]] = {
        "server": {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"},
        "model": {"path": str(shop.root / "base"), "name": "sim"},
        "adapters": {"slots": 2, "cache_dir": "cache"},
        "registry": {"url": shop.url, "policy": "policy.toml", "state_dir": "state", "tag_ttl_s": 0},
    }
    lines = []
    for name in sorted({*document, *sections}):
        lines.append(f"[{name}]")
        values = {**document.get(name, {}), **sections.get(name, {})}
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    path = shop.root / "process.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


@contextlib.contextmanager
def serving(settings: Path, *, step_s: float = 0.0, context: int = 64) -> Iterator[ServerProcess]:
    """Run a server until the block ends; the block may end it itself."""
    log = settings.with_suffix(".log")
    environment = {"LORAPLEX_SIM_STEP_S": str(step_s), "LORAPLEX_SIM_CONTEXT": str(context)}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.sim.serve", "--config", str(settings)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | environment,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: "), f"the server ended early:\n{log.read_text()[-2000:]}"
        port = int(re.search(r"gRPC on [^,]*:(\d+)", line)[1])  # type: ignore[index]
        metrics_port = int(re.search(r":(\d+)/metrics", line)[1])  # type: ignore[index]
        yield ServerProcess(process, port, metrics_port, log)
    finally:
        process.kill()
        process.wait(END_S_MAX)
        process.stdout.close()  # type: ignore[union-attr]
