"""High-water marks: what was seen before, so that nothing older is believed again.

Whoever can write to the bucket can put back any earlier tag or revocation list, and its signature is genuine. A mark
remembers per tag the highest generation, and per tenant the highest serial of the revocation list, with the digest of
the signed statement. Afterwards

- a lower number is a rollback, and the same number with another digest is a fork: both are refused;
- a time of day that lies more than `CLOCK_SLACK_S` before the newest time any statement was issued is refused: dates
  are worth nothing on a clock that was set back.

Without marks (a first use, a lost file) an older statement is believed as long as it has not expired.

A mark counts only while one of the keys that set it is still trusted for that role. So when a stolen key jumped ahead
to a huge number ("fast-forward"), taking the key out of the policy is all the recovery there is to do.

`FileMarks` keeps one file per tenant: one tenant's statements can neither evict, damage nor outrun another's. A file
holds at most `MARKS_MAX` marks; beyond, those that have not advanced for longest are forgotten, the revocation list's
never. A damaged file refuses everything of its tenant: to start afresh silently would be the rollback it guards from.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from .. import durable
from ..errors import ExpiredError, PolicyRefusedError, RollbackError
from ..format.canonical import StrictJsonError, exact_object, parse
from ..refs import check_name

MARKS_MAX: Final = 10_000
"""Most marks of one tenant, besides the revocation list's."""

TENANTS_IN_MEMORY_MAX: Final = 100_000
"""Most tenants `MemoryMarks` knows; those that have not advanced for longest are forgotten."""

TENANTS_CACHED_MAX: Final = 1_024
"""Most files `FileMarks` keeps parsed."""

FILE_BYTES_MAX: Final = 16 << 20
"""Longest file of marks, in bytes (16 MiB): `MARKS_MAX` marks of the longest names and eight keys each fit."""

STAMP_AGE_MIN_NS: Final = 1_000_000_000
"""Age from which a file's inode, time and size tell it from the next one, in nanoseconds (1 s)."""

CLOCK_SLACK_S: Final = 300
"""How far a clock may lie behind the newest statement, in seconds."""

REVOCATIONS: Final = "revocations"
"""Name of the revocation list's mark; a tag's is `adapter@tag`."""

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Mark:
    """A generation or serial number, the hex SHA-256 of the signed statement, and the keys that signed it."""

    number: int
    sha256: str
    keyids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one tenant: marks in the order in which they last advanced, and the newest time of issue.

    A value; `advanced` returns the next one. `tenant` is for messages and is not kept in the file.
    """

    marks: Mapping[str, Mark] = field(default_factory=dict)
    newest: dt.datetime | None = None
    tenant: str = field(default="", compare=False)

    def advanced(self, name: str, mark: Mark, issued: dt.datetime, trusted: Collection[str]) -> Seen:
        """Return what has been seen after a verified statement; `self` when it tells nothing new.

        Args:
            name: `REVOCATIONS`, or `adapter@tag`.
            mark: of the statement, whose signatures must have been verified.
            issued: when the statement says it was issued.
            trusted: ids of the keys that may sign such statements now.

        Raises:
            RollbackError: an older statement than was seen, or another one of the same number.
        """
        before = self.marks.get(name)
        if before is not None and not set(before.keyids).isdisjoint(trusted):
            if mark.number < before.number:
                raise RollbackError(self._older(name, mark, before))
            if mark.number == before.number and mark.sha256 != before.sha256:
                what, counted = self._named(name)
                raise RollbackError(
                    f"{what} has {counted} {mark.number} with other content than was seen before; two statements "
                    f"were signed for one {counted}, ask the signers."
                )
            if mark.number == before.number:
                mark = before
        newest = issued if self.newest is None else max(self.newest, issued)
        if mark == before and newest == self.newest:
            return self
        marks = {key: value for key, value in self.marks.items() if key != name} | {name: mark}
        return Seen(_without_oldest(marks), newest, self.tenant)

    def _older(self, name: str, mark: Mark, before: Mark) -> str:
        """Say that a statement is older than one seen, and where to look for the newer one."""
        what, counted = self._named(name)
        found = f"has {counted} {mark.number}" if mark.number else "is gone"
        how = "put an older one back" if mark.number else "took it away"
        look = "" if name == REVOCATIONS else f"`registry log {what}` and "
        return (
            f"{what} {found}, and {counted} {before.number} was seen before; somebody {how}, "
            f"look at {look}the bucket's history."
        )

    def _named(self, name: str) -> tuple[str, str]:
        """Return what a mark is of, and the word for its number."""
        if name == REVOCATIONS:
            return f"The revocation list of tenant {self.tenant or '?'}", "serial"
        return f"{self.tenant or '?'}/{name}", "generation"

    def check_clock(self, now: dt.datetime) -> None:
        """Raise ExpiredError when `now` lies more than `CLOCK_SLACK_S` before the newest time of issue."""
        if self.newest is not None and now < self.newest - dt.timedelta(seconds=CLOCK_SLACK_S):
            raise ExpiredError(
                f"The clock says {now:%Y-%m-%dT%H:%M:%SZ}, but a statement of tenant {self.tenant or '?'} issued "
                f"{self.newest:%Y-%m-%dT%H:%M:%SZ} was verified before; set the clock."
            )


class MemoryMarks:
    """Marks that last as long as the object. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tenants: OrderedDict[str, Seen] = OrderedDict()

    def seen(self, tenant: str) -> Seen:
        """Return what was seen of a tenant.

        Raises:
            PolicyRefusedError: what was kept about it is damaged.
        """
        return self._tenants.get(tenant, Seen(tenant=tenant))

    def advance(
        self, tenant: str, name: str, mark: Mark, *, issued: dt.datetime, trusted: Collection[str]
    ) -> None:
        """Check a verified statement against its mark, and remember it when it is newer: one indivisible step.

        Raises:
            RollbackError: see `Seen.advanced`; nothing is remembered.
            PolicyRefusedError: what was kept is damaged or cannot be written.
        """
        with self._lock:
            self._tenants[tenant] = self.seen(tenant).advanced(name, mark, issued, trusted)
            self._tenants.move_to_end(tenant)
            while len(self._tenants) > TENANTS_IN_MEMORY_MAX:
                self._tenants.popitem(last=False)

    def forget(self, tenant: str) -> bool:
        """Forget a tenant: the next statements are believed whatever their numbers. Return False if none was known."""
        with self._lock:
            return self._tenants.pop(tenant, None) is not None


class FileMarks(MemoryMarks):
    """Marks in a directory, one file per tenant, shared by any number of processes of one machine.

    A new mark is on disk before `advance` returns: temporary file, fsync, rename, fsync of the directory, all under
    `flock`. A crash leaves the file before or after, never between.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._directory = Path(directory)
        self._stamps: dict[str, tuple[int, int, int]] = {}

    def seen(self, tenant: str) -> Seen:
        """See `MemoryMarks.seen`."""
        with self._lock:
            return self._current(tenant)

    def advance(
        self, tenant: str, name: str, mark: Mark, *, issued: dt.datetime, trusted: Collection[str]
    ) -> None:
        """See `MemoryMarks.advance`."""
        with self._lock:
            known = self._current(tenant)
            if known.advanced(name, mark, issued, trusted) is known:
                return
            with self._file_lock(tenant):
                known = self._current(tenant)
                after = known.advanced(name, mark, issued, trusted)
                if after is not known:
                    self._write(tenant, after)

    def forget(self, tenant: str) -> bool:
        """See `MemoryMarks.forget`."""
        path = self._path(tenant)
        with self._lock, self._file_lock(tenant):
            self._tenants.pop(tenant, None)
            known = path.exists()
            path.unlink(missing_ok=True)
            return known

    def _path(self, tenant: str) -> Path:
        check_name("tenant", tenant)
        return self._directory / f"{tenant}.json"

    def _current(self, tenant: str) -> Seen:
        """Return what the file says, parsing it only when it is another one than last time."""
        path = self._path(tenant)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
                if self._stamps.get(tenant) == stamp and tenant in self._tenants:
                    return self._tenants[tenant]
                body = file.read(FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            return Seen(tenant=tenant)
        except OSError as error:
            raise self._refusal(path, f"cannot be read ({error.strerror})") from error
        try:
            seen = replace(read_seen(body), tenant=tenant)
        except StrictJsonError as error:
            raise self._refusal(path, f"is damaged ({error})") from error
        self._remember(tenant, seen, stamp)
        return seen

    def _remember(self, tenant: str, seen: Seen, stamp: tuple[int, int, int]) -> None:
        # Two files written within one tick of the clock can have one stamp: a young file is parsed again next time.
        young = time.time_ns() - stamp[1] < STAMP_AGE_MIN_NS
        self._tenants[tenant], self._stamps[tenant] = seen, (0, 0, 0) if young else stamp
        while len(self._tenants) > TENANTS_CACHED_MAX:
            self._stamps.pop(self._tenants.popitem(last=False)[0])

    def _write(self, tenant: str, seen: Seen) -> None:
        path = self._path(tenant)
        try:
            durable.replace(path, seen_bytes(seen))
        except OSError as error:
            raise self._refusal(path, f"cannot be written ({error.strerror})") from error

    @contextlib.contextmanager
    def _file_lock(self, tenant: str) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        path = self._directory / f".{tenant}.lock"
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise self._refusal(path, f"cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _refusal(self, path: Path, what: str) -> PolicyRefusedError:
        return PolicyRefusedError(
            f"The file of high-water marks {path} {what}; restore it, or remove it if older tags may be accepted once."
        )


class FrozenMarks(MemoryMarks):
    """Checks against other marks and remembers nothing: for questions (`registry policy explain`)."""

    def __init__(self, marks: MemoryMarks) -> None:
        super().__init__()
        self._marks = marks

    def seen(self, tenant: str) -> Seen:
        """See `MemoryMarks.seen`."""
        return self._marks.seen(tenant)

    def advance(
        self, tenant: str, name: str, mark: Mark, *, issued: dt.datetime, trusted: Collection[str]
    ) -> None:
        """Check as `MemoryMarks.advance` does."""
        self.seen(tenant).advanced(name, mark, issued, trusted)


def marks_directory(state: Path, url: str) -> Path:
    """Return where the marks of one registry lie below a state directory; `url` is the store's own spelling."""
    return state / "marks" / hashlib.sha256(url.encode("utf-8")).hexdigest()[:32]


def seen_bytes(seen: Seen) -> bytes:
    """Return the file that `read_seen` reads."""
    value = {
        "newest": "" if seen.newest is None else seen.newest.isoformat(),
        "marks": [[name, mark.number, mark.sha256, list(mark.keyids)] for name, mark in seen.marks.items()],
    }
    return json.dumps({"fmt": _FORMAT, "seen": value, "sha256": _checksum(value)}).encode("utf-8")


def read_seen(body: bytes) -> Seen:
    """Read a file of marks.

    Raises:
        StrictJsonError: not the file as it was written; a checksum covers all of it.
    """
    fields = exact_object(parse(body, limit_bytes=FILE_BYTES_MAX), frozenset({"fmt", "seen", "sha256"}))
    value = exact_object(fields["seen"], frozenset({"newest", "marks"}))
    if type(fields["fmt"]) is not int or fields["fmt"] != _FORMAT:
        raise StrictJsonError(f"fmt is not {_FORMAT}")
    try:
        newest = dt.datetime.fromisoformat(value["newest"]) if value["newest"] else None
        marks = {name: Mark(number, sha256, tuple(keyids)) for name, number, sha256, keyids in value["marks"]}
    except (TypeError, ValueError) as error:
        raise StrictJsonError("a mark is out of shape") from error
    seen = Seen(marks, newest)
    if seen_bytes(seen) != body:  # the checksum is made again with it
        raise StrictJsonError("not as it was written")
    return seen


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()


def _without_oldest(marks: dict[str, Mark]) -> dict[str, Mark]:
    """Drop the marks that advanced longest ago; the revocation list's stays."""
    excess = len(marks) - (REVOCATIONS in marks) - MARKS_MAX
    if excess <= 0:
        return marks
    oldest = [name for name in marks if name != REVOCATIONS][:excess]
    return {name: mark for name, mark in marks.items() if name not in oldest}
