"""Parallel verified downloads and the scan for NaN and infinity that rides on them."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_registry.delivery.download import (
    CHUNK_TRIES_MAX,
    CHUNKS_IN_FLIGHT,
    FAR_S,
    TAIL_BYTES,
    default_threads,
    download,
    matches,
)
from loraplex_registry.errors import DigestMismatchError, KeyAbsentError, StoreUnavailableError
from loraplex_registry.format.hashing import entry_of
from loraplex_registry.format.manifest import CHUNK_BYTES
from loraplex_registry.validation import scan as scanning
from loraplex_registry.validation.safetensors_header import Header, TensorEntry
from loraplex_registry.validation.scan import FiniteScan, WeightsScan

TYPES = {"F16": (2, "<u2", 0x7C00), "BF16": (2, "<u2", 0x7F80), "F32": (4, "<u4", 0x7F800000)}


class Blob:
    """A stored body that counts requests and breaks off where it is told, once per start."""

    def __init__(
        self, body: bytes, *, piece_bytes: int = 300_000, breaks: dict[int, int] | None = None
    ) -> None:
        self.body = body
        self.piece_bytes = piece_bytes
        self.breaks = dict(breaks or {})
        self.requests: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def read(self, start: int, length: int) -> Iterator[memoryview]:
        with self._lock:
            self.requests.append((start, length))
            broken = self.breaks.get(start, 0) > 0
            self.breaks[start] = self.breaks.get(start, 0) - 1
        buffer = bytearray(self.piece_bytes)
        for offset in range(start, start + length, self.piece_bytes):
            piece = self.body[offset : min(offset + self.piece_bytes, start + length)]
            buffer[: len(piece)] = piece
            if broken:
                yield memoryview(b"\xff" * len(piece))
                raise StoreUnavailableError("broke off")
            yield memoryview(buffer)[: len(piece)]


def fetched(blob: Blob, body: bytes, path: Path, **options: object) -> bytes:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        download(blob.read, entry_of("f", body), descriptor, what="f", **options)  # type: ignore[arg-type]
    finally:
        os.close(descriptor)
    return path.read_bytes()


@pytest.mark.parametrize(
    "size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + TAIL_BYTES + 1]
)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_download_is_the_signed_bytes(size: int, threads: int, tmp_path: Path) -> None:
    body = np.random.default_rng(size).bytes(size)
    told: list[int] = []
    assert fetched(Blob(body), body, tmp_path / "f", threads=threads, progress=told.append) == body
    assert sum(told) == size


def test_a_short_last_chunk_costs_no_request_of_its_own(tmp_path: Path) -> None:
    for tail, requests in ((TAIL_BYTES, 1), (TAIL_BYTES + 1, 2)):
        body = bytes(CHUNK_BYTES + tail)
        blob = Blob(body)
        assert fetched(blob, body, tmp_path / str(tail)) == body
        assert len(blob.requests) == requests


@pytest.mark.parametrize("place", [0, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES - 1, 2 * CHUNK_BYTES + 7])
def test_one_wrong_bit_anywhere_is_refused(place: int, tmp_path: Path) -> None:
    body = np.random.default_rng(1).bytes(2 * CHUNK_BYTES + 8)
    wrong = bytearray(body)
    wrong[place] ^= 1
    with pytest.raises(DigestMismatchError):
        fetched(Blob(bytes(wrong)), body, tmp_path / "f")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_range_of_another_length_is_refused(change: int, tmp_path: Path) -> None:
    body = bytes(CHUNK_BYTES)

    def read(start: int, length: int) -> Iterator[bytes]:
        yield bytes(length + change)

    with pytest.raises(DigestMismatchError):
        download(read, entry_of("f", body), None, what="f")


def test_a_chunk_that_breaks_off_is_asked_for_again_and_only_that_one(tmp_path: Path) -> None:
    body = np.random.default_rng(2).bytes(3 * CHUNK_BYTES)
    blob = Blob(body, breaks={CHUNK_BYTES: CHUNK_TRIES_MAX - 1})
    assert fetched(blob, body, tmp_path / "f") == body
    starts = [start for start, _ in blob.requests]
    assert starts.count(CHUNK_BYTES) == CHUNK_TRIES_MAX
    assert starts.count(0) == 1
    with pytest.raises(StoreUnavailableError):
        fetched(Blob(body, breaks={CHUNK_BYTES: CHUNK_TRIES_MAX}), body, tmp_path / "g")


def test_an_absent_blob_ends_the_download_at_once(tmp_path: Path) -> None:
    asked = []

    def read(start: int, length: int) -> Iterator[bytes]:
        asked.append(start)
        raise KeyAbsentError("gone")
        yield b""

    with pytest.raises(KeyAbsentError):
        download(read, entry_of("f", bytes(20 * CHUNK_BYTES)), None, what="f", threads=2)
    assert len(asked) <= 2


@pytest.mark.parametrize("far", [False, True])
def test_more_chunks_are_asked_for_at_once_when_the_storage_is_far(far: bool, tmp_path: Path) -> None:
    body = bytes(12 * CHUNK_BYTES)
    blob, together = Blob(body, piece_bytes=CHUNK_BYTES), [0]
    under_way, lock = [0], threading.Lock()

    def read(start: int, length: int) -> Iterator[memoryview]:
        with lock:
            under_way[0] += 1
            together[0] = max(together[0], under_way[0])
        time.sleep(4 * FAR_S if far else 0)
        try:
            yield from blob.read(start, length)
        finally:
            with lock:
                under_way[0] -= 1

    with pytest.MonkeyPatch.context() as patch:
        if not far:  # a busy machine must not look like a far storage
            patch.setattr("loraplex_registry.delivery.download.FAR_S", 60.0)
        download(read, entry_of("f", body), None, what="f")
    assert (together[0] == CHUNKS_IN_FLIGHT) if far else (together[0] <= default_threads())


def test_a_file_is_matched_by_its_bytes(tmp_path: Path) -> None:
    body = np.random.default_rng(3).bytes(CHUNK_BYTES + 5)
    for name, found, right in (("a", body, True), ("b", body[:-1] + b"!", False), ("c", body[:-1], False)):
        (tmp_path / name).write_bytes(found)
        with (tmp_path / name).open("rb") as file:
            assert matches(file.fileno(), entry_of("f", body)) is right


@pytest.mark.parametrize("chunk", range(6))
def test_a_request_for_several_chunks_that_breaks_off_goes_on_with_the_chunk_that_broke(
    chunk: int, tmp_path: Path
) -> None:
    """What looks at the chunks sees each accepted once, and the progress adds up."""
    body = np.random.default_rng(4).bytes(5 * CHUNK_BYTES + 600_000)
    accepted: list[int] = []

    class Chunk:
        def __init__(self, offset: int) -> None:
            self.offset = offset

        def feed(self, piece: object) -> None:
            pass

        def accept(self) -> None:
            accepted.append(self.offset)

    class Look:
        def begin(self) -> None:
            pass

        def chunk(self, offset: int) -> Chunk:
            return Chunk(offset)

        def abandon(self) -> None:
            pass

    broken = {chunk * CHUNK_BYTES + 500_000}
    asked: list[tuple[int, int]] = []

    def read(start: int, length: int) -> Iterator[bytes]:
        asked.append((start, length))
        for offset in range(start, start + length, 100_000):
            if any(offset <= place < offset + 100_000 for place in broken):
                broken.clear()
                raise StoreUnavailableError("broke off")
            yield body[offset : min(offset + 100_000, start + length)]

    told: list[int] = []
    descriptor = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    try:
        entry = entry_of("f", body)
        download(read, entry, descriptor, what="f", look=Look(), progress=told.append, threads=1)
    finally:
        os.close(descriptor)
    assert (tmp_path / "f").read_bytes() == body
    assert sorted(accepted) == [index * CHUNK_BYTES for index in range(6)]
    assert sum(told) == len(body)
    end = len(body)
    requests = {
        0: [(0, CHUNK_BYTES), (0, CHUNK_BYTES), (CHUNK_BYTES, end - CHUNK_BYTES)],
        1: [(0, CHUNK_BYTES), (CHUNK_BYTES, end - CHUNK_BYTES), (CHUNK_BYTES, end - CHUNK_BYTES)],
    }
    begin = chunk * CHUNK_BYTES
    assert asked == requests.get(chunk, [*requests[1][:2], (begin, end - begin)])


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_exactly_the_tensors_with_nan_or_infinity_are_found_however_the_file_is_cut(
    data: st.DataObject,
) -> None:
    """Compared with a plain look at every number."""
    kinds = data.draw(
        st.lists(st.tuples(st.sampled_from(sorted(TYPES)), st.integers(1, 9)), min_size=1, max_size=6)
    )
    offset = data.draw(st.integers(8, 23))
    body, tensors, bad = bytearray(offset), [], []
    for index, (dtype, count) in enumerate(kinds):
        width, kind, exponent = TYPES[dtype]
        edge = (
            exponent,
            exponent - 1,
            exponent | 1,
            0,
            exponent << 1 & 0xFFFF,
            exponent | 1 << 8 * width - 1,
        )
        numbers = data.draw(st.lists(st.sampled_from(edge), min_size=count, max_size=count))
        if any(number & exponent == exponent for number in numbers):
            bad.append(f"t{index}")
        begin = len(body) - offset
        body += np.array(numbers, dtype=kind).tobytes()
        tensors.append(TensorEntry(f"t{index}", dtype, (count, 1), begin, len(body) - offset))
    scan = FiniteScan(Header(tuple(tensors), offset, {}))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=5)))
    spans = list(zip([0, *cuts], [*cuts, len(body)], strict=True))
    for begin, end in data.draw(st.permutations(spans)):
        chunk = scan.chunk(begin)
        step = data.draw(st.integers(1, 7))
        for start in range(begin, end, step):
            chunk.feed(bytes(body[start : min(start + step, end)]))
        scan.accept(chunk)
    assert scan.bad_tensor() == (bad[0] if bad else None)


@given(numbers=st.binary(min_size=4, max_size=64), dtype=st.sampled_from(sorted(TYPES)))
def test_the_quick_look_never_misses_a_number_that_is_not_finite(numbers: bytes, dtype: str) -> None:
    width, kind, exponent = TYPES[dtype]
    numbers = numbers[: len(numbers) // width * width]
    bits = np.frombuffer(numbers, kind)
    if bool(((bits & exponent) == exponent).any()):
        assert scanning._suspicious(numbers, scanning._FLOATS[dtype])


def test_a_header_from_a_try_that_broke_off_does_not_count() -> None:
    parsed: list[bytes] = []

    def parse(head: bytes) -> Header:
        parsed.append(head)
        return Header((TensorEntry("t", "F16", (2, 1), 0, 4),), len(head), {})

    look = WeightsScan(parse, header_bytes_max=100)
    first = look.chunk(0)
    first.feed((2).to_bytes(8, "little") + b"{}" + bytes(4))
    again = look.chunk(0)
    with pytest.raises(StoreUnavailableError):
        again.feed((2).to_bytes(8, "little") + b"[]" + bytes(4))
    assert len(parsed) == 1


def test_the_entry_of_a_file_is_what_is_downloaded() -> None:
    body = bytes(CHUNK_BYTES + 1)
    assert entry_of("f", body).chunk_digests[1] == hashlib.sha256(b"\0").hexdigest()
