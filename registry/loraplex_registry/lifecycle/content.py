"""What is published: the files of an adapter, the manifest they get, and how their bytes are stored.

Small texts are kept inside the record, the rest become blobs. A `Sealer` turns both into ciphertext; the manifest
always describes the plaintext.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

from ..errors import ConflictError
from ..format import layout
from ..format.hashing import entry_of
from ..format.manifest import BaseEntry, FileEntry, LoraEntry, Manifest
from ..format.record import INLINE_FILE_BYTES_MAX, INLINE_TOTAL_BYTES_MAX, Encryption, StoredFile
from ..refs import AdapterRef, Version
from ..signing import Signer
from ..storage.store import Store, UploadLog
from ..validation.base import CARD_NAME, BaseModel, Progress
from ..validation.weights import AdapterFacts, read_small

UPLOADS_AT_ONCE: Final = 4
"""Most blobs of one push under way at a time."""


@dataclass(frozen=True, slots=True)
class Signed:
    """A manifest that was signed elsewhere: its exact bytes and the Model Signing bundle over it and the files."""

    manifest_bytes: bytes
    bundle: dict[str, Any]

    @property
    def manifest(self) -> Manifest:
        """The manifest, read strictly."""
        return Manifest.from_bytes(self.manifest_bytes)


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement to sign about the version once its digest is known: predicate type, predicate, and the key."""

    predicate_type: str
    predicate: dict[str, Any] = field(repr=False)
    signer: Signer


@dataclass(frozen=True)
class Content:
    """An adapter ready to be published.

    Attributes:
        directory: where the files are.
        facts: what was found in them.
        base: the base model it is for.
        card: the base card's bytes.
        annotations: signed with the manifest; sorted by name.
        attest: statements attached to the record.
        statements: more of them, signed when the version is known.
        signed: when given, this manifest and bundle are published instead of newly made ones.
    """

    directory: Path
    facts: AdapterFacts
    base: BaseModel
    card: bytes
    annotations: tuple[tuple[str, str], ...] = ()
    attest: tuple[dict[str, Any], ...] = ()
    statements: tuple[Statement, ...] = ()
    signed: Signed | None = field(default=None, repr=False)

    @cached_property
    def files(self) -> tuple[FileEntry, ...]:
        """All files of the version, sorted by name."""
        return tuple(sorted([*self.facts.files, entry_of(CARD_NAME, self.card)], key=lambda file: file.name))

    def manifest(self, ref: AdapterRef, version: Version, created: str) -> Manifest:
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
            files=self.files,
            annotations=self.annotations,
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def read(self, file: FileEntry) -> bytes:
        """Return a small file's bytes.

        Raises:
            ConflictError: it is not the file that was checked.
        """
        if file.name == CARD_NAME:
            return self.card
        body = read_small(self.directory / file.name, limit_bytes=file.size)
        if hashlib.sha256(body).hexdigest() != file.sha256:
            raise ConflictError(f"{file.name} changed while it was published; leave it alone and push again.")
        return body

    @contextlib.contextmanager
    def path(self, file: FileEntry) -> Iterator[Path]:
        """Yield a path holding a file's bytes; a base card too long to inline is written out for the upload."""
        if file.name != CARD_NAME:
            yield self.directory / file.name
            return
        with tempfile.TemporaryDirectory(prefix="loraplex-") as directory:
            path = Path(directory) / CARD_NAME
            path.write_bytes(self.card)
            yield path


class Seal(Protocol):
    """The encryption of one push: a data key of its own, bound to tenant, adapter, version and push id."""

    @property
    def encryption(self) -> Encryption:
        """What the record says about it."""

    def inline(self, file: FileEntry, body: bytes) -> bytes:
        """Return the ciphertext of a small file."""

    def blob(self, file: FileEntry, path: Path) -> AbstractContextManager[tuple[Path, FileEntry]]:
        """Encrypt the file at `path` into a file that lives as long as the context; yield it and its entry."""


class Sealer(Protocol):
    """Makes the encryption of a push."""

    def begin(self, ref: AdapterRef, version: Version, pid: str) -> Seal:
        """Make a new data key for one push."""


def store_files(
    store: Store,
    ref: AdapterRef,
    version: Version,
    pid: str,
    content: Content,
    *,
    seal: Seal | None,
    progress: Progress | None,
    log: UploadLog | None = None,
) -> tuple[StoredFile, ...]:
    """Store every file of a push, blobs in parallel, and return where each is.

    With a `log`, uploads in parts go on where an earlier process stopped; encrypted ones cannot.

    Raises:
        ConflictError, DigestMismatchError: a file changed meanwhile.
        StoreUnavailableError, StoreRefusedError: the storage.
    """
    blobs = _blob_names(content.files, version, pid)
    meter = _Meter(progress, total=sum(file.size for file in content.files if file.name in blobs))
    options: dict[str, Any] = {"progress": meter.add}
    if log is not None and seal is None:
        options["upload"] = log

    def upload(file: FileEntry) -> None:
        key = layout.adapter_prefix(ref) + blobs[file.name]
        with contextlib.ExitStack() as stack:
            path, entry = stack.enter_context(content.path(file)), file
            if seal is not None:
                path, entry = stack.enter_context(seal.blob(file, path))
            store.put_blob(key, path, entry, **options)

    _all(upload, [file for file in content.files if file.name in blobs], failed=meter.stop)
    return tuple(_stored(content, file, blobs.get(file.name), seal) for file in content.files)


def _blob_names(files: Sequence[FileEntry], version: Version, pid: str) -> dict[str, str]:
    """Return file name -> blob of the files that do not go into the record."""
    blobs: dict[str, str] = {}
    left = INLINE_TOTAL_BYTES_MAX
    for file in files:
        if file.name.endswith((".json", ".md", ".txt", "LICENSE")) and file.size <= min(
            left, INLINE_FILE_BYTES_MAX
        ):
            left -= file.size
        else:
            blobs[file.name] = layout.blob_name(version, pid, len(blobs))
    return blobs


def _stored(content: Content, file: FileEntry, blob: str | None, seal: Seal | None) -> StoredFile:
    if blob is not None:
        return StoredFile(file.name, file.size, file.sha256, blob=blob)
    body = content.read(file)
    inline = body if seal is None else seal.inline(file, body)
    return StoredFile(file.name, file.size, file.sha256, inline=inline)


def _all(work: Any, items: Sequence[Any], *, failed: Callable[[], None]) -> None:
    """Do `work` for every item, a few at a time; the first error, or Ctrl-C, ends the others."""
    if len(items) < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="loraplex-push") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            failed()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Another file failed, so this one need not go on."""


class _Meter:
    """Adds up bytes for a progress callback; it never runs backwards when a part is sent again."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # guards _done, and keeps the callbacks in order

    def stop(self) -> None:
        """Let every upload end at its next step."""
        self._stopped.set()

    def add(self, size_bytes: int) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        with self._lock:
            self._done = min(self._done + size_bytes, self._total)
            if self._progress is not None:
                self._progress("upload", self._done, self._total)
