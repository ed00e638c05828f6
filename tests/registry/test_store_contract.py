"""The contract of a store, run on every backend."""

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex_registry.errors import (
    DamagedError,
    DigestMismatchError,
    InvalidReferenceError,
    KeyAbsentError,
    KeyConflictError,
    StoreUnavailableError,
)
from loraplex_registry.manifest import FileEntry
from loraplex_registry.store import Item, Store, open_store, write_conditionally


def make_blob(path: Path, size: int) -> FileEntry:
    body = os.urandom(size)
    path.write_bytes(body)
    return FileEntry(path.name, size, hashlib.sha256(body).hexdigest())


def test_an_object_reads_back_with_an_etag_that_follows_its_bytes(store: Store) -> None:
    first = store.create("t/a.json", b"one")
    item = store.get("t/a.json", limit_bytes=10)
    assert (item.body, item.etag) == (b"one", first)
    second = store.swap("t/a.json", b"two", etag=first)
    assert second != first
    assert store.get("t/a.json", limit_bytes=10).body == b"two"


def test_an_absent_object_is_said_to_be_absent(store: Store) -> None:
    with pytest.raises(KeyAbsentError):
        store.get("t/none.json", limit_bytes=10)
    with pytest.raises(KeyAbsentError):
        list(store.read_blob("t/none", size_bytes=10))


def test_an_object_longer_than_the_limit_is_refused(store: Store) -> None:
    store.create("t/a.json", b"0123456789")
    assert store.get("t/a.json", limit_bytes=10).body == b"0123456789"
    with pytest.raises(DamagedError):
        store.get("t/a.json", limit_bytes=9)


def test_create_never_replaces(store: Store) -> None:
    store.create("t/a.json", b"one")
    with pytest.raises(KeyConflictError):
        store.create("t/a.json", b"two")
    assert store.get("t/a.json", limit_bytes=10).body == b"one"


def test_swap_wants_the_state_it_was_told(store: Store) -> None:
    old = store.create("t/a.json", b"one")
    store.swap("t/a.json", b"two", etag=old)
    with pytest.raises(KeyConflictError):
        store.swap("t/a.json", b"three", etag=old)
    with pytest.raises(KeyConflictError):
        store.swap("t/gone.json", b"x", etag=old)
    with pytest.raises(KeyConflictError):
        store.swap("u/v/gone.json", b"x", etag=old)
    assert store.get("t/a.json", limit_bytes=10).body == b"two"


@pytest.mark.parametrize("kind", ["create", "swap"])
def test_of_many_writers_exactly_one_wins(kind: str, store: Store) -> None:
    etag = store.create("t/swap.json", b"start")
    barrier, winners = threading.Barrier(16), []

    def write(number: int) -> None:
        barrier.wait()
        try:
            if kind == "create":
                store.create("t/create.json", b"writer %d" % number)
            else:
                store.swap("t/swap.json", b"writer %d" % number, etag=etag)
        except KeyConflictError:
            return
        winners.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert store.get(f"t/{kind}.json", limit_bytes=100).body == b"writer %d" % winners[0]


@pytest.mark.parametrize("size", [1, (1 << 20) + 7, (17 << 20) + 3])
def test_a_blob_reads_back_in_bounded_chunks(size: int, store: Store, tmp_path: Path) -> None:
    file = make_blob(tmp_path / "blob", size)
    told: list[int] = []
    assert store.put_blob("t/b/0", tmp_path / "blob", file, progress=told.append) == 1
    digest, longest, total = hashlib.sha256(), 0, 0
    for chunk in store.read_blob("t/b/0", size_bytes=size):
        digest.update(chunk)
        longest, total = max(longest, len(chunk)), total + len(chunk)
    assert (digest.hexdigest(), total) == (file.sha256, size)
    assert longest <= 1 << 20
    assert sum(told) == size


def test_a_blob_may_be_sent_again(store: Store, tmp_path: Path) -> None:
    file = make_blob(tmp_path / "blob", 100)
    for _ in range(2):
        store.put_blob("t/b/0", tmp_path / "blob", file)
    assert b"".join(store.read_blob("t/b/0", size_bytes=100)) == (tmp_path / "blob").read_bytes()


@pytest.mark.parametrize("signed", [99, 101])
def test_a_blob_of_another_size_than_signed_is_refused(signed: int, store: Store, tmp_path: Path) -> None:
    store.put_blob("t/b/0", tmp_path / "blob", make_blob(tmp_path / "blob", 100))
    with pytest.raises(DigestMismatchError):
        list(store.read_blob("t/b/0", size_bytes=signed))


def test_a_file_that_changed_before_its_upload_is_not_stored(store: Store, tmp_path: Path) -> None:
    file = make_blob(tmp_path / "blob", 100)
    (tmp_path / "blob").write_bytes(b"x" * 100)
    with pytest.raises(DigestMismatchError, match="changed"):
        store.put_blob("t/b/0", tmp_path / "blob", file)
    with pytest.raises(KeyAbsentError):
        list(store.read_blob("t/b/0", size_bytes=100))


def test_children_are_the_names_of_one_level_in_order(store: Store) -> None:
    for key in ("t/b/x.json", "t/b/y/z.json", "t/a.json", "t/bc/1.json", "u/1.json"):
        store.create(key, b"x")
    assert list(store.children("t/")) == ["a.json", "b/", "bc/"]
    assert list(store.children("t/b/")) == ["x.json", "y/"]
    assert list(store.children("nothing/")) == []


def test_swapping_leaves_nothing_else_to_be_listed(store: Store) -> None:
    store.swap("t/a.json", b"two", etag=store.create("t/a.json", b"one"))
    assert list(store.children("t/")) == ["a.json"]


def test_two_stores_at_one_address_see_each_other(new_store: Callable[[], Store]) -> None:
    one = new_store()
    two = open_store(one.url)
    etag = one.create("t/a.json", b"one")
    assert two.get("t/a.json", limit_bytes=10).etag == etag
    two.swap("t/a.json", b"two", etag=etag)
    with pytest.raises(KeyConflictError):
        one.swap("t/a.json", b"three", etag=etag)


def test_a_conditional_write_returns_the_etag_to_swap_by(store: Store) -> None:
    etag = write_conditionally(store, "t/a.json", b"one", etag=None)
    write_conditionally(store, "t/a.json", b"two", etag=etag)
    with pytest.raises(KeyConflictError):
        write_conditionally(store, "t/a.json", b"three", etag=etag)


@pytest.mark.parametrize("url", ["", "http://x/y", "s3:///x", "file://host/x", "s3://b/x?y=1", "ftp:x"])
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidReferenceError):
        open_store(url)


class _LateStore:
    """Loses the reply of the first write and lets it take effect only when the second one arrives."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._late: tuple[str, bytes] | None = None
        self.writes = 0

    def create(self, key: str, body: bytes) -> str:
        self.writes += 1
        if self.writes == 1:
            self._late = (key, body)
            raise StoreUnavailableError("lost", ambiguous=True)
        assert self._late is not None
        self._store.create(*self._late)
        return self._store.create(key, body)

    def get(self, key: str, *, limit_bytes: int) -> Item:
        return self._store.get(key, limit_bytes=limit_bytes)


def test_a_write_that_takes_effect_late_is_known_as_ours(store: Store) -> None:
    late = _LateStore(store)
    etag = write_conditionally(late, "t/a.json", b"unique", etag=None)  # type: ignore[arg-type]
    assert late.writes == 2
    assert store.get("t/a.json", limit_bytes=10) == Item(b"unique", etag)


def test_a_rivals_write_after_a_lost_request_is_a_conflict(store: Store) -> None:
    class Rival(_LateStore):
        def create(self, key: str, body: bytes) -> str:
            if self.writes == 0:
                self.writes = 1
                store.create(key, b"rival")
                raise StoreUnavailableError("lost", ambiguous=True)
            return store.create(key, body)

    with pytest.raises(KeyConflictError):
        write_conditionally(Rival(store), "t/a.json", b"ours", etag=None)  # type: ignore[arg-type]
    assert store.get("t/a.json", limit_bytes=10).body == b"rival"
