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
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from ..errors import DigestMismatchError, StoreUnavailableError
from ..format.manifest import CHUNK_BYTES, FileEntry
from ..storage.store import Piece, ReadRange

CHUNK_TRIES_MAX: Final = 3
"""How often one chunk is asked for when the storage breaks off in the middle of it."""

CHUNKS_IN_FLIGHT: Final = 8
"""Most chunks of one file asked for at once. Each holds one buffer of at most 1 MiB."""

FAR_S: Final = 0.01
"""Seconds that even the quickest first piece of a range took from which the storage is far: then more chunks are asked
for than there are cores.
"""

CHUNKS_TOGETHER_MAX: Final = 4
"""Most neighbouring chunks of a near storage asked for in one request: a request costs both sides about as much as
hashing half a MiB. A far storage is asked for one chunk at a time, so that more connections share a file.
"""

TAIL_BYTES: Final = 1 << 20
"""A last chunk of at most so many bytes is asked for together with the one before it: a header makes 8 MiB of weights
a little longer than a chunk.
"""

WRITE_BYTES: Final = 256 << 10
"""Most bytes written at once. For more the kernel looks for as much contiguous memory, which now and then takes longer
than all else: of 24 downloads of 256 MiB in writes of 1 MiB, a third took twice as long (Linux 6.18, ext4).
"""

_READ_BYTES: Final = 512 << 10


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
            the storage is found to be far (FAR_S).

    Raises:
        DigestMismatchError: the store's bytes are not the signed ones.
        OSError: the disk.
        Others: what `read` and `look` raise.
    """
    if target is not None and file.size > CHUNK_BYTES:
        # Few extents, and "disk full" before the download, not after it.
        os.posix_fallocate(target, 0, file.size)
    job = _Job(read, _parts(file), target, what=what, look=look, progress=progress, far_threads=threads)
    job.widen(threads or default_threads())
    job.work()
    job.join()
    if job.failure is not None:
        raise job.failure


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


@dataclass(frozen=True, slots=True)
class _Part:
    """One chunk of the file: its bytes `start:end` and the digest that was signed."""

    start: int
    end: int
    digest: str


@dataclass(slots=True)
class _Span:
    """Neighbouring chunks asked for in one request: those not accepted yet, and how far the progress was told."""

    left: deque[_Part]
    told: int


def _parts(file: FileEntry) -> deque[_Part]:
    return deque(
        _Part(index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, file.size), digest)
        for index, digest in enumerate(file.chunk_digests)
    )


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
        parts: deque[_Part],
        target: int | None,
        *,
        what: str,
        look: Look | None,
        progress: Callable[[int], None] | None,
        far_threads: int | None,
    ) -> None:
        """Prepare; `far_threads` is how many threads a far storage gets, None for CHUNKS_IN_FLIGHT."""
        if look is not None:
            look.begin()
        self._read = read
        self._target = target
        self._what = what
        self._look = look
        self._progress = progress
        self._parts = parts
        self._far_threads = far_threads or CHUNKS_IN_FLIGHT
        self._threads_max = min(CHUNKS_IN_FLIGHT, len(parts))
        self._others: list[threading.Thread] = []
        self._asked = 0
        self._nearest_s = math.inf
        self._far = False
        self._lock = threading.Lock()  # guards all of these, failure, and calls of progress
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
            span = self._take()
            if span is None or self.failure is not None:
                return
            try:
                self._fetch(span)
            except BaseException as error:
                with self._lock:
                    self.failure = self.failure or error
                if self._look is not None:
                    self._look.abandon()

    def _take(self) -> _Span | None:
        """Take the next chunks to ask for in one request; the first of each thread tells how far the storage is."""
        with self._lock:
            if not self._parts:
                return None
            threads = 1 + len(self._others)
            count = 1
            if not self._far and self._asked >= threads:
                count = max(1, min(CHUNKS_TOGETHER_MAX, len(self._parts) // threads))
            self._asked += 1
            taken = deque(self._parts.popleft() for _ in range(count))
            if len(self._parts) == 1 and self._parts[0].end - self._parts[0].start <= TAIL_BYTES:
                taken.append(self._parts.popleft())
            return _Span(taken, taken[0].start)

    def _fetch(self, span: _Span) -> None:
        for attempt in range(1, CHUNK_TRIES_MAX + 1):
            try:
                self._try(span)
            except StoreUnavailableError:
                if attempt == CHUNK_TRIES_MAX:
                    raise
            else:
                return

    def _try(self, span: _Span) -> None:
        start, end = span.left[0].start, span.left[-1].end
        position = start
        chunk: _Chunk | None = None
        asked_s = time.monotonic()
        # Closed at once when something fails, so that the connection is not left half read.
        with contextlib.closing(_bounded(self._read(start, end - start), end - start)) as pieces:
            for piece in _cut(pieces, position):
                if self.failure is not None:
                    return
                if position == start:
                    self._learn(time.monotonic() - asked_s)
                chunk = chunk or _Chunk(span.left[0].digest, self._look, position)
                chunk.feed(piece)
                self._write(piece, position)
                position += len(piece)
                self._tell(max(position - span.told, 0))
                span.told = max(position, span.told)
                if position == span.left[0].end:
                    self._require(chunk.accepted())
                    span.left.popleft()
                    chunk = None
        self._require(not span.left)

    def _learn(self, took_s: float) -> None:
        """Widen when the storage is far: no first piece was quick, so it is not the load of this machine."""
        with self._lock:
            self._nearest_s = min(self._nearest_s, took_s)
            self._far = self._nearest_s > FAR_S
        if self._far:
            self.widen(self._far_threads)

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
            written = os.pwrite(self._target, view[:WRITE_BYTES], position)
            view, position = view[written:], position + written

    def _tell(self, size_bytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress(size_bytes)


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
