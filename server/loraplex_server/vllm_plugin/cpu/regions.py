"""Memory for blocks: of its own, in huge pages where there are any, and used again.

A block's memory goes back when nothing refers to it any more: no request, no slot of the kernels, no tensor over it.
The last regions, SPARE_BYTES_MAX together at most, are kept for the next blocks of about their size. Memory that is
new to a process has to be found and zeroed by the kernel, and in a virtual machine often by the host as well, while the
core can do nothing else: 75 ms for 35 MB where that was measured, against 20 ms for making the whole block in memory
that was in use before. For any thread.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from typing import Final

import torch

from loraplex_server.vllm_plugin.cpu import pages

SPARE_BYTES_MAX: Final = 128 << 20
"""Most memory that is kept for the next blocks."""

WASTE_MAX: Final = 1.25
"""A region is used again for a block that needs at least this part of it."""


class Regions:
    """See the module. One for a process: `REGIONS`."""

    def __init__(self, spare_bytes_max: int = SPARE_BYTES_MAX) -> None:
        self._spare_bytes_max = spare_bytes_max
        self._spare: list[mmap.mmap] = []  # the latest last
        self._lock = threading.RLock()  # the collector may give a region back while this thread takes one

    @property
    def spare_bytes(self) -> int:
        """Bytes kept for the next blocks."""
        with self._lock:
            return sum(map(len, self._spare))

    def take(self, size: int) -> torch.Tensor:
        """Return `size` bytes of any value as a tensor of uint8; they are given back when the last view of it goes."""
        memory = self._fitting(size) or pages.fresh(size)
        # ctypes between the two: its object goes with the last tensor over it, and lets us know.
        held = (ctypes.c_char * len(memory)).from_buffer(memory)
        weakref.finalize(held, self._give_back, memory).atexit = False
        return torch.frombuffer(held, dtype=torch.uint8)[:size]

    def _fitting(self, size: int) -> mmap.mmap | None:
        with self._lock:
            for memory in reversed(self._spare):
                if size <= len(memory) <= size * WASTE_MAX:
                    self._spare.remove(memory)
                    return memory
        return None

    def _give_back(self, memory: mmap.mmap) -> None:
        if len(memory) > self._spare_bytes_max:
            return  # it would only push out what fits
        with self._lock:
            self._spare.append(memory)
            while sum(map(len, self._spare)) > self._spare_bytes_max:
                del self._spare[0]  # unmapped with its last reference


REGIONS: Final = Regions()
"""Of this process."""
