"""The history of a tag: every statement it ever had, oldest first, and whether each follows from the one before.

Nothing is verified but the chain: a statement taken out, changed or put in is seen, whoever signed it. What is believed
of the newest statement follows from the trust policy, and with it the whole chain behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterNotFoundError, DamagedError, KeyAbsentError
from ..format import layout
from ..format.record import RECORD_BYTES_MAX
from ..format.tags import TagObject, read_tag_log
from ..refs import AdapterRef, Version
from ..signing import envelope_keyids
from ..storage.store import Store
from .tag_state import read_tag_state


@dataclass(frozen=True, slots=True)
class TagEvent:
    """One move. `version` is None where the tag was removed; `fault` says what is wrong with its place, if anything."""

    tag: str
    generation: int
    version: Version | None
    digest: str | None
    issued: str
    expires: str
    keyids: tuple[str, ...]
    fault: str | None

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
        }


def tag_history(store: Store, ref: AdapterRef, tag: str) -> Iterator[TagEvent]:
    """Yield every move of a tag, oldest first. One request for the tag, then one per earlier move.

    A statement that is missing or damaged is an event with a fault.

    Raises:
        AdapterNotFoundError: there never was such a tag.
        DamagedError: the tag itself cannot be read.
    """
    state = read_tag_state(store, ref, tag)
    if state is None:
        raise AdapterNotFoundError(
            f"{ref.name}@{tag} is not in {store.url}; `registry ls {ref.name}` shows what is."
        )
    prev = ""
    for generation in range(1, state.statement.generation):
        try:
            item = store.get(layout.tag_log_key(ref, tag, generation), limit_bytes=RECORD_BYTES_MAX)
            entry = read_tag_log(item.body, where=f"{ref.name}@{tag}")
        except (KeyAbsentError, DamagedError) as error:
            yield TagEvent(tag, generation, None, None, "", "", (), error.message)
            prev = "?"
            continue
        yield _event(ref, tag, entry, generation, prev)
        prev = entry.statement.sha256
    yield _event(ref, tag, state.tag, state.statement.generation, prev)


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
