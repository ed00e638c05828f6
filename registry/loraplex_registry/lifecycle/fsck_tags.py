"""Checking an adapter's tags: what they say, what they point to, and whether their history is whole.

A tag is read before the version it points to, which is the reverse of the order in which they are written; what still
looks wrong is looked at once more, since the tag may just have been moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ..errors import DamagedError, KeyAbsentError, RankTooLargeError, TrustError
from ..format import layout
from ..format.record import RECORD_BYTES_MAX, CommittedRecord, DeletedRecord, DeletingRecord, Record
from ..format.tags import TagObject, TagStatement, read_tag_log
from ..refs import AdapterRef
from ..storage.store import Store
from .findings import Finding, Report, refused
from .tag_state import LOG_ENTRIES_MAX, TagState, read_tag_state
from .versions import get_record

TagJudge = Callable[[AdapterRef, TagObject], None]
"""Raises a TrustError when a tag, or what it leads to, is not one the policy accepts."""


def check_tags(
    store: Store,
    ref: AdapterRef,
    tags: Sequence[str],
    report: Report,
    *,
    judge: TagJudge | None = None,
    told: Mapping[str, int] | None = None,
) -> None:
    """Check tags and their logs, and add what is found to `report`.

    Args:
        store: where.
        ref: the adapter.
        tags: their names.
        report: what is added to.
        judge: decides about signatures, when given.
        told: the highest generation of tags that the audit log tells of.
    """
    for name in tags:
        report.count("tags")
        if _tag_findings(store, ref, name, report, judge, told or {}):
            report.extend(_tag_findings(store, ref, name, Report(), judge, told or {}))
    _check_lost_tags(store, ref, set(tags), report)


def content_of(record: Record | None) -> CommittedRecord | None:
    """Return what a version holds, while it is being deleted too; None when it holds nothing."""
    if isinstance(record, DeletingRecord):
        return record.record
    return record if isinstance(record, CommittedRecord) else None


def _tag_findings(
    store: Store,
    ref: AdapterRef,
    name: str,
    report: Report,
    judge: TagJudge | None,
    told: Mapping[str, int],
) -> list[Finding]:
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
        found = _target_findings(store, ref, key, state)
        found += _log_findings(store, ref, name, statement, report, told.get(f"{ref.name}@{name}", 0))
        return found + _judged(judge, AdapterRef(ref.tenant, ref.adapter, tag=name), key, state)
    except TrustError as error:
        return [Finding("damage", "tag-unreadable", key, error.message, "set the tag again")]


def _judged(judge: TagJudge | None, ref: AdapterRef, key: str, state: TagState) -> list[Finding]:
    if judge is None:
        return []
    try:
        judge(ref, state.tag)
    except (TrustError, RankTooLargeError) as error:
        return [refused("tag-not-trusted", key, error)]
    return []


def _target_findings(store: Store, ref: AdapterRef, key: str, state: TagState) -> list[Finding]:
    version, signed = state.statement.version, f"sha256:{state.statement.manifest_sha256}"
    if version is None:
        return []
    if state.tag.record is not None and state.tag.record.digest != signed:
        reason = f"It carries another content of {ref.name}@{version} than it was signed for."
        return [Finding("damage", "tag-mismatch", key, reason, "set it again")]
    try:
        found = get_record(store, ref, version)
    except DamagedError:  # reported where the versions are read
        return []
    record = None if found is None else found[0]
    name = f"{ref.name}@{version}"
    content = content_of(record)
    if content is not None:
        if content.digest != signed:
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
        advice = "fsck --repair, set the tag again, or registry untag"
        return [Finding("warning", "tag-dangling", key, reason, advice)]
    return [Finding("damage", "tag-dangling", key, f"{name} is not there.", "set the tag again")]


def _log_findings(
    store: Store, ref: AdapterRef, tag: str, statement: TagStatement, report: Report, told: int
) -> list[Finding]:
    """Follow the chain from the tag's statement back to the first, and look for statements that came after it."""
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
    return findings + _behind(store, ref, tag, statement, names, told)


def _behind(
    store: Store, ref: AdapterRef, tag: str, statement: TagStatement, names: set[str], told: int
) -> list[Finding]:
    """Return what says that the tag stands behind its own history: somebody put an older statement back.

    Its own statement in the log, and nothing later, is also what a mover leaves that died before its swap.
    """
    key, generation = layout.tag_key(ref, tag), statement.generation
    own = layout.tag_log_key(ref, tag, generation)
    later = sorted(names - {own.removeprefix(layout.tag_log_prefix(ref, tag))})
    advice = "registry log; restore the newest statement from the bucket's history"
    if later or told > generation:
        whose = f"its log knows {len(later)} later statements" if later else f"the audit log tells of {told}"
        reason = f"It is at generation {generation}, and {whose}: the tag was put back by somebody."
        return [Finding("damage", "tag-rolled-back", key, reason, advice)]
    if len(names) == len(later):
        return []
    try:
        item = store.get(own, limit_bytes=RECORD_BYTES_MAX)
        same = read_tag_log(item.body, where=f"{ref.name}@{tag}").statement == statement
    except (KeyAbsentError, DamagedError) as error:
        return [Finding("damage", "log-gap", own, error.message, "restore the log's entry from a backup")]
    if not same:
        reason = (
            f"The log holds another statement of generation {generation}: the tag was put back by somebody."
        )
        return [Finding("damage", "tag-rolled-back", key, reason, advice)]
    reason = (
        f"The log holds its generation {generation} already: a move died before it was done, or somebody put the tag "
        "back by one."
    )
    return [
        Finding("warning", "tag-behind-log", key, reason, "set the tag again, if registry log shows no fault")
    ]


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
