"""The books alone: laws that hold whatever is asked of them, in whatever order."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.adapters.books import DRAWING, Books, Record, State

MOVES = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(State), st.integers(1, 6)), max_size=60)


def attempt(books: Books[Record], digest: str, state: State, number: int) -> None:
    """One step that a correct user of the books may take; what is not possible now is left out."""
    record = books.get(digest)
    if record is None:
        ahead = number > 3
        record = Record(digest, wanted=not ahead, size_bytes=number, reserved=ahead)
        leaving = books.out_of_memory(record, number) if ahead else []
        if leaving is None:
            return
        drop(books, leaving)
        books.enter(record)
        return
    if state not in DRAWING[record.state]:
        books.used(record)
        record.pinned = record.pinned or (record.state is State.RESIDENT and books.may_pin(record))
        return
    if state is State.STAGED:
        leaving = books.out_of_memory(record, record.size_bytes)
        if leaving is None:
            return
        record.slot = False
        drop(books, leaving)
    unplaced = state is State.RESIDENT and not record.slot
    if unplaced and (record.state is State.DRAINING or not books.claim_slot(record)):
        return
    if state is State.DRAINING:
        record.pinned = False
    books.move(record, state)


def drop(books: Books[Record], leaving: list[Record]) -> None:
    for record in leaving:
        books.move(record, State.DRAINING)
        books.move(record, State.GONE)


@settings(max_examples=300, deadline=None)
@given(moves=MOVES, slots=st.integers(2, 3), memory=st.integers(0, 9), staged_max=st.integers(0, 3))
def test_slots_pins_and_memory_never_exceed_their_bounds(
    moves: list[tuple[int, State, int]], slots: int, memory: int, staged_max: int
) -> None:
    """Law: no way along the drawing, taken as `out_of_memory`, `claim_slot` and `may_pin` say, breaks a bound."""
    books: Books[Record] = Books(slots=slots, memory_bytes_max=memory, staged_max=staged_max)
    for name, state, number in moves:
        attempt(books, str(name), state, number)
        books.obey()
        staged = sum(record.size_bytes for record in books if record.state is State.STAGED)
        assert staged <= books.memory_bytes <= memory
        assert sum(record.state is State.STAGED for record in books) <= books.staged <= staged_max
        assert sum(record.state is State.RESIDENT for record in books) <= books.slots_used <= slots
        assert books.pins < slots


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_the_drawing_and_no_other_way(before: State, after: State) -> None:
    books: Books[Record] = Books(slots=2, memory_bytes_max=10, staged_max=9)
    record = Record("a", size_bytes=1)
    books.enter(record)
    record.state, record.slot = before, after is State.RESIDENT
    if after in DRAWING[before]:
        books.move(record, after)
        assert record.state is after
        assert (books.get("a") is None) == (after is State.GONE)
    else:
        with pytest.raises(AssertionError, match="never becomes"):
            books.move(record, after)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    busy=st.sets(st.integers(0, 7)),
    wanted=st.integers(1, 12),
)
def test_memory_is_freed_in_the_order_of_use_and_not_a_byte_more_than_needed(
    sizes: list[int], busy: set[int], wanted: int
) -> None:
    books: Books[Record] = Books(slots=2, memory_bytes_max=sum(sizes), staged_max=9)
    for number, size in enumerate(sizes):
        record = Record(str(number), size_bytes=size)
        books.enter(record)
        books.move(record, State.VERIFYING)
        books.move(record, State.STAGED)
        record.waiters = int(number in busy)
    idle = [(number, size) for number, size in enumerate(sizes) if number not in busy]
    leaving = books.out_of_memory(Record("new"), wanted)
    if leaving is None:
        assert sum(size for _, size in idle) < wanted
        return
    left = [(int(record.digest), record.size_bytes) for record in leaving]
    assert left == idle[: len(left)]
    assert sum(size for _, size in left) >= wanted
    assert sum(size for _, size in left[:-1]) < wanted


def test_what_was_used_later_never_leaves_memory_for_what_was_used_before_it() -> None:
    books: Books[Record] = Books(slots=2, memory_bytes_max=2, staged_max=9)
    old, new = Record("old", size_bytes=1), Record("new", size_bytes=2)
    for record in (old, new):
        books.enter(record)
        books.move(record, State.VERIFYING)
    books.move(new, State.STAGED)
    assert books.out_of_memory(old, 1) is None
    books.used(old)
    assert books.out_of_memory(old, 1) == [new]


def test_an_adapter_is_entered_once() -> None:
    books: Books[Record] = Books(slots=2, memory_bytes_max=0, staged_max=9)
    books.enter(Record("a"))
    with pytest.raises(AssertionError, match="already"):
        books.enter(Record("a"))
