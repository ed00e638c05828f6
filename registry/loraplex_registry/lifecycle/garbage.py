"""What a collection finds: groups of blobs and unfinished uploads, each with a reason, and their sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ..refs import AdapterRef
from .unfinished import ALIVE, UploadVerdict

GROUPS_SHOWN_MAX: Final = 1000
"""Most groups a report lists one by one; the totals count all."""

KEPT: Final = frozenset({"live", "pushing", "within grace", "deleted recently", "unreadable", "not a push"})
"""Reasons for which blobs are kept; any other reason dooms them."""


@dataclass(frozen=True, slots=True)
class Group:
    """Blobs of one push, at most 1000: keys below the root, bytes, and when the newest was written."""

    ref: AdapterRef
    pid: str
    keys: tuple[str, ...]
    size_bytes: int
    newest_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a group and why: a reason of KEPT, or aborted, abandoned, deleted, replaced, purged."""

    group: Group
    reason: str

    @property
    def dead(self) -> bool:
        """Whether the blobs go."""
        return self.reason not in KEPT


@dataclass(slots=True)
class Tally:
    """Groups, blobs and bytes of one reason."""

    groups: int = 0
    blobs: int = 0
    size_bytes: int = 0


@dataclass(slots=True)
class Collection:
    """What a collection found, and removed when `applied`.

    Attributes:
        tallies: blobs by reason.
        dead: the first GROUPS_SHOWN_MAX dead groups.
        uploads: unfinished uploads that are older than the grace, by reason; their `blobs` are 0.
        dead_uploads: the first GROUPS_SHOWN_MAX dead ones.
        uploads_unseen: why the storage did not show unfinished uploads, as a sentence; "" when it did.
    """

    applied: bool
    grace_s: float
    now_s: float
    tallies: dict[str, Tally] = field(default_factory=dict)
    dead: list[Verdict] = field(default_factory=list)
    delete_requests: int = 0
    uploads: dict[str, Tally] = field(default_factory=dict)
    dead_uploads: list[UploadVerdict] = field(default_factory=list)
    uploads_unseen: str = ""

    def dead_total(self) -> Tally:
        """Return the sum over everything that goes."""
        total = Tally()
        for reason, tally in self.tallies.items():
            if reason not in KEPT:
                total.groups += tally.groups
                total.blobs += tally.blobs
                total.size_bytes += tally.size_bytes
        return total

    def dead_uploads_total(self) -> Tally:
        """Return the sum over the unfinished uploads that go."""
        dead = [tally for reason, tally in self.uploads.items() if reason not in ALIVE]
        return Tally(sum(tally.groups for tally in dead), 0, sum(tally.size_bytes for tally in dead))

    def add_upload(self, verdict: UploadVerdict) -> None:
        """Count a verdict about an unfinished upload."""
        tally = self.uploads.setdefault(verdict.reason, Tally())
        tally.groups += 1
        tally.size_bytes += verdict.upload.size
        if verdict.dead and len(self.dead_uploads) < GROUPS_SHOWN_MAX:
            self.dead_uploads.append(verdict)

    def add(self, verdict: Verdict) -> None:
        """Count a verdict."""
        tally = self.tallies.setdefault(verdict.reason, Tally())
        tally.groups += 1
        tally.blobs += len(verdict.group.keys)
        tally.size_bytes += verdict.group.size_bytes
        if verdict.dead and len(self.dead) < GROUPS_SHOWN_MAX:
            self.dead.append(verdict)
