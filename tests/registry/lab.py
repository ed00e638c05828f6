"""A small laboratory: a few adapters checked once, one signer, one policy, and every operation as one short call.

Operations go through the product's own functions; only the directory's validation, which touches no store, is done
beforehand, so that thousands of operations take seconds.
"""

import datetime as dt
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_registry.errors import AdapterNotFoundError
from loraplex_registry.format import layout
from loraplex_registry.format.hashing import FileHasher
from loraplex_registry.lifecycle.content import Content
from loraplex_registry.lifecycle.delete import Deletion, delete_version
from loraplex_registry.lifecycle.findings import Report
from loraplex_registry.lifecycle.fsck import check
from loraplex_registry.lifecycle.fsck_adapter import Depth
from loraplex_registry.lifecycle.garbage import Collection
from loraplex_registry.lifecycle.gc import collect
from loraplex_registry.lifecycle.publish import Outcome, Publication
from loraplex_registry.lifecycle.tagging import TagMove, find_target, move_tag, untag
from loraplex_registry.refs import AdapterRef, Version
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage.store import Store
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.base import CARD_NAME, BaseModel
from loraplex_registry.validation.weights import WEIGHTS_NAME, validate_adapter
from tests.registry import builders
from tests.registry.blobs import read_blob

CONTENTS = 4
NOW = dt.datetime(2100, 1, 1, 12, 0, 0, tzinfo=dt.UTC)
"""Later than any real storage's clock, so that collections find what real stores hold old enough."""


def no_sleep(_: float) -> None:
    """Do not wait."""


@dataclass
class Lab:
    """What operations need. `now` may be moved on."""

    signer: Signer
    other: Signer
    policy: TrustPolicy
    contents: list[Content]
    directories: list[Path]
    now: dt.datetime = NOW
    digests: dict[int, str] = field(default_factory=dict)

    @classmethod
    def build(cls, place: Path) -> "Lab":
        """Make keys, a base and the adapters below a directory."""
        signer, other = builders.make_signer(place, "acme"), builders.make_signer(place, "second")
        base = builders.load_base(place / "base")
        directories = [
            builders.make_adapter(place / f"adapter-{seed}", seed=seed, rank=1) for seed in range(CONTENTS)
        ]
        contents = [_content(directory, base) for directory in directories]
        lab = cls(signer, other, builders.acme_policy(place), contents, directories)
        for index, content in enumerate(contents):
            entry = next(file for file in content.files if file.name == WEIGHTS_NAME)
            lab.digests[index] = entry.sha256
        return lab

    def pulled(self, content: int) -> Path:
        """Return a directory with an adapter's files and its base card, as `registry pull` leaves it."""
        place = self.directories[content].with_name(f"pulled-{content}")
        if not place.exists():
            shutil.copytree(self.directories[content], place)
            (place / CARD_NAME).write_bytes(self.contents[content].card)
        return place

    def push(
        self,
        store: Store,
        ref: AdapterRef,
        content: int,
        *,
        version: Version | None = None,
        tag: str | None = None,
        expect: int | str | None = None,
    ) -> tuple[Outcome, TagMove | None]:
        """Publish one of the adapters."""
        publication = Publication(store, ref, self.contents[content], [self.signer], self.now)
        if tag is not None:
            publication.look_at_tag(tag, expect)
        outcome = publication.run(version=version, progress=None)
        if tag is None:
            return outcome, None
        return outcome, publication.move_tag(tag, outcome, expect=expect, expires="")

    def tag(
        self, store: Store, ref: AdapterRef, version: Version, tag: str, *, expect: int | str | None = None
    ) -> TagMove:
        """Move a tag to a version."""
        target = find_target(store, AdapterRef(ref.tenant, ref.adapter, version=version))
        return move_tag(store, ref, tag, target, [self.signer], now=self.now, expect=expect, sleep=no_sleep)

    def untag(self, store: Store, ref: AdapterRef, tag: str) -> TagMove | None:
        """Remove a tag."""
        return untag(store, ref, tag, [self.signer], now=self.now, sleep=no_sleep)

    def delete(self, store: Store, ref: AdapterRef, version: Version, *, force: bool = False) -> Deletion:
        """Delete a version."""
        name = AdapterRef(ref.tenant, ref.adapter, version=version)
        return delete_version(store, name, by="lab", now=self.now, force=force, signers=[self.signer])

    def gc(
        self, store: Store, *, grace_s: float = 0.0, apply: bool = True, ahead_s: float = 0.0
    ) -> Collection:
        """Collect garbage, with a clock that may run ahead."""
        now_s = self.now.timestamp() + ahead_s
        return collect(store, apply=apply, grace_s=grace_s, now_s=now_s, workers=1)

    def fsck(self, store: Store) -> Report:
        """Check everything, every byte and every signature's form."""
        return check(store, Depth(self.now, deep=True), workers=1)

    def read(self, store: Store, ref: AdapterRef) -> tuple[Version, int]:
        """Resolve, verify and read a reference; return its version and which adapter it is.

        Raises:
            AdapterNotFoundError: there is no such thing.
            AssertionError: the bytes are not those of any adapter published.
        """
        registry = Registry(store, clock=lambda: self.now)
        resolved = registry.resolve(ref)
        verified = registry.verify(resolved, self.policy)
        hasher = FileHasher()
        blob = verified.record.file(WEIGHTS_NAME)
        key = f"{layout.adapter_prefix(ref)}{blob.blob}"
        for piece in read_blob(store, key, size_bytes=blob.size):
            hasher.update(piece)
        found = hasher.entry(WEIGHTS_NAME).sha256
        assert found == blob.sha256, f"{ref} has other bytes than were signed"
        index = next(index for index, digest in self.digests.items() if digest == found)
        return resolved.version, index

    def read_or_none(self, store: Store, ref: AdapterRef) -> tuple[Version, int] | None:
        """Like `read`; None when there is no such thing."""
        try:
            return self.read(store, ref)
        except AdapterNotFoundError:
            return None


def _content(directory: Path, base: BaseModel) -> Content:
    return Content(directory, validate_adapter(directory, base), base, base.to_json())
