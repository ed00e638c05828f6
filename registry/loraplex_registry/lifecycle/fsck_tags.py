"""Checking an adapter's tags: what they say, what they point to, and whether their history is whole.

A tag is read before the version it points to, which is the reverse of the order in which they are written; what still
looks wrong is looked at once more, since the tag may just have been moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import DamagedError, KeyAbsentError, TrustError
from ..format import layout
from ..format.record import RECORD_BYTES_MAX, CommittedRecord, DeletedRecord, DeletingRecord, Record
from ..format.tags import TagStatement, read_tag_log
from ..refs import AdapterRef
from ..storage.store import Store
from .findings import Finding, Report
from .tag_state import LOG_ENTRIES_MAX, TagState, read_tag_state
from .versions import get_record


def check_tags(store: Store, ref: AdapterRef, tags: Sequence[str], report: Report) -> None:
    """Check tags and their logs, and add what is found to `report`."""
    for name in tags:
        report.count("tags")
        if _tag_findings(store, ref, name, report):
            report.extend(_tag_findings(store, ref, name, Report()))
    _check_lost_tags(store, ref, set(tags), report)


def content_of(record: Record | None) -> CommittedRecord | None:
    """Return what a version holds, while it is being deleted too; None when it holds nothing."""
    if isinstance(record, DeletingRecord):
        return record.record
    return record if isinstance(record, CommittedRecord) else None


def _tag_findings(store: Store, ref: AdapterRef, name: str, report: Report) -> list[Finding]:
    """Return what is wrong with a tag; reads the tag, then its version, then its log."""
    key = layout.tag_key(ref, name)
    try:
        state = read_tag_state(store, ref, name)
        if state is None:
            return []
        statement = state.statement
        place = (statement.tenant, statement.adapter, statement.tag)
        if place != (ref.tenant, ref.adapter, name):
            raise DamagedError(f"The statement is about {place[0]}/{place[1]}@{place[2]}.")
        return _target_findings(store, ref, key, state) + _log_findings(store, ref, name, statement, report)
    except TrustError as error:
        return [Finding("damage", "tag-unreadable", key, error.message, "set the tag again")]


def _target_findings(store: Store, ref: AdapterRef, key: str, state: TagState) -> list[Finding]:
    version = state.statement.version
    if version is None:
        return []
    try:
        found = get_record(store, ref, version)
    except DamagedError:  # reported where the versions are read
        return []
    record = None if found is None else found[0]
    name = f"{ref.name}@{version}"
    content = content_of(record)
    if content is not None:
        if content.digest != f"sha256:{state.statement.manifest_sha256}":
            return [
                Finding(
                    "damage",
                    "tag-mismatch",
                    key,
                    f"It was signed for another content of {name}.",
                    "set it again",
                )
            ]
        if state.tag.record is not None and state.tag.record != content:
            return [
                Finding(
                    "note",
                    "tag-copy-stale",
                    key,
                    f"Its copy of {name} is older than the version.",
                    "fsck --repair",
                )
            ]
        return []
    if isinstance(record, DeletedRecord):
        reason = f"{name} was deleted while the tag was moved to it, and the mover died."
        return [Finding("warning", "tag-dangling", key, reason, "set the tag again, or registry untag")]
    return [Finding("damage", "tag-dangling", key, f"{name} is not there.", "set the tag again")]


def _log_findings(
    store: Store, ref: AdapterRef, tag: str, statement: TagStatement, report: Report
) -> list[Finding]:
    """Follow the chain from the tag's statement back to the first."""
    prefix = layout.tag_log_prefix(ref, tag)
    names = set(list_bounded(store.children(prefix), what=prefix))
    findings: list[Finding] = []
    prev = statement.prev
    for generation in range(statement.generation - 1, 0, -1):
        key = layout.tag_log_key(ref, tag, generation)
        names.discard(key.removeprefix(prefix))
        try:
            item = store.get(key, limit_bytes=RECORD_BYTES_MAX)
            entry = read_tag_log(item.body, where=f"{ref.name}@{tag}").statement
        except (KeyAbsentError, DamagedError) as error:
            findings.append(
                Finding("damage", "log-gap", key, error.message, "restore the log's entry from a backup")
            )
            return findings
        report.count("log_entries")
        if entry.sha256 != prev or entry.generation != generation:
            reason = "It is not the statement that the next one follows."
            findings.append(Finding("damage", "log-chain", key, reason, "restore it from a backup"))
            return findings
        prev = entry.prev
    own = layout.tag_log_key(ref, tag, statement.generation).removeprefix(prefix)
    later = sorted(names - {own})
    if later:
        reason = f"The log knows {len(later)} later statements: the tag was put back by somebody."
        findings.append(
            Finding("damage", "tag-rolled-back", layout.tag_key(ref, tag), reason, "registry log")
        )
    return findings


def list_bounded(names: Iterator[str], *, what: str) -> Iterator[str]:
    """Yield names, refusing to go on beyond LOG_ENTRIES_MAX.

    Raises:
        DamagedError: there are more.
    """
    for number, name in enumerate(names):
        if number >= LOG_ENTRIES_MAX:
            raise DamagedError(f"{what} has more than {LOG_ENTRIES_MAX} entries.")
        yield name


def _check_lost_tags(store: Store, ref: AdapterRef, tags: set[str], report: Report) -> None:
    """A tag whose log is there must be there itself: tags are never removed."""
    prefix = layout.tag_logs_prefix(ref)
    for name in store.children(prefix):
        tag = name.removesuffix(".json/")
        if tag != name and tag not in tags and read_tag_state(store, ref, tag) is None:
            reason = "The tag is gone, but its log is there."
            report.add(Finding("damage", "tag-missing", prefix + name, reason, "set the tag again"))
