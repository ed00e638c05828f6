"""Staging over a real socket with real threads; what reads adapters is the only part that is not the real one.

The real one is behind it in tests/e2e/test_staging.py.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.errors import UnsupportedAdapterError
from loraplex_server.engine.staging_client import StagingClient
from loraplex_server.errors import AdapterNotReadyError, EngineUnavailableError
from loraplex_server.vllm_plugin.cpu import staging
from loraplex_server.vllm_plugin.cpu.pace import Pace
from loraplex_server.vllm_plugin.cpu.staging import Staging
from loraplex_server.vllm_plugin.cpu.staging_wire import (
    LINE_BYTES_MAX,
    SOCKET_NAME,
    Question,
    WireError,
    parse_answer,
)


@dataclass
class Made:
    n_bytes: int


@dataclass
class Blocks:
    """The store, and a reader that reads what it is told to."""

    kept: dict[int, Made] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    at_once: int = 0
    at_once_most: int = 0
    may_go_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_go_on.set()

    def put(self, adapter_id: int, block: Made) -> None:
        self.kept[adapter_id] = block

    def drop(self, adapter_id: int) -> bool:
        return self.kept.pop(adapter_id, None) is not None

    def ids(self) -> frozenset[int]:
        return frozenset(self.kept)

    def make(self, path: str, pause: Callable[[], None]) -> Made:
        self.read.append(Path(path).name)
        self.at_once += 1
        self.at_once_most = max(self.at_once, self.at_once_most)
        try:
            body = (Path(path) / "weights").read_bytes()
            while not self.may_go_on.wait(0.001):
                pause()
            if body == b"bad":
                raise ValueError("these are no weights")
            if body == b"bug":
                raise KeyError("a bug of ours")
            return Made(len(body))
        finally:
            self.at_once -= 1


@dataclass
class Rig:
    place: Path
    root: Path
    blocks: Blocks
    client: StagingClient

    def adapter(self, name: str, body: bytes = b"good") -> Path:
        path = self.root / name
        path.mkdir()
        (path / "weights").write_bytes(body)
        return path

    def connect(self) -> socket.socket:
        """A connection of one's own, for what the client would never say."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.place / SOCKET_NAME))
        connection.settimeout(5)
        return connection


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
async def rig(place: Path, tmp_path: Path) -> AsyncIterator[Rig]:
    async with started(place, tmp_path) as rig:
        yield rig


@contextlib.asynccontextmanager
async def started(
    place: Path, root: Path, *, pace: Pace | None = None, peer_pid: int = 0
) -> AsyncIterator[Rig]:
    blocks = Blocks()
    service = Staging(
        place,
        read=blocks.make,
        store=blocks,
        peer_pid=peer_pid or os.getpid(),
        roots=[str(root)],
        pace=pace or Pace(),
    )
    service.start()
    client = await StagingClient.connect(place)
    try:
        yield Rig(place, root, blocks, client)
    finally:
        blocks.may_go_on.set()
        await client.close()
        service.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what it waits for happens on other threads
            await asyncio.sleep(0.002)


async def test_an_adapter_is_staged_listed_and_dropped(rig: Rig) -> None:
    assert await rig.client.stage(3, rig.adapter("a", b"12345")) == 5
    assert await rig.client.staged() == {3}
    assert await rig.client.drop(3)
    assert not await rig.client.drop(3)
    assert await rig.client.staged() == frozenset()


async def test_many_at_once_are_made_one_after_the_other_and_answers_reach_those_who_asked(rig: Rig) -> None:
    paths = [rig.adapter(f"a{number}", b"x" * number) for number in range(1, 31)]
    sizes = await asyncio.gather(*(rig.client.stage(len(p.name) * 100 + i, p) for i, p in enumerate(paths)))
    assert sizes == list(range(1, 31))
    assert rig.blocks.at_once_most == 1
    assert len(rig.blocks.kept) == 30


async def test_what_is_refused_is_an_answer_and_the_next_one_is_made(rig: Rig) -> None:
    with pytest.raises(UnsupportedAdapterError, match="no weights"):
        await rig.client.stage(1, rig.adapter("bad", b"bad"))
    with pytest.raises(AdapterNotReadyError, match="KeyError"):
        await rig.client.stage(2, rig.adapter("bug", b"bug"))
    with pytest.raises(UnsupportedAdapterError):
        await rig.client.stage(3, rig.root / "absent")
    assert await rig.client.stage(4, rig.adapter("good")) == 4
    assert await rig.client.staged() == {4}


async def test_an_id_is_taken_while_its_adapter_is_there_or_on_its_way(rig: Rig) -> None:
    rig.blocks.may_go_on.clear()
    first = asyncio.create_task(rig.client.stage(1, rig.adapter("a")))
    await until(lambda: rig.blocks.read == ["a"])
    with pytest.raises(UnsupportedAdapterError, match="taken"):
        await rig.client.stage(1, rig.root / "a")
    rig.blocks.may_go_on.set()
    await first
    with pytest.raises(UnsupportedAdapterError, match="taken"):
        await rig.client.stage(1, rig.root / "a")


@pytest.mark.parametrize("how", ["beside", "dots", "link", "relative"])
async def test_a_path_outside_of_the_roots_is_refused_unread(rig: Rig, how: str, place: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        outside = Path(name)
        (outside / "weights").write_bytes(b"secret")
        (rig.root / "link").symlink_to(outside)
        paths = {
            "beside": outside,
            "dots": rig.root / ".." / ".." / outside.relative_to(outside.parent),
            "link": rig.root / "link",
            "relative": Path("relative/to/nothing"),
        }
        with pytest.raises(UnsupportedAdapterError):
            await rig.client.stage(1, paths[how])
    assert rig.blocks.read == []


async def test_one_that_is_dropped_while_it_is_made_is_given_up(rig: Rig) -> None:
    rig.blocks.may_go_on.clear()
    making = asyncio.create_task(rig.client.stage(1, rig.adapter("a")))
    waiting = asyncio.create_task(rig.client.stage(2, rig.adapter("b")))
    await until(lambda: rig.blocks.read == ["a"])
    assert await rig.client.drop(1)
    with pytest.raises(AdapterNotReadyError, match="dropped"):
        await making
    rig.blocks.may_go_on.set()
    assert await waiting == 4
    assert await rig.client.staged() == {2}


async def test_while_the_engine_is_in_a_step_nothing_is_made(place: Path, tmp_path: Path) -> None:
    pace = Pace(patience_s=5)
    async with started(place, tmp_path, pace=pace) as rig:
        assert await rig.client.stage(1, rig.adapter("before")) == 4
        with pace.step():
            during = asyncio.create_task(rig.client.stage(2, rig.adapter("during")))
            await asyncio.sleep(0.1)
            assert rig.blocks.read == ["before"]
            assert not during.done()
        ended = time.monotonic()
        assert await during == 4
        assert time.monotonic() - ended < 2, "it slept through the rest after the step"


async def test_an_adapter_comes_in_however_long_a_step_is(place: Path, tmp_path: Path) -> None:
    pace = Pace(patience_s=0.02)
    async with started(place, tmp_path, pace=pace) as rig:
        with pace.step():
            assert await rig.client.stage(1, rig.adapter("slow")) == 4


async def test_no_more_wait_than_may(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.blocks.may_go_on.clear()
    path = rig.adapter("a")
    asked = [asyncio.create_task(rig.client.stage(i + 1, path)) for i in range(staging.QUEUE_MAX + 2)]
    await until(lambda: any(task.done() for task in asked))
    with pytest.raises(AdapterNotReadyError, match="wait already"):
        await next(task for task in asked if task.done())
    rig.blocks.may_go_on.set()
    done = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(result == 4 for result in done) >= staging.QUEUE_MAX


HOSTILE = [
    b"not json\n",
    b"[]\n",
    b"[" * 5000 + b"\n",
    b'{"n": 1, "op": "list", "more": 1}\n',
    b'{"n": -1, "op": "list"}\n',
    b'{"n": true, "op": "list"}\n',
    b'{"n": 1, "op": "steal"}\n',
    b'{"n": 1, "op": ["list"]}\n',
    b'{"n": 1, "op": "drop", "id": 0}\n',
    b'{"n": 1, "op": "stage", "id": 1, "path": 7}\n',
    b'{"n": 1, "op": "stage", "id": 1, "path": "/a\\u0000b"}\n',
    b'{"n": 1, "op": "stage", "id": 1.5, "path": "/a"}\n',
    b"x" * (LINE_BYTES_MAX + 10),
    b"\xff\xfe\n",
]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
async def test_a_line_that_is_no_question_ends_its_connection_alone(rig: Rig, line: bytes) -> None:
    def say() -> bytes:
        with rig.connect() as connection:
            connection.sendall(line)
            return connection.recv(100)

    assert await asyncio.to_thread(say) == b""
    assert await rig.client.stage(1, rig.adapter("a")) == 4


async def test_connections_are_bounded(rig: Rig) -> None:
    def crowd() -> list[bytes]:
        connections = [rig.connect() for _ in range(staging.CONNECTIONS_MAX + 2)]
        said = []
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(Question(1, "list").line())
        for connection in connections:
            with contextlib.suppress(OSError):
                said.append(connection.recv(100))
        for connection in connections:
            connection.close()
        return said

    said = await asyncio.to_thread(crowd)
    assert sum(body != b"" for body in said) == staging.CONNECTIONS_MAX - 1  # the client has one
    assert await rig.client.staged() == frozenset()


ASKING = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
print("connected", end=" ")
try:
    connection.sendall(b'{"n": 1, "op": "list"}\\n')
    print(connection.recv(100) or "nothing")
except ConnectionError:
    print("nothing")
"""


async def test_another_process_is_not_listened_to(rig: Rig) -> None:
    path = str(rig.place / SOCKET_NAME)
    asked = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", ASKING, path], capture_output=True, text=True, check=True
    )
    assert asked.stdout.strip() == "connected nothing"


def test_a_directory_that_others_may_enter_is_refused(place: Path, tmp_path: Path) -> None:
    place.chmod(0o755)
    with pytest.raises(PermissionError):
        Staging(place, read=Blocks().make, store=Blocks(), peer_pid=1, roots=[str(tmp_path)]).start()


async def test_when_the_worker_ends_those_who_wait_and_those_who_ask_learn_it(place: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place / SOCKET_NAME))
    listener.listen(1)
    client = await StagingClient.connect(place)
    connection, _ = listener.accept()
    waiting = asyncio.create_task(client.staged())
    await asyncio.sleep(0.01)
    connection.close()
    listener.close()
    for asked in (waiting, client.staged(), client.stage(1, Path("/x")), client.drop(1)):
        with pytest.raises(EngineUnavailableError):
            await asyncio.wait_for(asked, 5)
    await client.close()


async def test_one_who_stops_waiting_disturbs_nobody(rig: Rig) -> None:
    rig.blocks.may_go_on.clear()
    gone = asyncio.create_task(rig.client.stage(1, rig.adapter("a")))
    await until(lambda: rig.blocks.read == ["a"])
    gone.cancel()
    rig.blocks.may_go_on.set()
    assert await rig.client.stage(2, rig.adapter("b")) == 4
    assert await rig.client.staged() == {1, 2}


questions = st.one_of(
    st.builds(Question, st.integers(0, 2**53 - 1), st.just("list")),
    st.builds(Question, st.integers(0, 2**53 - 1), st.just("drop"), st.integers(1, 2**53 - 1)),
    st.builds(
        Question,
        st.integers(0, 2**53 - 1),
        st.just("stage"),
        st.integers(1, 2**53 - 1),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200),
    ),
)


@given(questions)
def test_every_question_is_read_as_it_was_meant(question: Question) -> None:
    line = question.line()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert Question.parse(line) == question


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=5), st.integers() | st.text()).map(json.dumps).map(str.encode)
)
def test_no_line_does_worse_than_being_refused(line: bytes) -> None:
    with contextlib.suppress(WireError):
        Question.parse(line)
    with contextlib.suppress(WireError):
        parse_answer(line)
