"""Finding NaN and infinity in a safetensors file while it streams by, in chunks that may arrive in any order.

A number is not finite when all bits of its exponent are set (IEEE 754). Of a type's bit patterns those are the largest
of the positive ones read as a signed integer, and the largest of the negative ones read as an unsigned integer. So two
maxima tell, at the speed of memory and without a copy.

Law: whatever the cuts between chunks and pieces, exactly the tensors that hold a NaN or an infinity are found.
"""

from __future__ import annotations

import bisect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ..errors import RegistryError, StoreUnavailableError
from .safetensors_header import Header

IMPORT_ABOVE_BYTES: Final = 64 << 20
"""Files longer than this are worth the 0.08 s that importing numpy takes; a shorter one uses it if it is there."""

_PREFIX_BYTES: Final = 8  # the header's length


@dataclass(frozen=True, slots=True)
class _Float:
    """A float type: bytes per number, and the first bit patterns that are not finite, positive and negative."""

    width: int
    positive: int
    negative: int


_FLOATS: Final = {
    "F16": _Float(2, 0x7C00, 0xFC00),
    "BF16": _Float(2, 0x7F80, 0xFF80),
    "F32": _Float(4, 0x7F80_0000, 0xFF80_0000),
}


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring tensors of one type, as bytes `begin:end` of the file."""

    begin: int
    end: int
    dtype: str


@dataclass(frozen=True, slots=True)
class _Edge:
    """A part of a number that was cut: where the number begins in the file, its type, where the part begins."""

    number: int
    dtype: str
    begin: int
    part: bytes


class FiniteScan:
    """The scan of one file. Chunks are scanned by `chunk`, each on one thread, and count once they are `accept`ed."""

    def __init__(self, header: Header) -> None:
        """Prepare for a file.

        Args:
            header: checked: its tensors are contiguous and of type F16, BF16 or F32.
        """
        self._names = [tensor.name for tensor in header.tensors]
        self._begins = [header.data_offset + tensor.begin for tensor in header.tensors]
        self._runs = _runs(header)
        self._run_ends = [run.end for run in self._runs]
        self._cut: dict[int, tuple[bytearray, set[int]]] = {}  # number's position -> its bytes, those we have
        self._bad: int | None = None
        self.accepted_bytes = 0
        self._lock = threading.Lock()  # guards _cut and _bad
        if self._runs and self._runs[-1].end > IMPORT_ABOVE_BYTES:
            import numpy  # noqa: F401 - so that `_first_bad` finds it

    def chunk(self, offset: int) -> ChunkScan:
        """Return the scan of a chunk that begins at `offset` of the file."""
        return ChunkScan(self, offset)

    def accept(self, chunk: ChunkScan) -> None:
        """Count what a chunk found; call it once the chunk's bytes are known to be the right ones."""
        with self._lock:
            self._note(chunk.bad)
            self.accepted_bytes += chunk.fed_bytes
            for edge in chunk.edges:
                self._join(edge)

    def bad_tensor(self) -> str | None:
        """Return the name of a tensor that holds NaN or infinity, the first in the file; None when there is none."""
        with self._lock:
            if self._bad is None:
                return None
            return self._names[bisect.bisect_right(self._begins, self._bad) - 1]

    def runs(self, begin: int, end: int) -> list[_Run]:
        """Return the runs that touch the bytes `begin:end` of the file."""
        found = []
        for index in range(bisect.bisect_right(self._run_ends, begin), len(self._runs)):
            if self._runs[index].begin >= end:
                break
            found.append(self._runs[index])
        return found

    def _join(self, edge: _Edge) -> None:
        """Put a part of a number to the others; look at the number when it is whole."""
        width = _FLOATS[edge.dtype].width
        number, have = self._cut.setdefault(edge.number, (bytearray(width), set()))
        at = edge.begin - edge.number
        number[at : at + len(edge.part)] = edge.part
        have.update(range(at, at + len(edge.part)))
        if len(have) == width:
            del self._cut[edge.number]
            if _first_bad(number, edge.dtype) is not None:
                self._note(edge.number)

    def _note(self, position: int | None) -> None:
        if position is not None:
            self._bad = position if self._bad is None else min(self._bad, position)


class ChunkScan:
    """The scan of one chunk; takes its bytes in order and keeps the parts of numbers that were cut.

    Attributes:
        bad: position in the file of a number that is not finite, the first found.
        edges: the parts of numbers.
    """

    def __init__(self, scan: FiniteScan, offset: int) -> None:
        self._scan = scan
        self._start = self._offset = offset
        self.bad: int | None = None
        self.edges: list[_Edge] = []

    @property
    def fed_bytes(self) -> int:
        """Bytes taken so far."""
        return self._offset - self._start

    def feed(self, piece: bytes | memoryview) -> None:
        """Take the next bytes."""
        begin, end = self._offset, self._offset + len(piece)
        self._offset = end
        view = memoryview(piece)
        for run in self._scan.runs(begin, end):
            self._feed_run(run, view, begin, max(begin, run.begin), min(end, run.end))

    def _feed_run(self, run: _Run, view: memoryview, offset: int, low: int, high: int) -> None:
        width = _FLOATS[run.dtype].width
        first = low + (run.begin - low) % width  # where the first whole number begins
        last = high - (high - run.begin) % width
        if first > low:
            self._keep(run, view, offset, low, min(first, high))
        if last > first:
            index = _first_bad(view[first - offset : last - offset], run.dtype)
            if index is not None and self.bad is None:
                self.bad = first + index
        if last >= first and high > last:
            self._keep(run, view, offset, last, high)

    def _keep(self, run: _Run, view: memoryview, offset: int, low: int, high: int) -> None:
        start = low - (low - run.begin) % _FLOATS[run.dtype].width
        self.edges.append(_Edge(start, run.dtype, low, bytes(view[low - offset : high - offset])))


class WeightsScan:
    """Parses the header of a file that is being downloaded, then scans its numbers (a `download.Look`).

    The header is read from the first chunk before that chunk's digest is known, so that the other chunks can be
    scanned as they arrive. That is safe because the reader of headers is made for strangers' files, and nothing it says
    counts before `result`, which is asked for when all digests were right.
    """

    def __init__(self, parse: Callable[[bytes], Header], *, header_bytes_max: int) -> None:
        """Prepare for one file.

        Args:
            parse: returns the checked header of a file that begins with these bytes, or raises RegistryError.
            header_bytes_max: longest header, in bytes; a longer one is given to `parse` without its end.
        """
        self._parse = parse
        self._header_bytes_max = header_bytes_max
        self.begin()

    def begin(self) -> None:
        """A download begins; forget what an earlier one showed."""
        self._known = threading.Event()
        self._head: bytes | None = None
        self._scan: FiniteScan | None = None
        self._refusal: RegistryError | None = None

    def chunk(self, offset: int) -> _FirstChunk | _LaterChunk:
        """Return what sees the chunk at `offset`."""
        return _LaterChunk(self, offset) if offset else _FirstChunk(self)

    def abandon(self) -> None:
        """Nobody will bring the header any more; let go whoever waits for it."""
        self._known.set()

    def result(self, size_bytes: int) -> FiniteScan:
        """Return the finished scan of a file of this size, all of whose chunks were accepted.

        Raises:
            RegistryError: what `parse` raised.
        """
        if self._refusal is not None:
            raise self._refusal
        assert self._scan is not None
        assert self._scan.accepted_bytes == size_bytes, "a chunk was not scanned"
        return self._scan

    def take(self, head: bytes) -> None:
        """Parse the header; what it says holds for every chunk."""
        if self._head is not None:
            if head != self._head:
                raise StoreUnavailableError("The storage sent two different headers of one file; try again.")
            return
        self._head = head
        try:
            self._scan = FiniteScan(self._parse(head))
        except RegistryError as error:
            self._refusal = error
        finally:
            self._known.set()

    def known(self) -> FiniteScan | None:
        """Wait for the header and return the scan; None when there is nothing to scan by."""
        self._known.wait()
        return self._scan

    def header_length(self, head: bytes | bytearray) -> int:
        """Return how many bytes of the file the header takes, as far as they are worth waiting for."""
        if len(head) < _PREFIX_BYTES:
            return _PREFIX_BYTES
        return _PREFIX_BYTES + min(int.from_bytes(head[:_PREFIX_BYTES], "little"), self._header_bytes_max)


class _FirstChunk:
    """Collects the header, then scans."""

    def __init__(self, owner: WeightsScan) -> None:
        self._owner = owner
        self._head = bytearray()
        self._rest: _LaterChunk | None = None

    def feed(self, piece: bytes | memoryview) -> None:
        if self._rest is not None:
            self._rest.feed(piece)
            return
        self._head += piece
        length = self._owner.header_length(self._head)
        if length > _PREFIX_BYTES and len(self._head) >= length:
            self._begin(length)

    def accept(self) -> None:
        if self._rest is None:  # the file is shorter than its header says
            self._begin(len(self._head))
        assert self._rest is not None
        self._rest.accept()

    def _begin(self, length: int) -> None:
        self._owner.take(bytes(self._head[:length]))
        self._rest = _LaterChunk(self._owner, 0)
        self._rest.feed(memoryview(self._head))


class _LaterChunk:
    """Scans as soon as the header is known."""

    def __init__(self, owner: WeightsScan, offset: int) -> None:
        self._owner = owner
        self._offset = offset
        self._look: ChunkScan | None = None

    def feed(self, piece: bytes | memoryview) -> None:
        scan = self._owner.known()
        if scan is not None:
            self._look = self._look or scan.chunk(self._offset)
            self._look.feed(piece)

    def accept(self) -> None:
        scan = self._owner.known()
        if scan is not None and self._look is not None:
            scan.accept(self._look)


def _runs(header: Header) -> list[_Run]:
    runs: list[_Run] = []
    for tensor in header.tensors:
        begin, end = header.data_offset + tensor.begin, header.data_offset + tensor.end
        if runs and runs[-1].dtype == tensor.dtype:
            begin = runs.pop().begin
        runs.append(_Run(begin, end, tensor.dtype))
    return runs


def _first_bad(numbers: bytes | bytearray | memoryview, dtype: str) -> int | None:
    """Return the position in bytes of the first number that is not finite, None when all are."""
    kind = _FLOATS[dtype]
    numpy = sys.modules.get("numpy")
    if numpy is None:
        if not _suspicious(bytes(numbers), kind):
            return None
        import numpy
    return _first_bad_by_numpy(numpy, numbers, kind)


def _suspicious(numbers: bytes, kind: _Float) -> bool:
    """Say whether a number may be not finite, by the highest byte of each. Never wrong when it says no.

    A byte search of the standard library: weights of a good adapter never have such a byte, so the process need not
    load numpy to find that out.
    """
    high = numbers[kind.width - 1 :: kind.width]
    shift = 8 * (kind.width - 1)
    for least, most in ((kind.positive >> shift, 0x7F), (kind.negative >> shift, 0xFF)):
        if any(high.find(byte) >= 0 for byte in range(least, most + 1)):
            return True
    return False


def _first_bad_by_numpy(numpy: Any, numbers: bytes | bytearray | memoryview, kind: _Float) -> int | None:
    unsigned = numpy.frombuffer(numbers, dtype=f"<u{kind.width}")
    if unsigned.max() < kind.negative and unsigned.view(f"<i{kind.width}").max() < kind.positive:
        return None
    exponent = kind.positive
    return int(((unsigned & exponent) == exponent).argmax()) * kind.width
