"""Unfinished uploads in parts, the garbage that no listing of objects shows: which of them nobody will complete.

| record of the version   | an upload of this push id, begun longer ago than the grace                       |
|-------------------------|----------------------------------------------------------------------------------|
| pending                 | alive; beyond lease and grace: dead, once the push is fenced                     |
| unreadable              | alive, whatever it may be; `registry fsck` tells                                 |
| committed, deleting     | dead: a push commits when its uploads are complete, so this is one begun twice   |
| anything else, none     | dead, as blobs of this push id would be                                          |

What `fsck --repair` uploads for a committed version goes under a push id that the record does not have yet; the grace
is what protects it, as it protects its blobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from ..errors import InvalidReferenceError
from ..format import layout
from ..refs import AdapterRef
from ..storage.store import Store, StoredUpload

ALIVE: Final = frozenset({"pushing", "unreadable", "not a push"})
"""Reasons for which an upload is left alone."""

_OF_BLOBS: Final = {"live": "completed", "deleted recently": "deleted"}  # blobs may be read, parts may not


@dataclass(frozen=True, slots=True)
class UploadVerdict:
    """What becomes of an unfinished upload and why: a reason of ALIVE, or one for which it goes.

    Attributes:
        ref: tenant, adapter and version.
        pid: push id, empty when the key is no push's.
        upload: key, id, bytes and age.
        reason: as for blobs (see `gc`), and "completed" for one of a committed push.
    """

    ref: AdapterRef
    pid: str
    upload: StoredUpload
    reason: str

    @property
    def dead(self) -> bool:
        """Whether the upload goes."""
        return self.reason not in ALIVE


def place_of(key: str) -> tuple[AdapterRef, str] | None:
    """Return whose blob a key below the root is: the version and the push id; None when it is no push's."""
    parts = key.split("/")
    if len(parts) != 7 or (parts[0], parts[2], parts[4]) != ("t", "a", "b"):
        return None
    group = layout.parse_blob_group(parts[5])
    try:
        return None if group is None else (AdapterRef(parts[1], parts[3], version=group[0]), group[1])
    except InvalidReferenceError:  # somebody else's, under our prefix
        return None


def judge_uploads(
    store: Store, prefix: str, *, before_s: float, reason: Callable[[AdapterRef, str], str]
) -> Iterator[UploadVerdict]:
    """Yield a verdict for every unfinished upload below a prefix that was begun before a time.

    Args:
        store: where.
        prefix: as `layout` builds them.
        before_s: seconds since 1970, by the storage's clock.
        reason: says what becomes of blobs of a version under a push id, and fences a dead push; see `gc`.

    Raises:
        StoreUnavailableError, StoreRefusedError: the storage.
    """
    nobody = AdapterRef("unknown", "unknown")
    for upload in store.uploads(prefix, before_s=before_s):
        place = place_of(upload.key)
        if place is None:
            yield UploadVerdict(nobody, "", upload, "not a push")
            continue
        why = reason(*place)
        yield UploadVerdict(*place, upload, _OF_BLOBS.get(why, why))
