"""Publishing: from a directory to one committed record, in a number of requests that can be counted.

```
check -> choose a version and reserve it -> upload blobs -> commit -> move the tag
```

Publishing the same bytes again finds the committed version and changes nothing. Whatever crashes between two steps,
running the same command again completes it. After a commit with an unknown end nothing is deleted, ever.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import layout
from .base import CARD_NAME, BaseModel, Progress
from .errors import (
    ConflictError,
    DamagedError,
    InvalidReferenceError,
    KeyAbsentError,
    KeyConflictError,
    RegistryError,
    SignatureInvalidError,
    StoreError,
)
from .manifest import BaseEntry, FileEntry, LoraEntry, Manifest
from .record import (
    INLINE_FILE_BYTES_MAX,
    INLINE_TOTAL_BYTES_MAX,
    LEASE_S,
    RECORD_BYTES_MAX,
    AbortedRecord,
    CommittedRecord,
    PendingRecord,
    Record,
    StoredFile,
    read_record,
)
from .refs import VERSION_MAX, AdapterRef
from .signing import Signer, sign_files, verify_bundle
from .store import BlobProgress, Item, Store, write_conditionally
from .tags import GENERATION_MAX, TagStatement, make_tag, read_tag
from .weights import MANIFEST_NAME, AdapterFacts, read_small

CHOICES_MAX: Final = 32
"""How often another version number is tried when rivals take them."""

TAG_MOVES_MAX: Final = 5
"""How often a tag move is rebuilt when rivals move it."""

VERSIONS_MAX: Final = 100_000
"""Most versions of one adapter that are listed."""


class CountingStore:
    """A store that counts requests; the rest is passed through. One per operation, used by one thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.requests = 0

    @property
    def url(self) -> str:
        """See `Store.url`."""
        return self._store.url

    def prepare(self) -> None:
        """See `Store.prepare`."""
        self._store.prepare()

    def get(self, key: str, *, limit_bytes: int) -> Item:
        """See `Store.get`."""
        self.requests += 1
        return self._store.get(key, limit_bytes=limit_bytes)

    def create(self, key: str, body: bytes) -> str:
        """See `Store.create`."""
        self.requests += 1
        return self._store.create(key, body)

    def swap(self, key: str, body: bytes, *, etag: str) -> str:
        """See `Store.swap`."""
        self.requests += 1
        return self._store.swap(key, body, etag=etag)

    def put_blob(self, key: str, path: Path, file: FileEntry, *, progress: BlobProgress | None = None) -> int:
        """See `Store.put_blob`."""
        requests = self._store.put_blob(key, path, file, progress=progress)
        self.requests += requests
        return requests

    def read_blob(self, key: str, *, size_bytes: int) -> Iterator[bytes]:
        """See `Store.read_blob`."""
        self.requests += 1
        return self._store.read_blob(key, size_bytes=size_bytes)

    def children(self, prefix: str) -> Iterator[str]:
        """See `Store.children`; counted as one request."""
        self.requests += 1
        return self._store.children(prefix)


@dataclass(frozen=True, slots=True)
class Content:
    """An adapter ready to be published: facts about its files, the base it is for, and the base card's bytes."""

    directory: Path
    facts: AdapterFacts
    base: BaseModel
    card: bytes

    @property
    def files(self) -> list[FileEntry]:
        """All files of the version, sorted by name."""
        card = FileEntry(CARD_NAME, len(self.card), hashlib.sha256(self.card).hexdigest())
        return sorted([*self.facts.files, card], key=lambda file: file.name)

    def manifest(self, ref: AdapterRef, version: int, created: str) -> Manifest:
        """Return the manifest these files get as `version` of `ref`."""
        facts, base = self.facts, self.base
        return Manifest(
            tenant=ref.tenant,
            adapter=ref.adapter,
            version=version,
            created=created,
            base_model=BaseEntry(
                base.name, base.digest, base.vocab_size, base.hidden_size, base.max_position
            ),
            lora=LoraEntry(
                rank=facts.rank,
                r=facts.config.r,
                alpha=facts.alpha,
                rslora=facts.config.rslora,
                dtype=facts.dtype,
                target_modules=facts.target_modules,
                n_tensors=facts.n_tensors,
                n_params=facts.n_params,
            ),
            files=tuple(self.files),
        )


@dataclass(frozen=True, slots=True)
class Reservation:
    """A pending record of ours: its version, push id and the etag the commit must find."""

    version: int
    pid: str
    etag: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The committed record at `version`; `created` says whether this call made it."""

    version: int
    record: CommittedRecord
    created: bool


class Publication:
    """One publish call: holds what all its steps share. Used by one thread, once."""

    def __init__(
        self, store: CountingStore, ref: AdapterRef, content: Content, signer: Signer, now: dt.datetime
    ) -> None:
        self._store = store
        self._ref = ref
        self._content = content
        self._signer = signer
        self._now = now
        self._created = now.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def run(self, *, version: int | None, progress: Progress | None) -> Outcome:
        """Commit the content, or find it committed.

        Args:
            version: the version wanted; None for the next free one.
            progress: called with phase "upload".

        Raises:
            ConflictError: the version exists with other content, or another push holds it.
        """
        self._store.prepare()
        chosen = self._choose(version)
        if isinstance(chosen, Outcome):
            return chosen
        with self._aborted_on_failure(chosen):
            record = self._upload(chosen, progress)
        try:
            write_conditionally(self._store, self._key(chosen.version), record.to_bytes(), etag=chosen.etag)
        except KeyConflictError as error:
            raise ConflictError(
                f"Another push took over {self._name(chosen.version)} before this one was done; push again."
            ) from error
        return Outcome(chosen.version, record, created=True)

    def move_tag(self, tag: str, outcome: Outcome) -> bool:
        """Make `tag` point to the outcome; return False when it does already.

        Raises:
            ConflictError: other writers kept moving it.
        """
        key = layout.tag_key(self._ref, tag)
        for _ in range(TAG_MOVES_MAX):
            current = self._get(key)
            before = (
                None if current is None else read_tag(current.body, where=f"{self._ref.name}@{tag}").statement
            )
            if before is not None and before.manifest_sha256 == outcome.record.digest.removeprefix("sha256:"):
                return False
            statement = self._statement(tag, outcome, before)
            body = make_tag(statement, outcome.record, self._signer).to_bytes()
            with contextlib.suppress(KeyConflictError):
                write_conditionally(self._store, key, body, etag=None if current is None else current.etag)
                return True
        raise ConflictError(
            f"Tag {self._ref.name}@{tag} keeps being moved by others; look at it and set it again."
        )

    def _choose(self, wanted: int | None) -> Reservation | Outcome:
        """Reserve a version, or find the content committed already."""
        newest = self._newest() if wanted is None else None
        version = wanted or newest or 1
        for _ in range(CHOICES_MAX):
            # The newest is looked at first: it may hold this content. A number believed free is simply reserved.
            found = self._try_version(version, may_skip=wanted is None, look_first=version == newest)
            if found is not None:
                return found
            version += 1
            if version > VERSION_MAX:
                break
        raise ConflictError(f"No free version of {self._ref.name} was found; push again.")

    def _try_version(self, version: int, *, may_skip: bool, look_first: bool) -> Reservation | Outcome | None:
        """Look at one version: ours now, committed with this content, or None to go on to the next."""
        key = self._key(version)
        item = self._get(key) if look_first else None
        if item is None:
            with contextlib.suppress(KeyConflictError):
                return self._reserve(version, etag=None)
            item = self._get(key)
            if item is None:
                return None
        record = read_record(item.body, version=version, where=self._name(version))
        if isinstance(record, CommittedRecord):
            if self._is_this(record):
                return Outcome(version, record, created=False)
            _skip(f"{self._name(version)} exists with other content; push a new version.", may_skip=may_skip)
            return None
        if isinstance(record, PendingRecord) and not record.lease_over(self._now.timestamp()):
            _skip(
                f"{self._name(version)} is being pushed by key {record.by[:16]}…; wait for it.",
                may_skip=may_skip,
            )
            return None
        try:
            return self._take_over(version, record, item.etag)
        except KeyConflictError:
            _skip(f"{self._name(version)} was taken by another push; push again.", may_skip=may_skip)
            return None

    def _take_over(self, version: int, record: Record, etag: str) -> Reservation:
        if isinstance(record, PendingRecord):
            body = AbortedRecord(record.pid, "lease over").to_bytes()
            etag = self._store.swap(self._key(version), body, etag=etag)
        return self._reserve(version, etag=etag)

    def _reserve(self, version: int, *, etag: str | None) -> Reservation:
        pid = uuid.uuid4().hex
        body = PendingRecord(pid, self._signer.keyid, int(self._now.timestamp()), LEASE_S).to_bytes()
        return Reservation(
            version, pid, write_conditionally(self._store, self._key(version), body, etag=etag)
        )

    @contextlib.contextmanager
    def _aborted_on_failure(self, reservation: Reservation) -> Iterator[None]:
        """Give the version free at once when the upload fails.

        Safe because no commit was tried yet: the swap only succeeds on our own pending record.
        """
        try:
            yield
        except BaseException as error:
            reason = error.code if isinstance(error, RegistryError) else "interrupted"
            body = AbortedRecord(reservation.pid, reason).to_bytes()
            with contextlib.suppress(StoreError):
                self._store.swap(self._key(reservation.version), body, etag=reservation.etag)
            raise

    def _upload(self, reservation: Reservation, progress: Progress | None) -> CommittedRecord:
        """Store every file and return the record to commit."""
        manifest = self._content.manifest(self._ref, reservation.version, self._created)
        manifest_bytes = manifest.to_bytes()
        signed = {file.name: file.sha256 for file in manifest.files}
        signed[MANIFEST_NAME] = hashlib.sha256(manifest_bytes).hexdigest()
        bundle = sign_files(signed, self._signer, subject=self._name(reservation.version))
        meter = _Meter(progress, total=sum(file.size for file in self._content.files if not _is_inline(file)))
        files: list[StoredFile] = []
        inline_left = INLINE_TOTAL_BYTES_MAX
        for file in self._content.files:
            stored = self._store_file(file, reservation, files, meter, inline_left=inline_left)
            inline_left -= len(stored.inline or b"")
            files.append(stored)
        return CommittedRecord(reservation.pid, manifest_bytes, bundle, tuple(files))

    def _store_file(
        self,
        file: FileEntry,
        reservation: Reservation,
        before: list[StoredFile],
        meter: _Meter,
        *,
        inline_left: int,
    ) -> StoredFile:
        if _is_inline(file) and file.size <= inline_left:
            return StoredFile(file.name, file.size, file.sha256, inline=self._inline_bytes(file))
        index = sum(entry.blob is not None for entry in before)
        blob = layout.blob_name(reservation.version, reservation.pid, index)
        with self._source(file) as path:
            self._store.put_blob(layout.adapter_prefix(self._ref) + blob, path, file, progress=meter.add)
        return StoredFile(file.name, file.size, file.sha256, blob=blob)

    def _inline_bytes(self, file: FileEntry) -> bytes:
        if file.name == CARD_NAME:
            return self._content.card
        body = read_small(self._content.directory / file.name, limit_bytes=file.size)
        if hashlib.sha256(body).hexdigest() != file.sha256:
            raise ConflictError(f"{file.name} changed while it was published; leave it alone and push again.")
        return body

    @contextlib.contextmanager
    def _source(self, file: FileEntry) -> Iterator[Path]:
        """Yield a path holding a file's bytes; a base card too long to inline is written out for the upload."""
        if file.name != CARD_NAME:
            yield self._content.directory / file.name
            return
        import tempfile

        with tempfile.TemporaryDirectory(prefix="loraplex-") as directory:
            path = Path(directory) / CARD_NAME
            path.write_bytes(self._content.card)
            yield path

    def _is_this(self, record: CommittedRecord) -> bool:
        """Say whether a record holds this content, signed with this key."""
        try:
            found = record.manifest_unverified()
            ours = self._content.manifest(self._ref, found.version, found.created)
            verify_bundle(record.bundle, self._signer.public_key)
        except SignatureInvalidError:
            return False
        return found == ours

    def _statement(self, tag: str, outcome: Outcome, before: TagStatement | None) -> TagStatement:
        generation = 1 if before is None else before.generation + 1
        if generation >= GENERATION_MAX:
            raise DamagedError(
                f"Tag {self._ref.name}@{tag} has an impossible generation; look into the store."
            )
        return TagStatement(
            tenant=self._ref.tenant,
            adapter=self._ref.adapter,
            tag=tag,
            generation=generation,
            version=outcome.version,
            manifest_sha256=outcome.record.digest.removeprefix("sha256:"),
            prev="" if before is None else before.sha256,
            issued=self._created,
        )

    def _newest(self) -> int | None:
        return max(list_versions(self._store, self._ref), default=None)

    def _get(self, key: str) -> Item | None:
        try:
            return self._store.get(key, limit_bytes=RECORD_BYTES_MAX)
        except KeyAbsentError:
            return None

    def _key(self, version: int) -> str:
        return layout.version_key(self._ref, version)

    def _name(self, version: int) -> str:
        return f"{self._ref.name}@{version}"


def list_versions(store: Store, ref: AdapterRef) -> list[int]:
    """Return the version numbers that have a record, in no particular order; one LIST request per 1000.

    Raises:
        DamagedError: more than VERSIONS_MAX.
    """
    versions: list[int] = []
    for name in store.children(layout.versions_prefix(ref)):
        if len(versions) >= VERSIONS_MAX:
            raise DamagedError(f"{ref.name} has more than {VERSIONS_MAX} versions; name one.")
        stem = name.removesuffix(".json")
        with contextlib.suppress(InvalidReferenceError, ValueError):
            if stem != name and stem.isascii() and stem.isdigit():
                versions.append(_checked_version(stem))
    return versions


def _checked_version(stem: str) -> int:
    ref = AdapterRef.parse(f"a/a@{stem}")
    assert ref.version is not None
    return ref.version


def _skip(refusal: str, *, may_skip: bool) -> None:
    """Let the caller go on to the next version, or refuse when this one was asked for by number."""
    if not may_skip:
        raise ConflictError(refusal)


def _is_inline(file: FileEntry) -> bool:
    return file.size <= INLINE_FILE_BYTES_MAX and file.name.endswith((".json", ".md", ".txt", "LICENSE"))


class _Meter:
    """Adds up bytes for a progress callback; it never runs backwards when a part is sent again."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, size_bytes: int) -> None:
        self._done = min(self._done + size_bytes, self._total)
        if self._progress is not None:
            self._progress("upload", self._done, self._total)
