"""Checking a whole registry: whether everything acknowledged can be read, and what was left half-done.

Looks at the marker of the root and, for every tenant, at the revocation list, the audit log and every adapter. Changes
nothing, and may run while the registry is in use. Repairing is in `repair`.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from ..errors import DamagedError, InvalidReferenceError, KeyAbsentError, TrustError
from ..format import layout
from ..format.canonical import StrictJsonError, b64decode, parse_canonical
from ..format.record import FORMAT, RECORD_BYTES_MAX
from ..refs import AdapterRef, check_name
from ..storage.store import Store
from .audit import AuditLog
from .audit_entry import AuditEntry
from .findings import TOLD_MAX, Finding, Report, refused
from .fsck_adapter import Depth, check_adapter

WORKERS: Final = 8
"""Adapters checked at a time."""


def check(
    store: Store,
    depth: Depth,
    *,
    tenant: str | None = None,
    ref: AdapterRef | None = None,
    workers: int = WORKERS,
) -> Report:
    """Check a registry, a tenant or an adapter.

    Requests per adapter: three listings, one read per version, two per tag and one per move of a tag; when deep, every
    blob is read. Memory is bounded by the largest adapter, and TOLD_MAX names of tags.

    Args:
        store: where.
        depth: how far to go.
        tenant: only this one.
        ref: only this adapter.
        workers: adapters at a time, 1 or more.

    Raises:
        StoreUnavailableError, StoreRefusedError: the storage; a check that could not see everything says nothing.
    """
    report = Report()
    if ref is not None:
        check_adapter(store, ref, depth, report)
        return report
    if tenant is None:
        _check_root(store, report)
    tenants = [tenant] if tenant is not None else _names(store, layout.TENANTS_PREFIX, report)
    told: dict[str, int] = {}
    for name in tenants:
        report.count("tenants")
        _check_revocations(store, name, depth, report)
        # Before the tags are read: a tag that moves meanwhile is then ahead of what is told of it, never behind.
        _check_audit(store, name, report, told)
    _each_adapter(store, [tenant] if tenant else None, replace(depth, told=told), report, workers)
    return report


def adapters_of(store: Store, tenant: str, report: Report) -> Iterator[AdapterRef]:
    """Yield a tenant's adapters; anything else below its prefix is a note."""
    for name in _names(store, layout.adapters_prefix(tenant), report):
        yield AdapterRef(tenant, name)


def _each_adapter(
    store: Store, tenants: list[str] | None, depth: Depth, report: Report, workers: int
) -> None:
    def refs() -> Iterator[AdapterRef]:
        for tenant in tenants or list(_names(store, layout.TENANTS_PREFIX, Report())):
            yield from adapters_of(store, tenant, report)

    if workers == 1:
        for ref in refs():
            check_adapter(store, ref, depth, report)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="loraplex-fsck") as pool:
        flying: deque[Future[None]] = deque()
        try:
            for ref in refs():
                flying.append(pool.submit(check_adapter, store, ref, depth, report))
                if len(flying) >= 4 * workers:
                    flying.popleft().result()
            while flying:
                flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()


def _names(store: Store, prefix: str, report: Report) -> Iterator[str]:
    for name in store.children(prefix):
        stem = name.removesuffix("/")
        try:
            check_name("name", stem)
        except InvalidReferenceError:
            stem = name
        if stem == name:
            reason = "It is no part of a registry."
            report.add(Finding("note", "stranger", prefix + name, reason))
        else:
            yield stem


def _check_root(store: Store, report: Report) -> None:
    try:
        value = parse_canonical(store.get(layout.FORMAT_KEY, limit_bytes=RECORD_BYTES_MAX).body)
        if not isinstance(value, dict) or value.get("fmt") != FORMAT:
            raise StrictJsonError(f"fmt is not {FORMAT}")
    except KeyAbsentError:
        reason = "The root has no marker of its format."
        report.add(Finding("note", "format-missing", layout.FORMAT_KEY, reason, "registry init"))
    except (StrictJsonError, DamagedError) as error:
        reason = f"The root's marker cannot be read ({error})."
        report.add(
            Finding("damage", "format-unreadable", layout.FORMAT_KEY, reason, "restore it from a backup")
        )


def _check_revocations(store: Store, tenant: str, depth: Depth, report: Report) -> None:
    from ..trust.revocations import parse_revocations

    key = layout.revocations_key(tenant)
    try:
        found = parse_revocations(store.get(key, limit_bytes=RECORD_BYTES_MAX).body, tenant=tenant)
        report.count("revocation_lists")
    except KeyAbsentError:
        return
    except TrustError as error:
        report.add(
            Finding("damage", "revocations-unreadable", key, error.message, "restore it from a backup")
        )
        return
    try:
        if depth.judge_list is not None:
            depth.judge_list(tenant, found)
    except TrustError as error:
        report.add(refused("revocations-not-trusted", key, error))


def _note_move(entry: AuditEntry, told: dict[str, int]) -> None:
    generation, name = dict(entry.detail).get("generation", ""), entry.subject
    moved = entry.action in ("tag", "untag") and name.startswith(f"{entry.tenant}/")
    if moved and re.fullmatch(r"[0-9]{1,9}", generation) and (name in told or len(told) < TOLD_MAX):
        told[name] = max(told.get(name, 0), int(generation))


def _check_audit(store: Store, tenant: str, report: Report, told: dict[str, int]) -> None:
    """Follow the audit log's chain and note in `told` how far it saw each tag move.

    `registry audit verify` checks its signatures too.
    """
    count, head = 0, ""
    for number, body in AuditLog(store, tenant).bodies():
        key = layout.audit_key(tenant, number)
        report.count("audit_entries")
        if number != count + 1:
            reason = f"Entry {count + 1} is missing."
            report.add(Finding("damage", "audit-gap", key, reason, "restore it from a backup"))
        try:
            value = parse_canonical(body)
            entry = AuditEntry.from_bytes(b64decode(value["entry"]["payload"]))
            if (entry.tenant, entry.number) != (tenant, number):
                raise StrictJsonError(f"it is number {entry.number} of {entry.tenant}")
            if number == count + 1 and entry.prev != head:
                raise StrictJsonError("it does not follow from the entry before")
            _note_move(entry, told)
        except (StrictJsonError, KeyError, TypeError) as error:
            reason = f"The entry is damaged ({error})."
            report.add(Finding("damage", "audit-damaged", key, reason, "restore it from a backup"))
        count, head = number, hashlib.sha256(body).hexdigest()
