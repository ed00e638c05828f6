"""The contract of a store, run on every backend, and on S3 while one request in ten is lost, broken or refused."""

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_registry.errors import (
    DamagedError,
    DigestMismatchError,
    InvalidReferenceError,
    KeyAbsentError,
    KeyConflictError,
    StoreRefusedError,
    StoreUnavailableError,
)
from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.storage.store import (
    CHUNK_BYTES,
    CountingStore,
    Item,
    Store,
    is_name,
    open_store,
    write_conditionally,
)
from tests.registry.blobs import read_blob
from tests.registry.conftest import make_store
from tests.registry.sure_store import SureStore
from tests.sim import s3_proxy

FAULTS = tuple(kind for kind in s3_proxy.ALL if kind != s3_proxy.ERROR_403)
FAULT_RATE = 0.1


@pytest.fixture(params=["memory", "local", "s3", "s3 through faults"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Makes an empty store of each kind; shadows the fixture of the other modules."""
    if request.param != "s3 through faults":
        yield lambda: make_store(request, request.param, tmp_path)
        return
    proxy = request.getfixturevalue("proxy")
    seed = zlib.crc32(request.node.nodeid.encode())
    print(f"faults of seed {seed}")

    def make() -> Store:
        return SureStore(make_store(request, "s3", tmp_path, endpoint_url=proxy.url))

    proxy.use(s3_proxy.seeded(seed, FAULT_RATE, FAULTS))
    yield make
    proxy.use(s3_proxy.script())


def make_blob(path: Path, size: int) -> FileEntry:
    body = os.urandom(size)
    path.write_bytes(body)
    return FileEntry(path.name, size, hashlib.sha256(body).hexdigest())


def put(store: Store, key: str, tmp_path: Path, size: int = 100) -> bytes:
    """Store random bytes as a blob and return them."""
    file = make_blob(tmp_path / "blob", size)
    store.put_blob(key, tmp_path / "blob", file)
    return (tmp_path / "blob").read_bytes()


def read(store: Store, key: str, start: int, length: int, size_bytes: int) -> bytes:
    pieces = store.read_range(key, start=start, length=length, size_bytes=size_bytes)
    return b"".join(bytes(piece) for piece in pieces)


# Objects


def test_an_object_reads_back_with_an_etag_that_follows_its_bytes(store: Store) -> None:
    first = store.create("t/a.json", b"one")
    item = store.get("t/a.json", limit_bytes=10)
    assert (item.body, item.etag) == (b"one", first)
    second = store.swap("t/a.json", b"two", etag=first)
    assert second != first
    assert store.get("t/a.json", limit_bytes=10) == Item(b"two", second)


@pytest.mark.parametrize("body", [b"", b"\0", bytes(range(256)) * 4096], ids=["empty", "nul", "1 MiB"])
def test_an_object_may_hold_any_bytes(body: bytes, store: Store) -> None:
    etag = store.create("t/a.json", body)
    assert store.get("t/a.json", limit_bytes=1 << 20) == Item(body, etag)


def test_an_absent_object_is_said_to_be_absent(store: Store) -> None:
    with pytest.raises(KeyAbsentError):
        store.get("t/none.json", limit_bytes=10)
    with pytest.raises(KeyAbsentError):
        store.changed("t/none.json", etag='"x"', limit_bytes=10)
    with pytest.raises(KeyAbsentError):
        list(read_blob(store, "t/none", size_bytes=10))


def test_an_object_longer_than_the_limit_is_refused(store: Store) -> None:
    etag = store.create("t/a.json", b"0123456789")
    assert store.get("t/a.json", limit_bytes=10).body == b"0123456789"
    with pytest.raises(DamagedError):
        store.get("t/a.json", limit_bytes=9)
    store.swap("t/a.json", b"9876543210", etag=etag)
    with pytest.raises(DamagedError):
        store.changed("t/a.json", etag=etag, limit_bytes=9)


def test_a_conditional_read_brings_only_what_changed(store: Store) -> None:
    first = store.create("t/a.json", b"one")
    assert store.changed("t/a.json", etag=first, limit_bytes=10) is None
    second = store.swap("t/a.json", b"two", etag=first)
    assert store.changed("t/a.json", etag=first, limit_bytes=10) == Item(b"two", second)
    assert store.changed("t/a.json", etag=second, limit_bytes=10) is None


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
    assert store.get("t/a.json", limit_bytes=10).body == b"two"


@pytest.mark.parametrize("key", ["t/gone.json", "u/v/gone.json"])
def test_swap_of_what_is_not_there_makes_nothing(key: str, store: Store) -> None:
    old = store.create("t/a.json", b"one")
    with pytest.raises(KeyConflictError):
        store.swap(key, b"two", etag=old)
    with pytest.raises(KeyAbsentError):
        store.get(key, limit_bytes=10)


def test_an_etag_is_good_for_its_own_state_only(store: Store) -> None:
    one, two = store.create("t/a.json", b"one"), store.create("t/b.json", b"two")
    with pytest.raises(KeyConflictError):
        store.swap("t/a.json", b"three", etag=two)
    store.swap("t/a.json", b"three", etag=one)


def test_objects_with_one_name_within_the_other_do_not_meet(store: Store) -> None:
    store.create("t/a", b"1")
    store.create("t/a.json", b"2")
    store.create("t/ab/c", b"3")
    assert [store.get(key, limit_bytes=1).body for key in ("t/a", "t/a.json", "t/ab/c")] == [b"1", b"2", b"3"]


def test_a_write_is_seen_by_everybody_at_once(new_store: Callable[[], Store]) -> None:
    one = new_store()
    two = open_store(one.url)
    etag = one.create("t/a.json", b"one")
    assert two.get("t/a.json", limit_bytes=10).etag == etag
    assert list(two.children("t/")) == ["a.json"]
    two.swap("t/a.json", b"two", etag=etag)
    assert one.get("t/a.json", limit_bytes=10).body == b"two"
    with pytest.raises(KeyConflictError):
        one.swap("t/a.json", b"three", etag=etag)


def test_stores_at_different_places_do_not_see_each_other(new_store: Callable[[], Store]) -> None:
    one, two = new_store(), new_store()
    one.create("t/a.json", b"one")
    assert list(two.children("t/")) == []
    two.create("t/a.json", b"two")
    assert one.get("t/a.json", limit_bytes=10).body == b"one"


def test_reads_see_some_writers_bytes_whole_while_they_change(store: Store) -> None:
    bodies = [bytes([65 + number]) * 5000 for number in range(6)]
    etag, stop, seen = store.create("t/a.json", bodies[0]), threading.Event(), set()

    def watch() -> None:
        while not stop.is_set():
            seen.add(store.get("t/a.json", limit_bytes=5000).body)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for body in bodies[1:]:
        etag = store.swap("t/a.json", body, etag=etag)
    stop.set()
    watcher.join()
    assert seen <= set(bodies)


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


# Keys


BAD_KEYS = [
    "",
    "/etc/passwd",
    "../x",
    "t/../../x",
    "t//x",
    "t/.hidden",
    "t/x\0",
    "t/x/",
    "t\\x",
    "t/ü",
    "t/" + "x" * 129,
]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_is_no_path_of_names_is_refused_by_every_method(
    key: str, store: Store, tmp_path: Path
) -> None:
    file = make_blob(tmp_path / "blob", 1)
    calls: list[Callable[[], object]] = [
        lambda: store.get(key, limit_bytes=10),
        lambda: store.changed(key, etag="x", limit_bytes=10),
        lambda: store.create(key, b"x"),
        lambda: store.swap(key, b"x", etag="x"),
        lambda: store.put_blob(key, tmp_path / "blob", file),
        lambda: list(store.read_range(key, start=0, length=1, size_bytes=1)),
        lambda: store.delete_blobs([key]),
    ]
    for call in calls:
        with pytest.raises(InvalidReferenceError):
            call()


@pytest.mark.parametrize("prefix", ["/", "t", "../", "t//", "t/../"])
def test_a_prefix_that_is_no_level_is_refused(prefix: str, store: Store) -> None:
    with pytest.raises(InvalidReferenceError):
        list(store.children(prefix))
    with pytest.raises(InvalidReferenceError):
        list(store.blobs(prefix))


@pytest.mark.parametrize("key", ["t/a.b-c_d~e/x.json", "T/A", "0/1/2/3/4/5/6/7/8/9", "t/" + "x" * 128])
def test_every_key_that_is_allowed_works(key: str, store: Store) -> None:
    store.create(key, b"one")
    assert store.get(key, limit_bytes=3).body == b"one"
    assert [found.key for found in store.blobs("")] == [key]


# Blobs


@pytest.mark.parametrize("size", [1, (1 << 20) + 7, (17 << 20) + 3])
def test_a_blob_reads_back_in_bounded_pieces(size: int, store: Store, tmp_path: Path) -> None:
    file = make_blob(tmp_path / "blob", size)
    told: list[int] = []
    assert store.put_blob("t/b/0", tmp_path / "blob", file, progress=told.append) == 1
    digest, longest, total = hashlib.sha256(), 0, 0
    for chunk in read_blob(store, "t/b/0", size_bytes=size):
        digest.update(chunk)
        longest, total = max(longest, len(chunk)), total + len(chunk)
    assert (digest.hexdigest(), total) == (file.sha256, size)
    assert longest <= CHUNK_BYTES
    assert sum(told) == size


def test_an_empty_blob_is_a_blob(store: Store, tmp_path: Path) -> None:
    assert put(store, "t/b/0", tmp_path, 0) == b""
    assert list(read_blob(store, "t/b/0", size_bytes=0)) == []
    with pytest.raises(KeyAbsentError):
        list(read_blob(store, "t/b/1", size_bytes=0))
    with pytest.raises(DigestMismatchError):
        list(read_blob(store, "t/b/0", size_bytes=1))


def test_an_empty_blob_was_signed_but_another_lies_there(store: Store, tmp_path: Path) -> None:
    put(store, "t/b/0", tmp_path)
    with pytest.raises(DigestMismatchError):
        list(read_blob(store, "t/b/0", size_bytes=0))


def test_any_range_of_a_blob_can_be_read(store: Store, tmp_path: Path) -> None:
    size = 3 * CHUNK_BYTES + 5
    body = put(store, "t/b/0", tmp_path, size)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.integers(0, size - 1), st.integers(1, size))
    def check(start: int, length: int) -> None:
        length = min(length, size - start)
        assert read(store, "t/b/0", start, length, size) == body[start : start + length]

    check()


@pytest.mark.parametrize(
    ("start", "length"), [(-1, 2), (0, 101), (100, 1), (50, 51), (0, 0), (3, 0), (0, -1)]
)
def test_a_range_outside_the_blob_is_refused(start: int, length: int, store: Store, tmp_path: Path) -> None:
    put(store, "t/b/0", tmp_path)
    with pytest.raises(InvalidReferenceError):
        read(store, "t/b/0", start, length, 100)


def test_a_blob_may_be_sent_again(store: Store, tmp_path: Path) -> None:
    file = make_blob(tmp_path / "blob", 100)
    for _ in range(2):
        store.put_blob("t/b/0", tmp_path / "blob", file)
    assert read(store, "t/b/0", 0, 100, 100) == (tmp_path / "blob").read_bytes()


@pytest.mark.parametrize("signed", [1, 99, 101, 10**9])
def test_a_blob_of_another_size_than_signed_is_refused(signed: int, store: Store, tmp_path: Path) -> None:
    put(store, "t/b/0", tmp_path)
    with pytest.raises(DigestMismatchError):
        list(read_blob(store, "t/b/0", size_bytes=signed))
    with pytest.raises(DigestMismatchError):
        read(store, "t/b/0", signed - 1, 1, signed)


def test_a_file_that_changed_before_its_upload_is_not_stored(store: Store, tmp_path: Path) -> None:
    file = make_blob(tmp_path / "blob", 100)
    for changed in (b"x" * 100, b"x" * 99, b"x" * 101):
        (tmp_path / "blob").write_bytes(changed)
        with pytest.raises(DigestMismatchError, match="changed"):
            store.put_blob("t/b/0", tmp_path / "blob", file)
    with pytest.raises(KeyAbsentError):
        list(read_blob(store, "t/b/0", size_bytes=100))
    assert list(store.blobs("")) == []


def test_many_threads_may_read_one_blob(store: Store, tmp_path: Path) -> None:
    size = 1_000_000
    body, wrong = put(store, "t/b/0", tmp_path, size), []

    def check(start: int) -> None:
        if read(store, "t/b/0", start, size - start, size) != body[start:]:
            wrong.append(start)

    threads = [threading.Thread(target=check, args=(number * 1000,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_reader_may_stop_in_the_middle(store: Store, tmp_path: Path) -> None:
    size = 3 * CHUNK_BYTES
    body = put(store, "t/b/0", tmp_path, size)
    for _ in range(3):
        pieces = store.read_range("t/b/0", start=0, length=size, size_bytes=size)
        assert body.startswith(bytes(next(pieces)))
        pieces.close()  # type: ignore[attr-defined]
    assert read(store, "t/b/0", 0, size, size) == body


# Listings


def test_children_are_the_names_of_one_level_in_order(store: Store) -> None:
    for key in ("t/b/x.json", "t/b/y/z.json", "t/a.json", "t/bc/1.json", "u/1.json"):
        store.create(key, key.encode())
    assert list(store.children("t/")) == ["a.json", "b/", "bc/"]
    assert list(store.children("t/b/")) == ["x.json", "y/"]
    assert list(store.children("")) == ["t/", "u/"]
    assert list(store.children("nothing/")) == []
    assert list(store.children("t/a.json/")) == []
    for key in ("t/b", "t/a.json/x"):
        with pytest.raises(KeyAbsentError):
            store.get(key, limit_bytes=10)


ORDERED = ["A.json", "a-b/", "a.json", "a/", "a0/", "a0.json", "a~b", "b/"]


@pytest.mark.parametrize("after", ["", *ORDERED, "a", "aaa", "zzz", "0"])
def test_a_listing_can_be_taken_up_again(after: str, store: Store) -> None:
    for name in ORDERED:
        for leaf in ("1", "2") if name.endswith("/") else ("",):
            store.create(f"t/{name}{leaf}", (name + leaf).encode())
    assert list(store.children("t/", after=after)) == [name for name in sorted(ORDERED) if name > after]


def test_blobs_are_all_objects_below_with_size_and_time(store: Store, tmp_path: Path) -> None:
    began = time.time()
    put(store, "t/a/b/1~p/0", tmp_path, 7)
    put(store, "t/a/b/1~p/1", tmp_path, 0)
    put(store, "t/a/b/10~q/0", tmp_path, 9)
    store.create("t/a/v/1.json", b"record")
    store.create("t/ab/v/1.json", b"another")
    found = list(store.blobs("t/a/"))
    assert [(blob.key, blob.size) for blob in found] == [
        ("b/10~q/0", 9), ("b/1~p/0", 7), ("b/1~p/1", 0), ("v/1.json", 6)
    ]  # fmt: skip
    assert all(began - 5 <= blob.modified_s <= time.time() + 5 for blob in found)
    assert [blob.key for blob in store.blobs("t/a/b/1~p/")] == ["0", "1"]
    assert list(store.blobs("nothing/")) == []


def test_writing_again_makes_an_object_younger(store: Store) -> None:
    etag = store.create("t/a.json", b"one")
    first = next(store.blobs("t/")).modified_s
    time.sleep(1.1 if store.url.startswith("s3:") else 0.02)  # S3 counts whole seconds
    store.swap("t/a.json", b"two", etag=etag)
    assert next(store.blobs("t/")).modified_s > first


def test_listings_go_on_over_many_pages(store: Store, tmp_path: Path) -> None:
    names = [f"{number:05d}.json" for number in range(1005)]
    writer = open_store(store.url)  # past the proxy
    for name in names:
        writer.create(f"t/{name}", b"x")
    assert list(store.children("t/")) == names
    assert list(store.children("t/", after=names[2])) == names[3:]
    assert [blob.key for blob in store.blobs("")] == [f"t/{name}" for name in names]


def test_swapping_leaves_nothing_else_to_be_listed(store: Store) -> None:
    store.swap("t/a.json", b"two", etag=store.create("t/a.json", b"one"))
    assert list(store.children("t/")) == ["a.json"]
    assert [blob.key for blob in store.blobs("")] == ["t/a.json"]


# Deleting


def test_deleted_blobs_are_gone_and_the_others_stay(store: Store, tmp_path: Path) -> None:
    for key in ("t/b/1/0", "t/b/1/1", "t/b/2/0"):
        put(store, key, tmp_path)
    assert store.delete_blobs(["t/b/1/0", "t/b/1/1"]) == 1
    assert [blob.key for blob in store.blobs("")] == ["t/b/2/0"]
    assert list(store.children("t/b/")) == ["2/"]
    with pytest.raises(KeyAbsentError):
        list(read_blob(store, "t/b/1/0", size_bytes=100))


def test_deleting_what_is_gone_is_no_error(store: Store, tmp_path: Path) -> None:
    put(store, "t/b/1/0", tmp_path)
    for _ in range(2):
        store.delete_blobs(["t/b/1/0", "t/b/never/0"])
    assert store.delete_blobs([]) == 0
    body = put(store, "t/b/1/0", tmp_path)
    assert read(store, "t/b/1/0", 0, 100, 100) == body


@pytest.mark.parametrize(
    "key",
    [
        "t/acme/a/x/v/1.json",
        "t/b/a/x/v/1.json",
        "t/x/a/b/v/1.json",
        "registry.json",
        "b",
        "t/b",
        "t/x/a/b/tags/b.json",
    ],
)
def test_nothing_but_blobs_can_be_deleted(key: str, store: Store, tmp_path: Path) -> None:
    store.create(key, b"record")
    put(store, "u/b/1/0", tmp_path)
    with pytest.raises(InvalidReferenceError):
        store.delete_blobs(["u/b/1/0", key])
    assert {blob.key for blob in store.blobs("")} == {key, "u/b/1/0"}


def test_more_blobs_than_one_request_takes_are_deleted(store: Store) -> None:
    keys = [f"t/b/1/{number}" for number in range(1003)]
    for key in keys[::97]:
        store.create(key, key.encode())
    store.create("t/keep.json", b"x")
    assert store.delete_blobs(keys) in {1, 2}
    assert [blob.key for blob in store.blobs("")] == ["t/keep.json"]


# Writes with an unknown end


def test_a_conditional_write_returns_the_etag_to_swap_by(store: Store) -> None:
    etag = write_conditionally(store, "t/a.json", b"one", etag=None)
    write_conditionally(store, "t/a.json", b"two", etag=etag)
    with pytest.raises(KeyConflictError):
        write_conditionally(store, "t/a.json", b"three", etag=etag)


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
        return self._store.create(key, body + b"!")  # another body: this must be a conflict

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


def test_doubt_does_not_go_away_by_a_later_refusal(store: Store) -> None:
    """A lost request may still arrive, so the last word is "unknown" and not "refused"."""

    class Closing(_LateStore):
        def create(self, key: str, body: bytes) -> str:
            self.writes += 1
            raise (
                StoreUnavailableError("lost", ambiguous=True) if self.writes == 1 else StoreRefusedError("no")
            )

    closing = Closing(store)
    with pytest.raises(StoreUnavailableError) as caught:
        write_conditionally(closing, "t/a.json", b"ours", etag=None)  # type: ignore[arg-type]
    assert caught.value.ambiguous
    assert closing.writes == 2


def test_a_refusal_without_doubt_is_a_refusal(store: Store) -> None:
    class Closed(_LateStore):
        def create(self, key: str, body: bytes) -> str:
            raise StoreRefusedError("no")

    with pytest.raises(StoreRefusedError):
        write_conditionally(Closed(store), "t/a.json", b"ours", etag=None)  # type: ignore[arg-type]


def test_silence_ends_after_four_attempts_and_stays_unknown(store: Store) -> None:
    class Silent(_LateStore):
        def create(self, key: str, body: bytes) -> str:
            self.writes += 1
            raise StoreUnavailableError("lost", ambiguous=self.writes == 1)

    silent = Silent(store)
    with pytest.raises(StoreUnavailableError) as caught:
        write_conditionally(silent, "t/a.json", b"ours", etag=None)  # type: ignore[arg-type]
    assert caught.value.ambiguous
    assert silent.writes == 4


def test_a_conflict_with_our_own_earlier_copy_is_a_success(store: Store) -> None:
    class Twice(_LateStore):
        def create(self, key: str, body: bytes) -> str:
            store.create(key, body)
            raise KeyConflictError("a middle box sent it twice")

    etag = write_conditionally(Twice(store), "t/a.json", b"ours", etag=None)  # type: ignore[arg-type]
    assert store.get("t/a.json", limit_bytes=10) == Item(b"ours", etag)


# What stands in front of a store


def test_requests_are_counted(store: Store, tmp_path: Path) -> None:
    counting = CountingStore(store)
    counting.prepare()
    assert counting.requests == 0
    etag = counting.create("t/a.json", b"one")
    etag = counting.swap("t/a.json", b"two", etag=etag)
    counting.get("t/a.json", limit_bytes=10)
    counting.changed("t/a.json", etag=etag, limit_bytes=10)
    assert counting.requests == 4
    counting.put_blob("t/b/0", tmp_path / "blob", make_blob(tmp_path / "blob", 5))
    read(counting, "t/b/0", 0, 5, 5)
    assert list(counting.children("t/")) == ["a.json", "b/"]
    assert len(list(counting.blobs("t/"))) == 2
    counting.delete_blobs(["t/b/0"])
    assert counting.requests == 9
    assert counting.url == store.url


@pytest.mark.parametrize(
    "url", ["", "http://x/y", "s3:///x", "file://host/x", "s3://b/x?y=1", "ftp:x", "memory://x", "memory:x?y"]
)
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidReferenceError):
        open_store(url)


@given(st.text(max_size=12))
def test_a_name_never_leads_out_of_its_level(name: str) -> None:
    if is_name(name):
        assert "/" not in name
        assert name not in {".", ".."}
        assert not name.startswith(".")
        assert name.isascii()
