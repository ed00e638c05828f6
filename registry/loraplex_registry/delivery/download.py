"""Downloading a file whose chunks have signed digests: in parallel, verified while the bytes are hot, read once.

Each chunk of `manifest.CHUNK_BYTES` is a unit of its own: one thread asks the store for its range, and hands every
piece to the hash, to the caller's `look`, and to its place in the target file, before it asks for the next piece.
Sockets, SHA-256 and file writes let other Python threads run, so two cores verify nearly twice as fast as one.

Promises: `download` returns only when every byte of the target is the signed one; a chunk that broke off is asked for
again, at most CHUNK_TRIES_MAX times in all; after the first failure no chunk goes on. What `look` finds counts only for
chunks whose digest was right. Nothing is synced: a file that a crash has torn is found by hashing it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import DigestMismatchError, StoreUnavailableError
from ..format.manifest import CHUNK_BYTES, FileEntry
from ..storage.store import Piece

CHUNK_TRIES_MAX: Final = 3
"""How often one chunk is asked for when the storage breaks off in the middle of it."""

CHUNKS_IN_FLIGHT: Final = 8
"""Most chunks of one file asked for at once. Each holds one buffer of at most 1 MiB."""

FAR_S: Final = 0.01
"""Seconds to a range's first piece from which the storage is far: then more chunks are asked for than there are cores.
"""

TAIL_BYTES: Final = 1 << 20
"""A last chunk of at most so many bytes is asked for together with the one before it."""

RANGE_BYTES: Final = 4 << 20
"""Bytes of one range of a blob that is needed in order."""

RANGES_AHEAD: Final = 4
"""Most ranges held or under way ahead of what was consumed."""

PIECES_AHEAD: Final = 4
"""Most decrypted pieces that wait to be verified."""

_READ_BYTES: Final = 512 << 10

ReadRange = Callable[[int, int], Iterator[Piece]]
"""Called with start and length in bytes; yields exactly those bytes (see `Store.read_range`)."""


class ChunkLook(Protocol):
    """Sees one chunk's bytes in order, on the thread that downloads it."""

    def feed(self, piece: Piece) -> None:
        """Take the next bytes, which are not known to be right yet."""

    def accept(self) -> None:
        """The chunk's digest is the signed one."""


class Look(Protocol):
    """Sees a file's bytes while they are downloaded."""

    def begin(self) -> None:
        """A download begins; forget what an earlier one showed."""

    def chunk(self, offset: int) -> ChunkLook:
        """Return what sees the chunk at `offset`; called anew for every try. The chunk at 0 is begun first."""

    def abandon(self) -> None:
        """The download failed; no chunk may wait for another any more."""


def download(
    read: ReadRange,
    file: FileEntry,
    target: int | None,
    *,
    what: str,
    look: Look | None = None,
    progress: Callable[[int], None] | None = None,
    threads: int | None = None,
) -> None:
    """Fill a new file with the bytes that were signed.

    Args:
        read: gives a range of the file.
        file: size and chunk digests, signed.
        target: descriptor of the empty file, open for writing; None to verify only.
        what: what the file is called in messages.
        look: sees the bytes on their way.
        progress: called with numbers of bytes newly done, 0 when a chunk is asked for again; never from two threads at
            once. What it raises ends the download.
        threads: chunks at once, 1 to CHUNKS_IN_FLIGHT; by default `default_threads()`, and CHUNKS_IN_FLIGHT as soon as
            a first piece was longer under way than FAR_S.

    Raises:
        DigestMismatchError: the store's bytes are not the signed ones.
        OSError: the disk.
        Others: what `read` and `look` raise.
    """
    if target is not None and file.size > CHUNK_BYTES:
        os.posix_fallocate(
            target, 0, file.size
        )  # few extents, and "disk full" before the download, not after it
    job = _Job(read, file, target, what=what, look=look, progress=progress, far_threads=threads)
    job.widen(threads or default_threads())
    job.work()
    job.join()
    if job.failure is not None:
        raise job.failure


def download_in_order(
    pieces: Iterator[Piece],
    file: FileEntry,
    target: int,
    *,
    what: str,
    look: Look | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """As `download`, of bytes that can only be had in order, as decryption gives them.

    Each chunk is hashed, looked at and written by a second thread while the next piece is made.

    Args:
        pieces: the whole file; each must stay as it is when the next is asked for.
        file: size and chunk digests, signed.
        target: descriptor of the empty file, open for writing.
        what: what the file is called in messages.
        look: sees the bytes on their way.
        progress: called with numbers of bytes newly done.

    Raises:
        As `download`, and what `pieces` raises.
    """
    whole = _InOrder(pieces, file.size)
    job = _Job(whole.read, file, target, what=what, look=look, progress=progress)
    if file.size > CHUNK_BYTES:
        os.posix_fallocate(target, 0, file.size)
    consumer = threading.Thread(target=job.work, name="loraplex-verify", daemon=True)
    consumer.start()
    whole.run(consumer)
    consumer.join()
    for failure in (whole.failure, job.failure):
        if failure is not None:
            raise failure


def in_order(read: ReadRange, size_bytes: int) -> Iterator[bytes]:
    """Yield a blob in order while ranges of it are downloaded ahead; at most RANGES_AHEAD of RANGE_BYTES are held.

    Raises:
        What `read` raises; StoreUnavailableError only after CHUNK_TRIES_MAX tries of one range.
    """
    starts = iter(range(0, size_bytes, RANGE_BYTES))
    with ThreadPoolExecutor(RANGES_AHEAD, thread_name_prefix="loraplex-download") as pool:
        ahead: deque[Future[list[bytes]]] = deque()

        def begin() -> None:
            start = next(starts, None)
            if start is not None:
                ahead.append(pool.submit(_range, read, start, min(RANGE_BYTES, size_bytes - start)))

        for _ in range(RANGES_AHEAD):
            begin()
        try:
            while ahead:
                pieces = ahead.popleft().result()
                begin()
                yield from pieces
        finally:
            for future in ahead:
                future.cancel()


def default_threads() -> int:
    """Return how many chunks to ask a near storage for at once: one per core, at least 2.

    More only wait for each other's hash: on two cores, 4 threads took 3 to 18 % more processor time than 2.
    """
    return min(CHUNKS_IN_FLIGHT, max(2, len(os.sched_getaffinity(0))))


def matches(descriptor: int, file: FileEntry) -> bool:
    """Say whether an open file holds exactly the signed bytes. Reads it once, its chunks in parallel."""
    if os.fstat(descriptor).st_size != file.size:
        return False
    try:
        download(lambda start, length: _read(descriptor, start, length), file, None, what=file.name)
    except (DigestMismatchError, StoreUnavailableError):
        return False
    return True


class _InOrder:
    """Hands pieces from the thread that makes them to the one that verifies them, PIECES_AHEAD at most."""

    def __init__(self, pieces: Iterator[Piece], size_bytes: int) -> None:
        self._pieces = pieces
        self._left = size_bytes
        self._queue: queue.Queue[Piece | None] = queue.Queue(PIECES_AHEAD)
        self._rest = memoryview(b"")
        self.failure: BaseException | None = None

    def run(self, consumer: threading.Thread) -> None:
        """Make all pieces, or stop as soon as the consumer has."""
        try:
            for piece in self._pieces:
                self._put(piece, consumer)
        except _StoppedError:
            return
        except BaseException as error:
            self.failure = error
        with contextlib.suppress(_StoppedError):
            self._put(None, consumer)

    def read(self, start: int, length: int) -> Iterator[Piece]:  # noqa: ARG002
        """Yield the next `length` bytes; chunks are asked for in order by one thread."""
        while length > 0:
            if not len(self._rest):
                piece = self._queue.get()
                if piece is None:
                    return
                self._rest = memoryview(piece)
            part = self._rest[:length]
            self._rest = self._rest[len(part) :]
            length -= len(part)
            yield part

    def _put(self, piece: Piece | None, consumer: threading.Thread) -> None:
        while True:
            try:
                self._queue.put(piece, timeout=0.1)
            except queue.Full:
                if not consumer.is_alive():
                    raise _StoppedError from None
            else:
                return


class _StoppedError(Exception):
    """The consumer ended before the pieces did."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighbouring chunks asked for in one request: where they begin, their bytes, their digests."""

    start: int
    length: int
    digests: tuple[str, ...]


def _spans(file: FileEntry) -> list[_Span]:
    """Cut a file into spans: every chunk is one, but a short last chunk goes with the one before it.

    A header makes a file of 8 MiB of weights a little longer than a chunk; that is not worth a request of its own.
    """
    digests = file.chunk_digests
    count = len(digests)
    if count > 1 and file.size - (count - 1) * CHUNK_BYTES <= TAIL_BYTES:
        count -= 1
    starts = [index * CHUNK_BYTES for index in range(count)]
    ends = [*starts[1:], file.size]
    cuts = [digests[index : index + 1] for index in range(count - 1)] + [digests[count - 1 :]]
    return [_Span(start, end - start, cut) for start, end, cut in zip(starts, ends, cuts, strict=True)]


def _cut(pieces: Iterator[Piece], position: int) -> Iterator[memoryview]:
    """Cut pieces where chunks end."""
    for piece in pieces:
        view = memoryview(piece)
        while len(view):
            part = view[: CHUNK_BYTES - position % CHUNK_BYTES]
            yield part
            position += len(part)
            view = view[len(part) :]


class _Chunk:
    """One chunk while its bytes come in."""

    def __init__(self, digest: str, look: Look | None, start: int) -> None:
        self._digest = digest
        self._found = hashlib.sha256()
        self._look = None if look is None else look.chunk(start)

    def feed(self, piece: Piece) -> None:
        self._found.update(piece)
        if self._look is not None:
            self._look.feed(piece)

    def accepted(self) -> bool:
        """Say whether the bytes were the signed ones; then what was seen of them counts."""
        if self._found.hexdigest() != self._digest:
            return False
        if self._look is not None:
            self._look.accept()
        return True


class _Job:
    """One download, shared by its threads. The first failure wins; it ends the others at their next chunk."""

    def __init__(
        self,
        read: ReadRange,
        file: FileEntry,
        target: int | None,
        *,
        what: str,
        look: Look | None,
        progress: Callable[[int], None] | None,
        far_threads: int | None = 1,
    ) -> None:
        """Prepare; `far_threads` is how many threads a far storage gets, None for CHUNKS_IN_FLIGHT."""
        if look is not None:
            look.begin()
        self._read = read
        self._file = file
        self._target = target
        self._what = what
        self._look = look
        self._progress = progress
        spans = _spans(file)
        self._spans = iter(spans)
        self._far_threads = min(far_threads or CHUNKS_IN_FLIGHT, len(spans))
        self._threads_max = min(CHUNKS_IN_FLIGHT, len(spans))
        self._others: list[threading.Thread] = []
        self._lock = threading.Lock()  # guards _spans, _others, failure, and calls of progress
        self.failure: BaseException | None = None

    def widen(self, threads: int) -> None:
        """Have `threads` threads work, the caller's own among them; never fewer than before."""
        with self._lock:
            for _ in range(min(threads, self._threads_max) - 1 - len(self._others)):
                thread = threading.Thread(target=self.work, name="loraplex-download", daemon=True)
                thread.start()
                self._others.append(thread)

    def join(self) -> None:
        """Wait until every other thread has ended; one that works may still start others, and is waited for first."""
        for thread in self._others:  # grows while it is walked
            thread.join()

    def work(self) -> None:
        """Download chunks until none is left or one failed."""
        while True:
            with self._lock:
                span = next(self._spans, None)
            if span is None or self.failure is not None:
                return
            try:
                self._fetch(span)
            except BaseException as error:
                with self._lock:
                    self.failure = self.failure or error
                if self._look is not None:
                    self._look.abandon()

    def _fetch(self, span: _Span) -> None:
        for attempt in range(1, CHUNK_TRIES_MAX + 1):
            try:
                self._try(span, first=attempt == 1)
            except StoreUnavailableError:
                if attempt == CHUNK_TRIES_MAX:
                    raise
            else:
                return

    def _try(self, span: _Span, *, first: bool) -> None:
        position, end = span.start, span.start + span.length
        digests = iter(span.digests)
        chunk: _Chunk | None = None
        asked_s = time.monotonic()
        # Closed at once when something fails, so that the connection is not left half read.
        with contextlib.closing(_bounded(self._read(span.start, span.length), span.length)) as pieces:
            for piece in _cut(pieces, position):
                if self.failure is not None:
                    return
                if position == span.start and time.monotonic() - asked_s > FAR_S:
                    self.widen(self._far_threads)
                chunk = chunk or _Chunk(next(digests), self._look, position)
                chunk.feed(piece)
                self._write(piece, position)
                position += len(piece)
                self._tell(len(piece) if first else 0)
                if position % CHUNK_BYTES == 0 or position == end:
                    self._require(chunk.accepted())
                    chunk = None
        self._require(position == end and next(digests, None) is None)

    def _require(self, right: bool) -> None:
        if not right:
            raise DigestMismatchError(
                f"{self._what} differs from the signed digest; the store is damaged or was tampered with."
            )

    def _write(self, piece: Piece, position: int) -> None:
        if self._target is None:
            return
        view = memoryview(piece)
        while len(view):
            written = os.pwrite(self._target, view, position)
            view, position = view[written:], position + written

    def _tell(self, size_bytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress(size_bytes)


def _range(read: ReadRange, start: int, length: int) -> list[bytes]:
    for attempt in range(1, CHUNK_TRIES_MAX + 1):
        try:
            with contextlib.closing(_bounded(read(start, length), length)) as pieces:
                return [bytes(piece) for piece in pieces]
        except StoreUnavailableError:
            if attempt == CHUNK_TRIES_MAX:
                raise
    raise AssertionError("unreachable")


def _bounded(pieces: Iterator[Piece], length: int) -> Generator[Piece, None, None]:
    """Pass on a range, at most `length` bytes of it: a store that gives more is wrong, and may never end."""
    with contextlib.closing(_closable(pieces)) as inner:
        for piece in inner:
            length -= len(piece)
            if length < 0:
                raise DigestMismatchError(
                    "The storage sends more bytes than were asked for; look what answers there."
                )
            if not len(piece):
                raise StoreUnavailableError("The storage sends pieces of nothing; try again.")
            yield piece


def _closable(pieces: Iterator[Piece]) -> Generator[Piece, None, None]:
    yield from pieces


def _read(descriptor: int, start: int, length: int) -> Iterator[Piece]:
    buffer = memoryview(bytearray(min(length, _READ_BYTES)))
    while length > 0:
        count = os.preadv(descriptor, [buffer[: min(length, len(buffer))]], start)
        if count == 0:
            return
        yield buffer[:count]
        start, length = start + count, length - count
