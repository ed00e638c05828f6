"""The real engine killed under a running server: what its callers see, and that the same server comes back."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_client import Client, LoraplexError, Sampling, UnavailableError
from tests.e2e.conftest import PROMPT, Stage, generate, serving, write_settings

pytestmark = pytest.mark.engine

ADAPTERS = ("acme/lives0", "acme/lives1")
LONG = Sampling(max_tokens=110, temperature=0, ignore_eos=True)


def engine_cores(server: int) -> list[int]:
    """Processes of a server's engine: its children by vLLM's own name for them, zombies too."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if lines["PPid"] == str(server) and "EngineCor" in lines["Name"]:
            found.append(int(lines["Pid"]))
    return sorted(found)


def shared_memory(*pids: int) -> set[str]:
    """Names in /dev/shm that processes use."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    used = {line.partition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line}
    return {name for name in used if not name.endswith(" (deleted)")}


def left_in_memory(names: set[str]) -> set[str]:
    return {name for name in names if Path("/dev/shm", name).exists()}


def adapters(client: Client) -> dict[str, tuple[str, bool]]:
    return {adapter.name: (adapter.state, adapter.pinned) for adapter in client.list_adapters()}


def test_after_its_engine_is_killed_the_same_server_answers_with_the_same_adapters_and_tokens(
    server: Stage, client: Client
) -> None:
    for (
        adapter
    ) in client.list_adapters():  # what other tests left: an encrypted one takes the registry to come back
        client.unload_adapter(adapter.name)
    for seed, name in enumerate(ADAPTERS):
        server.publish(name, seed=700 + seed)
    names = ("", *ADAPTERS)
    before = {name: generate(client, name).token_ids for name in names}
    client.pin_adapter(ADAPTERS[0])
    held = adapters(client)
    (core,) = engine_cores(server.pid)
    used = shared_memory(core, server.pid)
    ended = _killed_under_streams(client, names, core)
    assert [code for code, _ in ended] == ["ENGINE_UNAVAILABLE"] * len(names)
    assert max(seconds for _, seconds in ended) < 5
    server.toxics.down()  # the adapters come back without the registry
    try:
        down_s = _until_it_serves(client)
    finally:
        server.toxics.heal()
    assert adapters(client) == held
    after = [generate(client, name) for name in names]
    assert {name: done.token_ids for name, done in zip(names, after, strict=True)} == before
    assert [done.header.adapter_was_resident for done in after[1:]] == [True, True]
    (fresh,) = engine_cores(server.pid)  # no zombie beside it
    assert fresh != core
    assert left_in_memory(used) <= shared_memory(fresh, server.pid), "the dead engine left shared memory"
    client.unpin_adapter(ADAPTERS[0])
    print(f"streams ended after {max(s for _, s in ended):.2f} s, served again after {down_s:.1f} s")


def _killed_under_streams(client: Client, names: tuple[str, ...], core: int) -> list[tuple[str, float]]:
    """Kill the engine while a stream of each adapter runs; the code and the seconds after which each ended."""
    flowing = threading.Barrier(len(names) + 1)
    ended: dict[str, tuple[str, float]] = {}
    killed = [0.0]

    def stream(name: str) -> None:
        try:
            pieces = iter(client.stream(PROMPT, adapter=name, sampling=LONG))
            next(pieces)
            flowing.wait(30)
            for _ in pieces:
                pass
            ended[name] = ("completed", 0.0)
        except LoraplexError as error:
            ended[name] = (error.code, time.monotonic() - killed[0])

    threads = [threading.Thread(target=stream, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    flowing.wait(30)
    killed[0] = time.monotonic()
    os.kill(core, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    return [ended[name] for name in names]


def _until_it_serves(client: Client) -> float:
    started = time.monotonic()
    while True:
        try:
            client.generate(PROMPT, sampling=Sampling(max_tokens=1))
        except UnavailableError:
            assert time.monotonic() - started < 120, "it never came back"
            time.sleep(0.2)
        else:
            return time.monotonic() - started


@pytest.mark.reliability
@pytest.mark.parametrize("engines", [0, 1])  # killed before: it is told to stop while the next one starts
def test_a_server_told_to_stop_while_its_engine_starts_stops(stage: Stage, engines: int) -> None:
    stage.toxics.heal()
    settings = write_settings(stage, stage.root / f"early{engines}.toml", adapters__cache_dir='"early"')
    with contextlib.ExitStack() as held:
        if engines:
            process: subprocess.Popen[Any] = held.enter_context(serving(settings)).process
            (core,) = engine_cores(process.pid)
            os.kill(core, signal.SIGKILL)
        else:
            core, process = 0, held.enter_context(_starting(settings))
        deadline = time.monotonic() + 60
        while not (cores := [pid for pid in engine_cores(process.pid) if pid != core]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        used = shared_memory(process.pid)
        started = time.monotonic()
        process.terminate()
        assert process.wait(60) == 0, settings.with_suffix(".log").read_text()[-3000:]
        print(f"stopped after {time.monotonic() - started:.1f} s")
        assert not any(Path(f"/proc/{pid}").exists() for pid in cores)
        assert left_in_memory(used) == set()


@contextlib.contextmanager
def _starting(settings: Path) -> Iterator[subprocess.Popen[Any]]:
    with settings.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "loraplex_server", "--config", str(settings)],
            stdout=log,
            stderr=log,
            cwd=settings.parent,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(10)
