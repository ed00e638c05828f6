"""Memory in huge pages is zero, begins with one, and takes no more than was asked for."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_server.vllm_plugin.cpu import pages

SMALL = 4096
ROLLUP = Path("/proc/self/smaps_rollup")
FILLS = """
import re, sys
from pathlib import Path
from loraplex_server.vllm_plugin.cpu import pages

def resident():
    return int(re.search(r"Rss: *([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())[1]) * 1024

size = 3 * pages.HUGE + 4096
pages.zeros(size).fill_(7)  # what torch itself needs, once
before = resident()
kept = [pages.zeros(size).fill_(7) for _ in range(8)]
print((resident() - before) / (8 * size))
"""


@pytest.mark.parametrize("size", [1, SMALL, pages.HUGE - 1, pages.HUGE, 3 * pages.HUGE + 17])
def test_memory_is_zero_of_the_size_asked_for_and_begins_with_a_huge_page(size: int) -> None:
    memory = pages.zeros(size)
    assert len(memory) == size
    assert memory.data_ptr() % pages.HUGE == 0
    assert not bool(memory.any())
    memory.fill_(7)
    assert int(memory[-1]) == 7
    assert len(pages.fresh(size)) == size


def test_memory_stays_as_long_as_a_view_of_it() -> None:
    memory = pages.zeros(2 * pages.HUGE)
    memory.fill_(7)
    view = memory[pages.HUGE :]
    del memory
    gc.collect()
    others = [pages.zeros(2 * pages.HUGE) for _ in range(8)]
    assert int(view.min()) == 7
    assert not any(bool(other.any()) for other in others)


@pytest.mark.skipif(not ROLLUP.exists(), reason="what is resident is read from Linux's files")
def test_only_whole_huge_pages_are_asked_for_so_that_no_memory_is_wasted() -> None:
    found = subprocess.run(
        [sys.executable, "-c", FILLS], capture_output=True, text=True, check=True, timeout=60
    )
    # One more huge page for the few bytes behind the last would make it 1.33.
    assert 0.99 < float(found.stdout) < 1.05
