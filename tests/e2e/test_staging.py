"""Adapters that come in beside the steps of the real engine: nobody's tokens change, and a lost one harms one call."""

import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex_client import AdapterInfo, Client, LoraplexError, Sampling
from loraplex_server.vllm_plugin.cpu.staging_wire import SOCKET_NAME, Question
from tests.e2e.conftest import PROMPT, Stage, generate
from tests.e2e.test_engine_death import engine_cores

pytestmark = pytest.mark.engine

PIDFD_GETFD = 438  # pidfd_getfd(2), Linux 5.6, the same number on every architecture
STREAMS = 8
TRIES = 5


def test_loads_while_eight_streams_run_change_no_token(server: Stage, client: Client) -> None:
    streaming, arriving = [f"acme/streams{i}" for i in range(2)], [f"acme/arrives{i}" for i in range(6)]
    for seed, name in enumerate([*streaming, *arriving]):
        server.publish(name, seed=900 + seed)
    names = [*streaming, ""]
    sampling = Sampling(max_tokens=96, temperature=0, ignore_eos=True)

    def answer(name: str) -> tuple[int, ...]:
        return tuple(client.generate(PROMPT, adapter=name, sampling=sampling).token_ids)

    alone = {name: answer(name) for name in names}
    first = {name: generate(client, name).token_ids for name in arriving}
    for adapter in client.list_adapters():
        client.unload_adapter(adapter.name)
    rows = [names[row % len(names)] for row in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS + 1) as threads:
        running = [threads.submit(answer, name) for name in rows]
        loads = threads.submit(lambda: [list(client.load_adapter(name)) for name in arriving])
        assert [each.result() for each in running] == [alone[name] for name in rows]
        loads.result()
    assert {name: generate(client, name).token_ids for name in arriving} == first


def test_one_that_is_only_staged_is_the_engines_copy_and_comes_back_for_nothing(
    server: Stage, client: Client
) -> None:
    server.publish("acme/ahead", seed=910)
    list(client.load_adapter("acme/ahead", stage_only=True))
    assert state(client, "acme/ahead").state == "staged"
    assert not sealed_copies(server), "the server lets go of bytes that the engine holds"
    done = generate(client, "acme/ahead")
    assert not done.header.adapter_was_resident
    assert state(client, "acme/ahead").state == "resident"


def test_a_call_whose_adapter_the_engine_has_lost_gets_an_error_and_no_token_and_nobody_else_does(
    server: Stage, client: Client
) -> None:
    server.publish("acme/lost", seed=920)
    right = generate(client, "acme/lost").token_ids
    for adapter in client.list_adapters():
        client.unload_adapter(adapter.name)
    core = engine_cores(server.pid)
    for _ in range(TRIES):  # a look at the books meanwhile brings it back, which is right as well
        list(client.load_adapter("acme/lost"))  # no step has had it yet
        drop_all(server.pid)
        try:
            generate(client, "acme/lost")
        except LoraplexError as error:
            code = error.code
            break
        client.unload_adapter("acme/lost")
    else:
        raise AssertionError("a call was answered after its adapter was dropped, time after time")
    assert code == "ADAPTER_NOT_READY"
    assert generate(client, "").usage.completion_tokens == 16
    assert engine_cores(server.pid) == core, "the engine lives on"
    client.unload_adapter("acme/lost")  # or the next look at the books would see it
    assert generate(client, "acme/lost").token_ids == right


def drop_all(pid: int) -> None:
    """Have the worker forget every adapter that it may hold, behind the server's back."""
    with staging_connection(pid) as connection:
        for number in range(1, 2000):
            while True:  # it does not block, because the server's copy must not
                with contextlib.suppress(BlockingIOError):
                    connection.send(Question(1 << 40, "drop", number).line())
                    break
    time.sleep(0.2)  # until they have been read


def state(client: Client, name: str) -> AdapterInfo:
    return next(adapter for adapter in client.list_adapters() if adapter.name.startswith(f"{name}@"))


def sealed_copies(server: Stage) -> list[str]:
    """Weights that the server's process holds in sealed memory."""
    links = [os.readlink(path) for path in Path(f"/proc/{server.pid}/fd").iterdir()]
    return [link for link in links if "adapter_model.safetensors" in link and link.startswith("/memfd:")]


@contextlib.contextmanager
def staging_connection(pid: int) -> Iterator[socket.socket]:
    """The server's own connection to its worker: the worker listens to nobody else."""
    descriptor = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if not os.readlink(link).startswith("socket:"):
                continue
            copy = libc.syscall(PIDFD_GETFD, descriptor, int(link.name), 0)
            assert copy >= 0, os.strerror(ctypes.get_errno())
            with socket.socket(fileno=copy) as connection, contextlib.suppress(OSError):
                name = connection.getpeername()
                if connection.family == socket.AF_UNIX and str(name).endswith(f"/{SOCKET_NAME}"):
                    yield connection
                    return
    finally:
        os.close(descriptor)
    raise AssertionError("the server has no connection to its worker")
