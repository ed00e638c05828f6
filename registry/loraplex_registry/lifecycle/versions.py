"""Choosing a version and reserving it: the first half of a push.

A reservation is a pending record under a random push id. Which version it is:

- one asked for: that one, when it is free, aborted, or left pending beyond its lease;
- none asked for: the newest committed version when it holds this content already, else the number after the greatest
  one in use. A number that was deleted is never used again, and one left by a dead push is taken over.

Adapters whose newest version is a semantic version have no next number: there the caller must name one.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..errors import ConflictError, DamagedError, KeyAbsentError, KeyConflictError, StoreUnavailableError
from ..format import layout
from ..format.record import (
    LEASE_S,
    RECORD_BYTES_MAX,
    AbortedRecord,
    CommittedRecord,
    PendingRecord,
    Record,
    read_record,
)
from ..refs import VERSION_MAX, AdapterRef, Version, version_order
from ..storage.store import Item, Store, write_conditionally

CHOICES_MAX: Final = 32
"""How often another version is looked at or tried when rivals take them."""

VERSIONS_MAX: Final = 100_000
"""Most versions of one adapter that are listed."""

LEASE_BYTES_PER_S: Final = 1 << 20
"""A lease is longer by one second for each of these bytes to upload (1 MiB)."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A pending record of ours: its version, push id and the etag the commit must find."""

    version: Version
    pid: str
    etag: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The committed record at `version` with its etag; `created` says whether this call made it."""

    version: Version
    record: CommittedRecord
    etag: str
    created: bool


def recorded_versions(store: Store, ref: AdapterRef) -> list[Version]:
    """Return the versions that have a record, in no particular order; one LIST request per 1000.

    Raises:
        DamagedError: more than VERSIONS_MAX.
    """
    versions: list[Version] = []
    for name in store.children(layout.versions_prefix(ref)):
        if len(versions) >= VERSIONS_MAX:
            raise DamagedError(f"{ref.name} has more than {VERSIONS_MAX} versions; name one.")
        version = layout.version_of_record(name)
        if version is not None:
            versions.append(version)
    return versions


def get_record(store: Store, ref: AdapterRef, version: Version) -> tuple[Record, str] | None:
    """Return a version's record and etag, None when there is none. One request.

    Raises:
        DamagedError: it cannot be read.
    """
    item = get_item(store, layout.version_key(ref, version))
    if item is None:
        return None
    return read_record(item.body, version=version, where=f"{ref.name}@{version}"), item.etag


def get_item(store: Store, key: str) -> Item | None:
    """Return a small object, None when there is none."""
    try:
        return store.get(key, limit_bytes=RECORD_BYTES_MAX)
    except KeyAbsentError:
        return None


class Reserver:
    """Finds or reserves the version of one push. Used by one thread, once.

    Args:
        store: where.
        ref: tenant and adapter.
        by: who pushes, for people: a key id.
        now_s: the time in seconds since 1970, to judge leases by.
        size_bytes: bytes to upload; lengthens the lease.
        is_this: says whether a committed record holds what is being pushed.
    """

    def __init__(
        self,
        store: Store,
        ref: AdapterRef,
        *,
        by: str,
        now_s: float,
        size_bytes: int,
        is_this: Callable[[CommittedRecord], bool],
    ) -> None:
        self._store = store
        self._ref = ref
        self._by = by
        self._now_s = now_s
        self._lease_s = LEASE_S + size_bytes // LEASE_BYTES_PER_S
        self._is_this = is_this

    def choose(self, wanted: Version | None) -> Reservation | Outcome:
        """Reserve a version, or find the content committed already.

        Raises:
            ConflictError: the version is taken, or must be named.
        """
        if wanted is not None:
            return self._named(wanted)
        first = self._look()
        if not isinstance(first, int):
            return first
        for version in range(first, min(first + CHOICES_MAX, VERSION_MAX + 1)):
            found = self._try_free(version)
            if found is not None:
                return found
        raise ConflictError(f"No free version of {self._ref.name} was found; push again.")

    def resume(self, version: Version, pid: str) -> Reservation | None:
        """Renew the lease of a reservation that an earlier process of this user made; None when it is lost.

        Two processes that renew it within one second write the same bytes, and both go on. They upload the same
        content to the same keys, and the first commit ends the other's.
        """
        found = self._own_pending(version, pid)
        if found is None:
            return None
        try:
            body = self._pending(pid)
            return Reservation(
                version, pid, write_conditionally(self._store, self._key(version), body, etag=found)
            )
        except KeyConflictError:
            return None

    def abandon(self, version: Version, pid: str) -> None:
        """Give a version free that an earlier process of this user reserved, unless it is lost or committed."""
        found = self._own_pending(version, pid)
        if found is not None:
            with contextlib.suppress(KeyConflictError):
                body = AbortedRecord(pid, "abandoned").to_bytes()
                write_conditionally(self._store, self._key(version), body, etag=found)

    def _own_pending(self, version: Version, pid: str) -> str | None:
        """Return the etag of a version's record when it is pending under this push id and by this key."""
        try:
            found = get_record(self._store, self._ref, version)
        except DamagedError:
            return None
        if found is None or not isinstance(found[0], PendingRecord):
            return None
        return found[1] if (found[0].pid, found[0].by) == (pid, self._by) else None

    def _named(self, version: Version) -> Reservation | Outcome:
        found = self._reserve_free(version)
        if isinstance(found, Reservation):
            return found
        if found is None:
            raise ConflictError(f"{self._name(version)} was purged just now; push again.")
        record, etag = found
        if isinstance(record, CommittedRecord) and self._is_this(record):
            return Outcome(version, record, etag, created=False)
        reservation = self._take_over(version, record, etag)
        if reservation is None:
            raise ConflictError(self._refusal(version, record))
        return reservation

    def _look(self) -> Reservation | Outcome | int:
        """Return the newest committed version when it is this content, a take-over, or the first number to try."""
        versions = sorted(recorded_versions(self._store, self._ref), key=version_order, reverse=True)
        last = max((version for version in versions if isinstance(version, int)), default=0)
        left: tuple[int, Record, str] | None = None
        for version in versions[:CHOICES_MAX]:
            found = get_record(self._store, self._ref, version)
            if found is None:
                continue
            record, etag = found
            if isinstance(record, CommittedRecord):
                if self._is_this(record):
                    return Outcome(version, record, etag, created=False)
                if isinstance(version, str):
                    raise ConflictError(
                        f"{self._name(version)} is the newest version, so there is no next number; name the version, "
                        f"as in {self._ref.name}@{_next_patch(version)}."
                    )
                break
            if version == last and isinstance(version, int):
                left = version, record, etag
        taken = None if left is None else self._take_over(*left)
        return taken or last + 1

    def _try_free(self, version: int) -> Reservation | Outcome | None:
        """Reserve a number believed free; None when a rival has it, unless he published just this."""
        found = self._reserve_free(version)
        if found is None or isinstance(found, Reservation):
            return found
        record, etag = found
        if isinstance(record, CommittedRecord) and self._is_this(record):
            return Outcome(version, record, etag, created=False)
        return None

    def _reserve_free(self, version: Version) -> Reservation | tuple[Record, str] | None:
        """Reserve a version without a record, or return the record in the way; one look, whoever wrote it."""
        key, pid = self._key(version), uuid.uuid4().hex
        body = self._pending(pid)
        try:
            try:
                return Reservation(version, pid, self._store.create(key, body))
            except StoreUnavailableError as error:
                if not error.ambiguous:
                    raise
                return Reservation(version, pid, write_conditionally(self._store, key, body, etag=None))
        except KeyConflictError:
            found = get_record(self._store, self._ref, version)
        if found is not None and found[0].pid == pid:  # our own, sent twice on the way
            return Reservation(version, pid, found[1])
        return found

    def _take_over(self, version: Version, record: Record, etag: str) -> Reservation | None:
        """Reserve a version that a dead push left; None when it is not free, or a rival was faster."""
        try:
            if isinstance(record, PendingRecord) and record.lease_over(self._now_s):
                body = AbortedRecord(record.pid, "lease over").to_bytes()
                etag = write_conditionally(self._store, self._key(version), body, etag=etag)
            elif not isinstance(record, AbortedRecord):
                return None
            return self._reserve(version, etag=etag)
        except KeyConflictError:
            return None

    def _reserve(self, version: Version, *, etag: str) -> Reservation:
        pid = uuid.uuid4().hex
        return Reservation(
            version,
            pid,
            write_conditionally(self._store, self._key(version), self._pending(pid), etag=etag),
        )

    def _pending(self, pid: str) -> bytes:
        return PendingRecord(pid, self._by, int(self._now_s), self._lease_s).to_bytes()

    def _refusal(self, version: Version, record: Record) -> str:
        name = self._name(version)
        if isinstance(record, PendingRecord):
            if record.lease_over(self._now_s):
                return f"{name} was taken by another push; push again."
            return f"{name} is being pushed by {record.by[:16]}…; wait for it."
        if isinstance(record, AbortedRecord):
            return f"{name} was taken by another push; push again."
        if isinstance(record, CommittedRecord):
            return (
                f"{name} exists with other content, or signed with another key, or not encrypted though a key is set; "
                "push a new version."
            )
        return f"{name} was deleted, and a version never comes to mean something else; push a new version."

    def _key(self, version: Version) -> str:
        return layout.version_key(self._ref, version)

    def _name(self, version: Version) -> str:
        return f"{self._ref.name}@{version}"


def _next_patch(version: str) -> str:
    major, minor, patch = version.partition("-")[0].split(".")
    return version.partition("-")[0] if "-" in version else f"{major}.{minor}.{int(patch) + 1}"
