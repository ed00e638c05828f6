"""What the loraplex server may ask of a vLLM worker, through ``worker_extension_cls``.

vLLM mixes `WorkerExtension` into its worker class; the server calls the methods by name through
``collective_rpc("loraplex_...")``. They take and return plain data (str, int, dict), because it crosses a process
boundary and nothing is to be pickled by us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class WorkerExtension:
    """Questions to a worker; the prefix ``loraplex_`` keeps the names clear of vLLM's own."""

    model_runner: Any  # vLLM's; set by the worker class this is mixed into

    def loraplex_lora_wrapper(self) -> str:
        """Return the qualified name of the wrapper class that the model's LoRA layers really hold.

        Asks the layers, not the setting. "" when LoRA is off; several names joined by "," if layers differ.
        """
        manager = getattr(self.model_runner, "lora_manager", None)
        if manager is None:
            return ""
        modules = manager._adapter_manager.modules.values()
        return ",".join(sorted({_qualified_name(type(module.punica_wrapper)) for module in modules}))

    def loraplex_stage_at(self, directory: str, peer_pid: int, roots: list[str]) -> None:
        """Begin to take adapters in over a socket, beside the steps; only in native mode. See `cpu.staging.Staging`.

        Raises:
            OSError: there is no listening in that directory.
        """
        from loraplex_server.vllm_plugin.cpu.blocks import STAGED
        from loraplex_server.vllm_plugin.cpu.staging import Staging

        manager = self.model_runner.lora_manager
        manager.booked = True
        read = manager.reader().read
        Staging(Path(directory), read=read, store=STAGED, peer_pid=peer_pid, roots=roots).start()

    def loraplex_memory(self) -> dict[str, int]:
        """Return this worker's memory in bytes: ``rss``, ``peak_rss`` and ``pss`` (shared pages divided)."""
        return process_memory_bytes("self")


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def process_memory_bytes(pid: int | str) -> dict[str, int]:
    """Read the memory of a process from Linux's /proc.

    Args:
        pid: process id, or "self".

    Returns:
        ``rss``, ``peak_rss`` and ``pss`` in bytes.

    Raises:
        OSError: no such process, or not Linux.

    """
    status = _kilobyte_fields(Path(f"/proc/{pid}/status"))
    rollup = _kilobyte_fields(Path(f"/proc/{pid}/smaps_rollup"))
    return {"rss": status["VmRSS"], "peak_rss": status["VmHWM"], "pss": rollup["Pss"]}


def _kilobyte_fields(path: Path) -> dict[str, int]:
    """Parse the `Name:   123 kB` lines of a /proc file into bytes."""
    fields = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields
