"""Garbage collection: removes the blobs that no record can ever refer to, and the parts that no blob will be made of.

Runs while pushes run, any number at once.

A push reserves its version under a random push id before it uploads anything, and every blob's key holds that id. So
one look at one record tells whether a group of blobs is alive, and a group once dead stays dead:

| record of the version   | blobs of this push id                                     |
|-------------------------|-----------------------------------------------------------|
| committed, deleting     | alive                                                     |
| pending                 | alive; beyond lease and grace: dead, once it is fenced    |
| aborted                 | dead                                                      |
| deleted                 | dead when the grace is over, so running downloads end     |
| any, under another id   | dead: an id that left its record never comes back         |
| none                    | dead: it was purged                                       |
| unreadable              | alive, whatever it may be; `registry fsck` tells          |

To fence a push is to *swap* its pending record to aborted; if the push commits first, the swap fails and nothing is
removed.

Clocks only say when to try. A pusher that is fenced by a clock running ahead loses its push, never its data: its commit
finds the record swapped and fails.

Records, tags and logs are never removed. Unfinished uploads are judged by the same rule; see `unfinished`.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from ..errors import DamagedError, InvalidReferenceError, KeyConflictError, StoreRefusedError
from ..format import layout
from ..format.hashing import entry_of
from ..format.record import AbortedRecord, CommittedRecord, DeletedRecord, DeletingRecord, PendingRecord
from ..refs import AdapterRef, Version
from ..storage.store import PAGE_KEYS, Store, write_conditionally
from .garbage import Collection, Group, Verdict
from .unfinished import judge_uploads
from .versions import get_record

GRACE_S: Final = 24 * 3600.0
"""Seconds for which fresh blobs, expired pushes and deleted versions are left alone."""

WORKERS: Final = 16
"""Records looked at at a time."""

CLOCK_PREFIX: Final = "gc/b/"
"""Where an object is written to learn the storage's time, and removed again."""


def collect(
    store: Store,
    *,
    apply: bool = False,
    grace_s: float = GRACE_S,
    tenant: str | None = None,
    ref: AdapterRef | None = None,
    now_s: float | None = None,
    workers: int = WORKERS,
    on_verdict: Callable[[Verdict], None] | None = None,
) -> Collection:
    """Find blobs that can never be referred to again, and remove them when `apply`.

    Requests: one listing (a page per 1000 objects), one read per group older than the grace, one write per expired push
    and one delete per 1000 blobs; one listing of unfinished uploads, and up to three for each of them that is older
    than the grace. Memory does not grow with the registry.

    Args:
        store: where.
        apply: False only reports; then nothing at all is written.
        grace_s: seconds, see GRACE_S; 0 or more.
        tenant: only this tenant's blobs.
        ref: only this adapter's.
        now_s: the time in seconds since 1970; default the storage's own, or this machine's when nothing is written.
        workers: records looked at at a time, 1 or more.
        on_verdict: called for every group, from the calling thread.

    Raises:
        StoreUnavailableError, StoreRefusedError: the storage. What was removed was dead; run it again.
    """
    if grace_s < 0 or workers < 1:
        raise InvalidReferenceError("A grace is 0 seconds or more, and at least one worker is needed.")
    if apply:
        store.prepare()  # sweeps what dead writers left in a local directory
    now = now_s if now_s is not None else (storage_time(store, grace_s) if apply else time.time())
    result = Collection(apply, grace_s, now)
    doomed: list[str] = []
    for verdict in _verdicts(store, _prefix(tenant, ref), result, workers):
        result.add(verdict)
        if on_verdict is not None:
            on_verdict(verdict)
        if apply and verdict.dead:
            doomed += verdict.group.keys
            if len(doomed) >= PAGE_KEYS:
                result.delete_requests += store.delete_blobs(doomed)
                doomed = []
    if doomed:
        result.delete_requests += store.delete_blobs(doomed)
    _collect_uploads(store, _prefix(tenant, ref), result)
    return result


def _collect_uploads(store: Store, prefix: str, result: Collection) -> None:
    """Look at unfinished uploads. Who may collect blobs, but not see uploads, is told so."""
    judge = _Judge(store, result)
    before_s = result.now_s - result.grace_s
    try:
        for verdict in judge_uploads(store, prefix, before_s=before_s, reason=judge.reason):
            result.add_upload(verdict)
            if result.applied and verdict.dead:
                store.abort_upload(verdict.upload.key, verdict.upload.upload_id)
    except StoreRefusedError as error:
        result.uploads_unseen = error.message


def storage_time(store: Store, grace_s: float = GRACE_S) -> float:
    """Return the storage's time in seconds since 1970, from an object written for it; this machine's when refused."""
    key = CLOCK_PREFIX + uuid.uuid4().hex
    try:
        with tempfile.TemporaryDirectory(prefix="loraplex-") as directory:
            path = Path(directory) / "clock"
            path.write_bytes(b"t")
            store.put_blob(key, path, entry_of("clock", b"t"))
    except StoreRefusedError:
        return time.time()
    found = {blob.key: blob.modified_s for blob in store.blobs(CLOCK_PREFIX)}
    now = found.get(key.removeprefix(CLOCK_PREFIX), time.time())
    old = [CLOCK_PREFIX + name for name, modified_s in found.items() if modified_s < now - grace_s]
    store.delete_blobs([key, *old])
    return now


def _prefix(tenant: str | None, ref: AdapterRef | None) -> str:
    if ref is not None:
        return layout.blobs_prefix(ref)
    return layout.TENANTS_PREFIX if tenant is None else layout.adapters_prefix(tenant)


def _verdicts(store: Store, prefix: str, result: Collection, workers: int) -> Iterator[Verdict]:
    """Yield a verdict for every group, a few being looked at at a time."""
    judge = _Judge(store, result)
    if workers == 1:
        yield from map(judge, _groups(store, prefix))
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="loraplex-gc") as pool:
        flying: deque[Future[Verdict]] = deque()
        try:
            for group in _groups(store, prefix):
                flying.append(pool.submit(judge, group))
                if len(flying) >= 4 * workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()


def _groups(store: Store, prefix: str) -> Iterator[Group]:
    """Yield the groups of blobs below a prefix; a listing is in key order, so each is in one piece."""
    place: tuple[str, str, str] | None = None
    keys: list[str] = []
    size, newest = 0, 0.0
    for blob in store.blobs(prefix):
        parts = (prefix + blob.key).split("/")
        if len(parts) != 7 or parts[4] != "b":
            continue
        here = (parts[1], parts[3], parts[5])
        if keys and (here != place or len(keys) >= PAGE_KEYS):
            yield _group(place, keys, size, newest)
            keys, size, newest = [], 0, 0.0
        place = here
        keys.append(prefix + blob.key)
        size += blob.size
        newest = max(newest, blob.modified_s)
    if keys:
        yield _group(place, keys, size, newest)


def _group(place: tuple[str, str, str] | None, keys: list[str], size: int, newest: float) -> Group:
    assert place is not None
    tenant, adapter, name = place
    parsed = layout.parse_blob_group(name)
    version: Version | None = None if parsed is None else parsed[0]
    try:
        ref = AdapterRef(tenant, adapter, version=version)
    except InvalidReferenceError:  # somebody else's objects under our prefix
        ref, parsed = AdapterRef("unknown", "unknown"), None
    return Group(ref, "" if parsed is None else parsed[1], tuple(keys), size, newest)


class _Judge:
    """Decides about groups; called from many threads."""

    def __init__(self, store: Store, result: Collection) -> None:
        self._store = store
        self._apply = result.applied
        self._grace_s = result.grace_s
        self._now_s = result.now_s

    def __call__(self, group: Group) -> Verdict:
        """Return what becomes of a group; an expired push is fenced first."""
        if not group.pid:
            return Verdict(group, "not a push")
        if group.newest_s > self._now_s - self._grace_s:
            return Verdict(group, "within grace")
        return Verdict(group, self.reason(group.ref, group.pid))

    def reason(self, ref: AdapterRef, pid: str) -> str:
        """Return what becomes of blobs of a version under a push id; a dead push is fenced first."""
        assert ref.version is not None
        try:
            found = get_record(self._store, ref, ref.version)
        except DamagedError:
            return "unreadable"
        if found is None:
            return "purged"
        record, etag = found
        if record.pid != pid:
            return "replaced"
        if isinstance(record, CommittedRecord | DeletingRecord):
            return "live"
        if isinstance(record, DeletedRecord):
            return "deleted" if record.deleted_s + self._grace_s < self._now_s else "deleted recently"
        if isinstance(record, PendingRecord):
            return self._fence(ref, record, etag)
        return "aborted"

    def _fence(self, ref: AdapterRef, record: PendingRecord, etag: str) -> str:
        """Abort an expired push, unless it commits first."""
        if not record.lease_over(self._now_s - self._grace_s):
            return "pushing"
        if self._apply:
            assert ref.version is not None
            key = layout.version_key(ref, ref.version)
            body = AbortedRecord(record.pid, "abandoned").to_bytes()
            try:
                write_conditionally(self._store, key, body, etag=etag)
            except KeyConflictError:
                return "pushing"  # it moved: the next collection looks again
        return "abandoned"
