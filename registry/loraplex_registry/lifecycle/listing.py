"""What there is: tenants, a tenant's adapters, an adapter's versions and tags. Nothing listed is verified.

Names stream: the cost per name does not depend on how many there are, and nothing is held but one page of the
storage. What is known *about* each of them takes a read each, made by READERS threads at once, in the order of the
names.
"""

from __future__ import annotations

import datetime as dt
import fnmatch
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from ..errors import AdapterNotFoundError, DamagedError, KeyAbsentError, SignatureInvalidError
from ..format import layout
from ..format.moments import written
from ..format.record import (
    RECORD_BYTES_MAX,
    AbortedRecord,
    CommittedRecord,
    DeletedRecord,
    DeletingRecord,
    PendingRecord,
    Record,
    read_record,
)
from ..format.tags import read_tag
from ..refs import AdapterRef, Version, version_order
from ..storage.store import Store
from .versions import recorded_versions

READERS: Final = 16
"""Threads that read records and tags."""

_STATES: Final = {
    PendingRecord: "pending",
    AbortedRecord: "aborted",
    CommittedRecord: "committed",
    DeletingRecord: "deleting",
    DeletedRecord: "deleted",
}
_YEAR_9999_S: Final = 253_402_300_799  # the last second that has a date

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class ListedVersion:
    """A version as found: `state` is a record's, or `damaged`. The rest is known of committed ones, the digest of
    deleted ones too.

    Attributes:
        created: UTC, as in the manifest.
        size_bytes: of all its files.
    """

    version: Version
    state: str
    digest: str | None = None
    created: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ListedTag:
    """A tag as found. `version` and `digest` are None for one that was removed or is damaged (`generation` 0)."""

    tag: str
    generation: int
    version: Version | None
    digest: str | None
    issued: str | None


def list_tenants(store: Store, *, pattern: str = "*", after: str = "") -> Iterator[str]:
    """Yield tenants' names in byte order, those greater than `after` that match the shell pattern."""
    return _directories(store, layout.TENANTS_PREFIX, pattern, after)


def list_adapters(store: Store, tenant: str, *, pattern: str = "*", after: str = "") -> Iterator[str]:
    """Yield the names of a tenant's adapters in the storage's order, from behind the name `after` on.

    A pattern's literal beginning is looked up, not scanned for: `or*` does not read the names before `or`.
    """
    return _directories(store, layout.adapters_prefix(tenant), pattern, after)


def list_tags(store: Store, ref: AdapterRef) -> Iterator[ListedTag]:
    """Yield an adapter's tags by name, removed ones too; one request each after the listing."""
    names = (
        name.removesuffix(".json")
        for name in store.children(layout.tags_prefix(ref))
        if name.endswith(".json")
    )
    return in_parallel(lambda tag: _read_tag(store, ref, tag), names)


def version_names(store: Store, ref: AdapterRef) -> list[Version]:
    """Return the versions that have a record, newest first; one LIST request per 1000.

    Raises:
        DamagedError: more than VERSIONS_MAX.
    """
    return sorted(recorded_versions(store, ref), key=version_order, reverse=True)


def list_versions(store: Store, ref: AdapterRef, versions: Iterable[Version]) -> Iterator[ListedVersion]:
    """Yield what is known about versions of an adapter, in the order given; one request each."""
    return in_parallel(lambda version: _read_version(store, ref, version), versions)


def in_parallel(
    work: Callable[[_In], _Out], items: Iterable[_In], *, threads: int = READERS
) -> Iterator[_Out]:
    """Yield `work(item)` in order, `threads` at a time; at most twice as many are begun before one is taken.

    Raises:
        Whatever `work` raises, at its item; nothing new is begun then.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="list") as pool:
        running: deque[Future[_Out]] = deque()
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) >= 2 * threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def not_found(url: str, ref: AdapterRef, record: Record | None = None) -> AdapterNotFoundError:
    """Return why nothing answers to a reference, in words: what its record says became of it, or that it has none.

    Args:
        url: the store's address.
        ref: what was asked for.
        record: the record found under it, not a committed one.
    """
    if isinstance(record, DeletedRecord):
        when = written(dt.datetime.fromtimestamp(min(record.deleted_s, _YEAR_9999_S), dt.UTC))
        return AdapterNotFoundError(
            f"{ref} was deleted at {when}, reason {record.reason!a}; `registry ls {ref.name}` shows what is left."
        )
    if isinstance(record, DeletingRecord):
        return AdapterNotFoundError(f"{ref} is being deleted; if that died, run `registry rm {ref}` again.")
    if isinstance(record, PendingRecord):
        return AdapterNotFoundError(
            f"{ref} is being pushed and not committed yet; wait, or run that push again if it died."
        )
    return AdapterNotFoundError(f"{ref} is not in {url}; `registry ls {ref.name}` shows what is.")


def _directories(store: Store, prefix: str, pattern: str, after: str) -> Iterator[str]:
    matches = re.compile(fnmatch.translate(pattern)).match
    literal = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    # A listing goes on behind a name; a directory's is `name/`. `~` sorts behind all that a name may hold.
    start = after + "/" if after else ""
    if literal:
        start = max(start, literal[:-1] + chr(ord(literal[-1]) - 1) + "~")
    for child in store.children(prefix, after=start):
        name = child.removesuffix("/")
        if name == child:
            continue
        if matches(name):
            yield name
        elif literal and name > literal and not name.startswith(literal):
            return


def _read_version(store: Store, ref: AdapterRef, version: Version) -> ListedVersion:
    try:
        item = store.get(layout.version_key(ref, version), limit_bytes=RECORD_BYTES_MAX)
        record = read_record(item.body, version=version, where=f"{ref.name}@{version}")
        return _listed(version, record)
    except (DamagedError, SignatureInvalidError, KeyAbsentError):
        return ListedVersion(version, "damaged")


def _listed(version: Version, record: Record) -> ListedVersion:
    state = _STATES[type(record)]
    if isinstance(record, DeletedRecord):
        return ListedVersion(version, state, f"sha256:{record.manifest_sha256}")
    if not isinstance(record, CommittedRecord):
        return ListedVersion(version, state)
    manifest = record.manifest_unverified()
    return ListedVersion(version, state, record.digest, manifest.created, manifest.size_bytes)


def _read_tag(store: Store, ref: AdapterRef, tag: str) -> ListedTag:
    try:
        item = store.get(layout.tag_key(ref, tag), limit_bytes=RECORD_BYTES_MAX)
        statement = read_tag(item.body, where=f"{ref.name}@{tag}").statement
    except (DamagedError, KeyAbsentError):
        return ListedTag(tag, 0, None, None, None)
    digest = f"sha256:{statement.manifest_sha256}" if statement.manifest_sha256 else None
    return ListedTag(tag, statement.generation, statement.version, digest, statement.issued)
