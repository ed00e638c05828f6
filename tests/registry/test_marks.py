"""High-water marks: nothing older is believed again, by any process, after any crash; damage is never a fresh start."""

import datetime as dt
import multiprocessing
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.errors import ExpiredError, PolicyRefusedError, RegistryError, RollbackError
from loraplex_registry.format.canonical import StrictJsonError
from loraplex_registry.trust import marks as marks_module
from loraplex_registry.trust.marks import (
    REVOCATIONS,
    FileMarks,
    FrozenMarks,
    Mark,
    MemoryMarks,
    Seen,
    marks_directory,
    read_seen,
    seen_bytes,
)
from tests.registry.conftest import NOW

A, B = "a" * 64, "b" * 64
KEYS = ("1" * 64,)
times = st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2100, 1, 1), timezones=st.just(dt.UTC))
statements = st.tuples(st.integers(1, 6), st.sampled_from([A, B]))


def advance(
    marks: MemoryMarks, number: int, sha256: str = A, *, name: str = "orders@prod", **options: object
) -> None:
    keyids = options.get("keyids", KEYS)
    marks.advance(
        "acme",
        name,
        Mark(number, sha256, keyids),
        issued=options.get("issued", NOW),
        trusted=options.get("trusted", KEYS),
    )


@pytest.fixture(params=["memory", "file"])
def marks(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryMarks:
    return MemoryMarks() if request.param == "memory" else FileMarks(tmp_path / "marks")


def test_an_older_number_is_a_rollback_and_other_content_a_fork(marks: MemoryMarks) -> None:
    advance(marks, 3)
    advance(marks, 3)
    with pytest.raises(RollbackError, match="3 was seen before") as caught:
        advance(marks, 2)
    assert caught.value.code == "ROLLBACK"
    with pytest.raises(RollbackError, match="other content"):
        advance(marks, 3, B)
    advance(marks, 4, B)


@pytest.mark.parametrize(
    ("name", "number", "sentence"),
    [
        ("orders@prod", 2, "acme/orders@prod has generation 2, and generation 3 was seen before"),
        (
            "orders@prod",
            0,
            "acme/orders@prod is gone, and generation 3 was seen before; somebody took it away",
        ),
        ("revocations", 2, "The revocation list of tenant acme has serial 2, and serial 3 was seen before"),
        ("revocations", 0, "The revocation list of tenant acme is gone, and serial 3 was seen before"),
    ],
)
def test_a_rollback_names_tenant_and_thing_with_the_numbers_found_and_seen(
    name: str, number: int, sentence: str, marks: MemoryMarks
) -> None:
    marks.advance("acme", name, Mark(3, A, KEYS), issued=NOW, trusted=KEYS)
    for asked in (marks, FrozenMarks(marks)):
        with pytest.raises(RollbackError) as caught:
            asked.advance("acme", name, Mark(number, B, KEYS), issued=NOW, trusted=KEYS)
        assert caught.value.message.startswith(sentence)
    with pytest.raises(ExpiredError, match="a statement of tenant acme issued"):
        marks.seen("acme").check_clock(NOW - dt.timedelta(days=1))


@given(history=st.lists(statements, max_size=30))
def test_what_was_believed_never_goes_back(history: list[tuple[int, str]]) -> None:
    """The law of the module, against a model of three lines."""
    marks, newest = MemoryMarks(), (0, "")
    for number, sha256 in history:
        good = number > newest[0] or (number, sha256) == newest
        try:
            advance(marks, number, sha256)
        except RollbackError:
            assert not good
        else:
            assert good
            newest = (number, sha256)


def test_tags_and_tenants_are_apart(marks: MemoryMarks) -> None:
    advance(marks, 9)
    advance(marks, 1, name="orders@canary")
    advance(marks, 1, name=REVOCATIONS)
    marks.advance("globex", "orders@prod", Mark(1, A, KEYS), issued=NOW, trusted=KEYS)


def test_a_mark_falls_with_the_keys_that_set_it(marks: MemoryMarks) -> None:
    stolen, fresh = ("5" * 64,), ("6" * 64,)
    advance(marks, 999_999, keyids=stolen, trusted=stolen)
    with pytest.raises(RollbackError):
        advance(marks, 2, keyids=fresh, trusted=stolen + fresh)
    advance(marks, 2, keyids=fresh, trusted=fresh)


def test_a_clock_that_was_set_back_is_refused(marks: MemoryMarks) -> None:
    advance(marks, 1)
    marks.seen("acme").check_clock(NOW - dt.timedelta(seconds=300))
    with pytest.raises(ExpiredError, match="set the clock"):
        marks.seen("acme").check_clock(NOW - dt.timedelta(seconds=301))
    marks.seen("globex").check_clock(NOW - dt.timedelta(days=999))


def test_frozen_marks_check_and_remember_nothing(marks: MemoryMarks) -> None:
    advance(marks, 3)
    frozen = FrozenMarks(marks)
    advance(frozen, 7)
    with pytest.raises(RollbackError):
        advance(frozen, 2)
    assert marks.seen("acme").marks["orders@prod"].number == 3


def test_to_forget_is_possible_and_explicit(marks: MemoryMarks) -> None:
    advance(marks, 3)
    assert marks.forget("acme")
    assert not marks.forget("acme")
    advance(marks, 1)


def test_the_oldest_marks_are_forgotten_and_never_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks_module, "MARKS_MAX", 3)
    marks = MemoryMarks()
    advance(marks, 1, name=REVOCATIONS)
    for name in ("a@t", "b@t", "c@t"):
        advance(marks, 1, name=name)
    advance(marks, 2, name="a@t")
    advance(marks, 1, name="d@t")
    assert list(marks.seen("acme").marks) == [REVOCATIONS, "c@t", "a@t", "d@t"]


@given(
    marks=st.dictionaries(
        st.text(min_size=1, max_size=9),
        st.builds(Mark, st.integers(1, 99), st.just(A), st.just(KEYS)),
        max_size=5,
    ),
    newest=st.none() | times,
)
def test_a_file_says_what_was_written(marks: dict[str, Mark], newest: dt.datetime | None) -> None:
    seen = Seen(marks, newest)
    again = read_seen(seen_bytes(seen))
    assert again == seen
    assert list(again.marks) == list(marks)


def test_every_changed_bit_and_every_truncation_is_refused() -> None:
    body = seen_bytes(Seen({"orders@prod": Mark(3, A, KEYS)}, NOW))
    for position in range(len(body) * 8):
        changed = bytearray(body)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(StrictJsonError):
            read_seen(bytes(changed))
    for length in range(len(body)):
        with pytest.raises(StrictJsonError):
            read_seen(body[:length])


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff", b"[]"])
def test_a_damaged_file_refuses_its_tenant_alone(body: bytes, tmp_path: Path) -> None:
    marks = FileMarks(tmp_path)
    advance(marks, 3)
    (tmp_path / "acme.json").write_bytes(body)
    for marks_again in (marks, FileMarks(tmp_path)):
        with pytest.raises(PolicyRefusedError, match=r"damaged .*restore it, or remove it"):
            advance(marks_again, 4)
        with pytest.raises(PolicyRefusedError):
            marks_again.seen("acme")
    marks.advance("globex", "orders@prod", Mark(1, A, KEYS), issued=NOW, trusted=KEYS)


def test_another_process_sees_the_mark_at_once(tmp_path: Path) -> None:
    first, second = FileMarks(tmp_path), FileMarks(tmp_path)
    for number in range(1, 30, 2):
        advance(first, number)
        advance(second, number + 1)
        with pytest.raises(RollbackError):
            advance(first, number)


def test_a_directory_that_cannot_be_written_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyRefusedError):
        advance(FileMarks(tmp_path / "file" / "marks"), 1)


def test_a_crash_between_write_and_rename_leaves_the_mark_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = FileMarks(tmp_path)
    advance(marks, 3)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(marks_module.os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        advance(marks, 4)
    monkeypatch.undo()
    assert FileMarks(tmp_path).seen("acme").marks["orders@prod"].number == 3
    advance(FileMarks(tmp_path), 4)


def _believe(directory: str, seed: int, out: "multiprocessing.Queue[list[int]]") -> None:
    rng, believed, marks = random.Random(seed), [], FileMarks(directory)
    for _ in range(40):
        number = rng.randint(1, 500)
        try:
            advance(marks, number)
        except RegistryError:
            continue
        believed.append(number)
    out.put(believed)


def test_what_many_processes_believe_only_goes_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    out: multiprocessing.Queue[list[int]] = context.Queue()
    workers = [context.Process(target=_believe, args=(str(tmp_path), seed, out)) for seed in range(4)]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert all(numbers == sorted(numbers) for numbers in found)
    highest = max(number for numbers in found for number in numbers)
    assert FileMarks(tmp_path).seen("acme").marks["orders@prod"].number == highest


def test_threads_cannot_slip_an_older_one_in() -> None:
    marks, believed, lock = MemoryMarks(), [], threading.Lock()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            number = rng.randint(1, 10_000)
            with lock:  # the order of belief is the order of the list
                try:
                    advance(marks, number)
                except RollbackError:
                    continue
                believed.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert believed == sorted(believed)


def test_each_registry_has_marks_of_its_own(tmp_path: Path) -> None:
    one, two = (marks_directory(tmp_path, url) for url in ("s3://a/x", "s3://a/y"))
    assert one != two
    assert one.parent == two.parent
