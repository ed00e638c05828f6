"""Races of many writers on one object, in threads and in processes; the short and the long tests share them."""

import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loraplex_registry.errors import KeyConflictError, StoreUnavailableError
from loraplex_registry.storage.store import Store, open_store, write_conditionally

WAIT_S = 120.0
KINDS = ("create", "swap")


@dataclass
class Tally:
    """What the writers of some rounds were told, and what stood there after."""

    rounds: int = 0
    good: int = 0
    winners: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, key: str, won: list[bytes], others: list[str], found: bytes, writers: int) -> None:
        """Judge one round: one winner, all others told that they lost, and the winner's bytes stand."""
        self.rounds += 1
        self.winners[len(won)] += 1
        if len(won) == 1 and found == won[0] and others == ["lost"] * (writers - 1):
            self.good += 1
        else:
            self.wrong.append(f"{key}: {len(won)} won, others {Counter(others)}")


def in_threads(store: Store, *, writers: int, rounds: int, kind: str, surely: bool = False) -> Tally:
    """Race `writers` threads `rounds` times; `surely` writes by `write_conditionally`."""
    tally, told, lock = Tally(), _Told(), threading.Lock()
    etags: dict[int, str] = {}
    barrier = threading.Barrier(writers + 1)

    def run(number: int) -> None:
        for turn in range(rounds):
            barrier.wait(WAIT_S)
            answer = _write(store, kind, turn, number, etags.get(turn), surely=surely)
            with lock:
                told.add(turn, answer, number)
            barrier.wait(WAIT_S)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(writers)]
    for thread in threads:
        thread.start()
    for turn in range(rounds):
        if kind == "swap":
            etags[turn] = write_conditionally(store, _key(kind, turn), os.urandom(16), etag=None)
        barrier.wait(WAIT_S)
        barrier.wait(WAIT_S)
        tally.add(_key(kind, turn), *told.of(turn), _read(store, kind, turn), writers)
    for thread in threads:
        thread.join()
    return tally


def in_processes(url: str, *, processes: int, threads: int, rounds: int, kind: str) -> Tally:
    """Race `processes` of `threads` writers each; every process opens the store for itself."""
    context = multiprocessing.get_context("spawn")
    store, writers = open_store(url), processes * threads
    etags = {
        turn: write_conditionally(store, _key(kind, turn), os.urandom(16), etag=None)
        for turn in range(rounds if kind == "swap" else 0)
    }
    barrier, queue = context.Barrier(writers), context.Queue()
    workers = [
        context.Process(
            target=_worker,
            args=(url, kind, number * threads, threads, rounds, etags, barrier, queue),
            daemon=True,
        )
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    told = _Told()
    for _ in range(writers * rounds):
        turn, answer, number = queue.get(timeout=WAIT_S)
        told.add(turn, answer, number)
    for worker in workers:
        worker.join(WAIT_S)
    tally = Tally()
    for turn in range(rounds):
        tally.add(_key(kind, turn), *told.of(turn), _read(store, kind, turn), writers)
    return tally


def count(store: Store, *, writers: int, each: int) -> int:
    """Let `writers` threads add one to a counter `each` times by compare-and-swap; return what it says in the end."""
    key = "t/count.json"
    write_conditionally(store, key, b"0", etag=None)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(each):
                _add_one(store, key)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return int(store.get(key, limit_bytes=100).body)


def count_in_processes(url: str, *, processes: int, each: int) -> int:
    """As `count`, one writer in each process."""
    context = multiprocessing.get_context("spawn")
    write_conditionally(open_store(url), "t/count.json", b"0", etag=None)
    workers = [context.Process(target=_adder, args=(url, each), daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT_S)
        assert worker.exitcode == 0
    return int(open_store(url).get("t/count.json", limit_bytes=100).body)


class _Told:
    """Answers by round."""

    def __init__(self) -> None:
        self._answers: dict[int, list[tuple[str, int]]] = {}

    def add(self, turn: int, answer: str, number: int) -> None:
        self._answers.setdefault(turn, []).append((answer, number))

    def of(self, turn: int) -> tuple[list[bytes], list[str]]:
        answers = self._answers.get(turn, [])
        won = [_body(number) for answer, number in answers if answer == "won"]
        return won, [answer for answer, _ in answers if answer != "won"]


def _worker(
    url: str,
    kind: str,
    first: int,
    threads: int,
    rounds: int,
    etags: dict[int, str],
    barrier: Any,
    queue: Any,
) -> None:
    store = open_store(url)

    def run(number: int) -> None:
        for turn in range(rounds):
            barrier.wait(WAIT_S)
            queue.put((turn, _write(store, kind, turn, number, etags.get(turn)), number))

    writers = [threading.Thread(target=run, args=(first + number,)) for number in range(threads)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()


def _adder(url: str, each: int) -> None:
    store = open_store(url)
    for _ in range(each):
        _add_one(store, "t/count.json")


def _add_one(store: Store, key: str) -> None:
    while True:
        item = store.get(key, limit_bytes=100)
        try:
            store.swap(key, b"%d" % (int(item.body) + 1), etag=item.etag)
        except KeyConflictError:
            continue
        return


def _write(store: Store, kind: str, turn: int, number: int, etag: str | None, *, surely: bool = False) -> str:
    """Write as one writer; return what it was told."""
    key, body = _key(kind, turn), _body(number)
    write: Callable[[], object]
    if surely:
        write = lambda: write_conditionally(store, key, body, etag=etag)  # noqa: E731
    elif kind == "create":
        write = lambda: store.create(key, body)  # noqa: E731
    else:
        write = lambda: store.swap(key, body, etag=etag or "")  # noqa: E731
    try:
        write()
    except KeyConflictError:
        return "lost"
    except StoreUnavailableError as error:
        return f"unavailable, {'ambiguous' if error.ambiguous else 'not applied'}"
    return "won"


def _key(kind: str, turn: int) -> str:
    return f"t/{kind}/{turn}.json"


def _body(number: int) -> bytes:
    return b"writer %d" % number


def _read(store: Store, kind: str, turn: int) -> bytes:
    return store.get(_key(kind, turn), limit_bytes=100).body
