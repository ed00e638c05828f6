"""Processes of a benchmark end with it, even when it is killed and they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

BENCHMARK = """
import os, signal, subprocess, sys, time
from benchmarks.guard import Guard
tree = subprocess.Popen(["/bin/sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True)
guard = Guard(tree.pid)
grandchild = int(tree.stdout.readline())
os.killpg(tree.pid, signal.SIGSTOP)
print(tree.pid, grandchild, guard._watcher.pid, flush=True)
if sys.argv[1] == "release":
    guard.release()
    os.killpg(tree.pid, signal.SIGCONT)
    tree.terminate()
    os.kill(grandchild, signal.SIGTERM)
else:
    time.sleep(60)
"""


def run(how: str) -> tuple[subprocess.Popen[str], list[int]]:
    benchmark = subprocess.Popen([sys.executable, "-c", BENCHMARK, how], stdout=subprocess.PIPE, text=True)
    assert benchmark.stdout is not None
    return benchmark, [int(pid) for pid in benchmark.stdout.readline().split()]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_end(pids: list[int]) -> list[int]:
    """Return those that are still alive after a while."""
    until = time.monotonic() + 10
    while time.monotonic() < until and any(map(is_alive, pids)):
        time.sleep(0.02)
    return [pid for pid in pids if is_alive(pid)]


def test_a_killed_benchmark_takes_its_stopped_processes_with_it():
    benchmark, pids = run("sleep")
    assert all(map(is_alive, pids))
    benchmark.send_signal(signal.SIGKILL)
    benchmark.wait()
    assert await_end(pids) == []


def test_a_released_guard_ends_itself_and_nothing_else():
    benchmark, pids = run("release")
    assert benchmark.wait(20) == 0
    assert await_end(pids) == []


def test_a_guard_is_no_part_of_the_group_it_watches():
    benchmark, (group, grandchild, watcher) = run("sleep")
    try:
        assert os.getpgid(grandchild) == group
        assert os.getpgid(watcher) != group
    finally:
        benchmark.kill()
        benchmark.wait()
    assert await_end([group, grandchild, watcher]) == []
