"""The history of a tag: every statement it ever had, oldest first, and whether each follows from the one before.

Nothing is verified but the chain: a statement taken out, changed or put in is seen, whoever signed it. What is believed
of the newest statement follows from the trust policy, and with it the whole chain behind it. A log that goes on behind
the tag's own generation shows that an older statement was put back.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from ..errors import AdapterNotFoundError, DamagedError, KeyAbsentError
from ..format import layout
from ..format.record import RECORD_BYTES_MAX
from ..format.tags import TagObject, TagStatement, read_tag_log
from ..refs import AdapterRef, Version
from ..signing import envelope_keyids
from ..storage.store import Store
from .tag_state import TagState, read_tag_state

LATER_MAX: Final = 1_000
"""Most statements behind the tag's own generation that are shown."""

_NUMBER = re.compile(r"[0-9]{10}")


@dataclass(frozen=True, slots=True)
class TagEvent:
    """One move. `version` is None where the tag was removed; `fault` says what is wrong with its place, if anything.

    `remark` says what may be wrong and may be not.
    """

    tag: str
    generation: int
    version: Version | None
    digest: str | None
    issued: str
    expires: str
    keyids: tuple[str, ...]
    fault: str | None
    remark: str | None = None

    def to_value(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "tag": self.tag,
            "generation": self.generation,
            "version": self.version,
            "digest": self.digest,
            "issued": self.issued,
            "expires": self.expires or None,
            "keyids": list(self.keyids),
            "fault": self.fault,
            "remark": self.remark,
        }


def tag_history(
    store: Store, ref: AdapterRef, tag: str, *, known: TagState | None = None
) -> Iterator[TagEvent]:
    """Yield every move of a tag, oldest first. One request for the tag, one per earlier move, and a listing.

    `known` is the tag as it was just read, which saves the first request.

    A statement that is missing or damaged is an event with a fault, and so is every one later than the tag's own.

    Raises:
        AdapterNotFoundError: there never was such a tag.
        DamagedError: the tag itself cannot be read.
    """
    state = read_tag_state(store, ref, tag) if known is None else known
    if state is None:
        raise AdapterNotFoundError(
            f"{ref.name}@{tag} is not in {store.url}; `registry ls {ref.name}` shows what is."
        )
    prev = ""
    for generation in range(1, state.statement.generation):
        entry = _read(store, ref, tag, generation)
        if isinstance(entry, str):
            yield TagEvent(tag, generation, None, None, "", "", (), entry)
            prev = "?"
            continue
        yield _event(ref, tag, entry, generation, prev)
        prev = entry.statement.sha256
    later = _later(store, ref, tag, state.statement.generation)
    own = _event(ref, tag, state.tag, state.statement.generation, prev)
    if later and later[0] == state.statement.generation:
        own = _beside_own(store, ref, tag, state.statement, own)
        later = later[1:]
    yield own
    for generation in later:
        found = _read(store, ref, tag, generation)
        event = (
            TagEvent(tag, generation, None, None, "", "", (), found)
            if isinstance(found, str)
            else _event(ref, tag, found, generation, "?")
        )
        stands = f"the tag stands at generation {own.generation}: somebody put that older statement back"
        yield replace(event, fault=event.fault or stands)


def _read(store: Store, ref: AdapterRef, tag: str, generation: int) -> TagObject | str:
    """Return a statement of the log, or why there is none."""
    try:
        item = store.get(layout.tag_log_key(ref, tag, generation), limit_bytes=RECORD_BYTES_MAX)
        return read_tag_log(item.body, where=f"{ref.name}@{tag}")
    except (KeyAbsentError, DamagedError) as error:
        return error.message


def _later(store: Store, ref: AdapterRef, tag: str, generation: int) -> list[int]:
    """Return the generations in the log from the tag's own on, at most LATER_MAX of them."""
    prefix = layout.tag_log_prefix(ref, tag)
    before = layout.tag_log_key(ref, tag, generation - 1).removeprefix(prefix) if generation > 1 else ""
    numbers = (name.removesuffix(".json") for name in store.children(prefix, after=before))
    return [int(number) for number in itertools.islice(numbers, LATER_MAX) if _NUMBER.fullmatch(number)]


def _beside_own(store: Store, ref: AdapterRef, tag: str, statement: TagStatement, own: TagEvent) -> TagEvent:
    """Return the tag's own event, when its generation is in the log already."""
    found = _read(store, ref, tag, statement.generation)
    if isinstance(found, str):
        return replace(own, fault=own.fault or found)
    if found.statement != statement:
        fault = "the log holds another statement of this generation: somebody put this one back"
        return replace(own, fault=own.fault or fault)
    remark = "it is in the log already: a move from here died, or somebody put the tag back by one"
    return replace(own, remark=remark)


def _event(ref: AdapterRef, tag: str, entry: TagObject, generation: int, prev: str) -> TagEvent:
    statement = entry.statement
    fault = None
    if (statement.tenant, statement.adapter, statement.tag) != (ref.tenant, ref.adapter, tag):
        fault = f"it was signed for {statement.tenant}/{statement.adapter}@{statement.tag}"
    elif statement.generation != generation:
        fault = f"it was signed as generation {statement.generation}"
    elif prev != "?" and statement.prev != prev:
        fault = "it does not follow from the statement before"
    digest = f"sha256:{statement.manifest_sha256}" if statement.manifest_sha256 else None
    return TagEvent(
        tag,
        generation,
        statement.version,
        digest,
        statement.issued,
        statement.expires,
        envelope_keyids(entry.envelope),
        fault,
    )
