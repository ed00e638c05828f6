"""`registry.json` at a root: which format lies here, and whether the storage below passed its probe.

```
{"fmt":1,"probe":{"at":"2026-06-01T12:00:00Z","checks":[{"detail":…,"name":…,"ok":true,"required":true}],"passed":true}}
```

Writers ask `require_writable` first. A root in a bucket must carry a probe that passed, since only a probe tells an S3
that keeps conditions from one that ignores them. A directory and memory need none: there the conditions are kept by
our own code. A probe that failed is believed everywhere.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import random
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ConflictError, DamagedError, KeyAbsentError, KeyConflictError, StoreRefusedError
from ..format import layout
from ..format.canonical import StrictJsonError, canonical, exact_object, parse
from .probe import probe
from .probe_report import ProbeReport
from .store import Store, write_conditionally

FORMAT: Final = 1

MARKER_BYTES_MAX: Final = 64 << 10
"""Longest marker, in bytes (64 KiB)."""

_WRITES_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Marker:
    """The marker of a root.

    Attributes:
        report: what the last probe found; None when there was none.
        at: when that was, RFC 3339 in UTC; empty without a probe.
        etag: state it was read in.
    """

    report: ProbeReport | None
    at: str
    etag: str


@dataclass(frozen=True, slots=True)
class Examination:
    """What `examine` did: the report, the marker before, and whether the marker says something new now."""

    report: ProbeReport
    before: Marker | None
    written: bool


def examine(
    store: Store,
    *,
    now: dt.datetime,
    rng: random.Random | None = None,
    writers: int | None = None,
    rounds: int | None = None,
) -> Examination:
    """Probe a storage and note the result in its marker; what `registry doctor` and `registry init` do.

    Args:
        store: the storage; it is prepared first.
        now: when this is, with a time zone.
        rng: see `probe`.
        writers: see `probe`.
        rounds: see `probe`.

    Raises:
        DamagedError: there is a marker that cannot be read.
        StoreUnavailableError, StoreRefusedError: the storage cannot be used at all.
    """
    store.prepare()
    before = read_marker(store)
    sizes = {name: size for name, size in (("writers", writers), ("rounds", rounds)) if size is not None}
    report = probe(store, rng=rng, **sizes)
    if before is not None and before.report is not None and before.report.says_the_same(report):
        return Examination(report, before, written=False)
    write_marker(store, report, now=now)
    return Examination(report, before, written=True)


def initialise(store: Store, *, now: dt.datetime) -> bool:
    """Make a root ready: a bucket is probed and must pass, a directory only gets its marker.

    Returns:
        False when it was ready before.

    Raises:
        StoreRefusedError: the bucket ignores a condition that writing relies on.
        DamagedError: there is a marker that cannot be read.
        StoreUnavailableError: the storage.
    """
    store.prepare()
    marker = read_marker(store)
    if _is_bucket(store):
        if marker is None or marker.report is None:
            examine(store, now=now)
        require_writable(store)
        return marker is None
    if marker is not None:
        return False
    with contextlib.suppress(KeyConflictError):
        store.create(layout.FORMAT_KEY, canonical({"fmt": FORMAT}))
    return True


def require_writable(store: Store) -> None:
    """Refuse to write to a storage whose conditions were found wanting, or to a bucket that was never probed.

    One request; a caller that writes often asks once.

    Raises:
        StoreRefusedError: the sentence names the missing condition.
        DamagedError: the marker cannot be read.
    """
    marker = read_marker(store)
    if marker is not None and marker.report is not None:
        if marker.report.passed:
            return
        first = marker.report.failures[0]
        raise StoreRefusedError(
            f"{store.url} must not be written to: {first.detail.rstrip('.')}. Use another storage, or run "
            "`registry doctor` again once it is mended."
        )
    if _is_bucket(store):
        raise StoreRefusedError(
            f"{store.url} was never probed for conditional writes; run `registry doctor` once."
        )


def _is_bucket(store: Store) -> bool:
    return store.url.startswith("s3:")


def read_marker(store: Store) -> Marker | None:
    """Return the root's marker, None without one.

    Raises:
        DamagedError: it cannot be read, or belongs to a later format.
    """
    try:
        item = store.get(layout.FORMAT_KEY, limit_bytes=MARKER_BYTES_MAX)
    except KeyAbsentError:
        return None
    try:
        value = exact_object(parse(item.body), frozenset({"fmt"}), optional=frozenset({"probe"}))
        if value["fmt"] != FORMAT or isinstance(value["fmt"], bool):
            raise DamagedError(
                f"{store.url} has format {str(value['fmt'])[:16]}, this release reads {FORMAT}; use a newer one."
            )
        return _marker(value, item.etag)
    except StrictJsonError as error:
        raise DamagedError(
            f"{layout.FORMAT_KEY} in {store.url} cannot be read ({error}); remove it and run "
            "`registry doctor`, which writes it anew."
        ) from error


def write_marker(store: Store, report: ProbeReport, *, now: dt.datetime) -> None:
    """Note the result of a probe; the last of several at once wins.

    Raises:
        ConflictError: others keep writing it.
    """
    at = now.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    found = {"passed": report.passed, "at": at, "checks": report.to_json()}
    body = canonical({"fmt": FORMAT, "probe": found})
    for _ in range(_WRITES_MAX):
        current = read_marker(store)
        try:
            write_conditionally(
                store, layout.FORMAT_KEY, body, etag=None if current is None else current.etag
            )
        except KeyConflictError:
            continue
        return
    raise ConflictError(f"Others keep writing {layout.FORMAT_KEY} in {store.url}; try again.")


def _marker(value: dict[str, Any], etag: str) -> Marker:
    if "probe" not in value:
        return Marker(None, "", etag)
    found = exact_object(value["probe"], frozenset({"passed", "at", "checks"}))
    if not isinstance(found["at"], str):
        raise StrictJsonError("the probe has values of a wrong kind")
    report = ProbeReport.from_json(found["checks"])
    if found["passed"] is not report.passed:
        raise StrictJsonError("the probe contradicts its checks")
    return Marker(report, found["at"], etag)
