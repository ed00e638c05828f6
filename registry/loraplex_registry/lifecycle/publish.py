"""Publishing: from a directory to one committed record, in a number of requests that can be counted.

```
check -> choose a version and reserve it -> upload blobs -> commit -> move the tag
```

Publishing the same bytes again finds the committed version and changes nothing. Whatever crashes between two steps,
running the same command again completes it. After a commit with an unknown end nothing is deleted, ever.

A push that fails before its commit gives its version free at once, unless it was sending a long file in parts, its user
let it remember that (`resuming`), and the failure says nothing about the content: then its reservation and its parts
stay until the lease is over, and the same command goes on with them.

Requests, F being the files too long for the record (usually 1): 2 + F for a named version; one listing more to find
the next number, and one look at the newest version when there is one; with a tag a read of the tag before, and after
the commit a write of the tag and a re-check of the version, plus a write to the tag's log when the tag was there.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ..errors import (
    ConflictError,
    InvalidReferenceError,
    KeyConflictError,
    RegistryError,
    SignatureInvalidError,
    StoreError,
    StoreRefusedError,
    StoreUnavailableError,
    UnsupportedAdapterError,
)
from ..format import layout
from ..format.canonical import StrictJsonError
from ..format.record import (
    RECORD_BYTES_MAX,
    AbortedRecord,
    CommittedRecord,
    DeletedRecord,
    DeletingRecord,
    check_attestations,
)
from ..refs import AdapterRef, Version
from ..signing import Signer, sign_files, verify_bundle
from ..signing.attestations import make_attestation
from ..storage.store import Store, write_conditionally
from ..validation.base import Progress
from ..validation.weights import MANIFEST_NAME
from .content import Content, Sealer, store_files
from .resuming import PushLog, Resumables, content_digest, no_log
from .tagging import TagMove, TagState, Target, Unread, move_tag, read_tag_state, require_expected
from .versions import Outcome, Reservation, Reserver, get_record

__all__ = ["COMMITTED_BYTES_MAX", "Content", "Outcome", "Publication"]

COMMITTED_BYTES_MAX: Final = RECORD_BYTES_MAX - (192 << 10)
"""Longest record that is committed, in bytes (832 KiB): it must also fit into a tag, beside the tag's signatures."""

ENCRYPTED: Final = hashlib.sha256(b"encrypted").hexdigest()
"""Stands for the content of an encrypted push; no content has it."""

RESUMABLE: Final = (KeyboardInterrupt, SystemExit, StoreUnavailableError, StoreRefusedError)
"""What may end an upload that the same command goes on with: it says nothing about the content."""


class Publication:
    """One publish call: holds what all its steps share. Used by one thread, once.

    Args:
        store: where.
        ref: tenant and adapter.
        content: what. When it was signed elsewhere, its manifest names the version.
        signers: the first signs the version, all sign the tag. May be empty for signed content without a tag.
        now: the time, with a zone.
        sealer: encrypts, when given.
        resumables: remembers long uploads, when given.
    """

    def __init__(
        self,
        store: Store,
        ref: AdapterRef,
        content: Content,
        signers: Sequence[Signer],
        now: dt.datetime,
        *,
        sealer: Sealer | None = None,
        resumables: Resumables | None = None,
    ) -> None:
        if not signers and content.signed is None:
            raise InvalidReferenceError("Something must sign the version; give a key or a signed bundle.")
        self._store = store
        self._ref = ref
        self._content = content
        self._signers = signers
        self._now = now
        self._sealer = sealer
        self._resumables = resumables
        self._tag: TagState | Unread | None = Unread.UNREAD
        self._created = now.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def look_at_tag(self, tag: str, expect: int | str | None) -> None:
        """Read the tag that will be moved, so that what `expect` forbids is refused before anything is written.

        Raises:
            ConflictError: it is not what `expect` says.
        """
        self._tag = read_tag_state(self._store, self._ref, tag)
        before = None if self._tag is None else self._tag.statement
        require_expected(self._ref, tag, before, expect)

    def run(self, *, version: Version | None, progress: Progress | None) -> Outcome:
        """Commit the content, or find it committed.

        Args:
            version: the version wanted; None for the next number.
            progress: called with phase "upload".

        Raises:
            ConflictError: the version exists with other content, was deleted, or another push holds it.
        """
        self._store.prepare()
        reserver = Reserver(
            self._store,
            self._ref,
            by=self._signers[0].keyid if self._signers else "signed elsewhere",
            now_s=self._now.timestamp(),
            size_bytes=self._content.size_bytes,
            is_this=self._is_this,
        )
        wanted = self._signed_version(version)
        with self._log(wanted) as log:
            chosen = self._resumed(reserver, wanted, log) or reserver.choose(wanted)
            if isinstance(chosen, Outcome):
                return chosen
            log.start(chosen.version, chosen.pid, self._content_digest)
            with self._aborted_on_failure(chosen, log):
                record = self._upload(chosen, progress, log)
            outcome = self._commit(chosen, record)
            log.forget()
            return outcome

    def move_tag(self, tag: str, outcome: Outcome, *, expect: int | str | None, expires: str) -> TagMove:
        """Make `tag` point to the outcome; see `tagging.move_tag`."""
        return move_tag(
            self._store,
            self._ref,
            tag,
            Target(outcome.version, outcome.record, outcome.etag),
            self._signers,
            now=self._now,
            expect=expect,
            expires=expires,
            known=self._tag,
        )

    @property
    def _content_digest(self) -> str:
        """What another process must push to go on with this push. Encrypted pushes are like no other."""
        return content_digest(self._content.files) if self._sealer is None else ENCRYPTED

    def _log(self, wanted: Version | None) -> contextlib.AbstractContextManager[PushLog]:
        if self._resumables is None:
            return no_log()
        return self._resumables.claim(self._store.url, self._ref, wanted)

    def _resumed(self, reserver: Reserver, wanted: Version | None, log: PushLog) -> Reservation | None:
        """Return the reservation of the push that an earlier process left, when it is this one and still ours."""
        left = log.left
        if left is None:
            return None
        if self._sealer is None and left.content == self._content_digest and wanted in (None, left.version):
            reservation = reserver.resume(left.version, left.pid)
            if reservation is not None:
                return reservation
        else:
            reserver.abandon(left.version, left.pid)
            self._abort_uploads(left.version, left.pid, left.uploads)
        log.forget()
        return None

    def _abort_uploads(self, version: Version, pid: str, uploads: Mapping[str, str]) -> None:
        """Remove what uploads of a push of ours left, best effort; `registry gc` finds the rest."""
        prefix = f"{layout.blobs_prefix(self._ref)}{layout.blob_group(version, pid)}/"
        for key, upload_id in uploads.items():
            if key.startswith(prefix):
                with contextlib.suppress(RegistryError):
                    self._store.abort_upload(key, upload_id)

    def _signed_version(self, wanted: Version | None) -> Version | None:
        """Return the version wanted; what was signed elsewhere names it and must be about these very files."""
        if self._content.signed is None:
            return wanted
        signed = self._content.signed.manifest
        if (signed.tenant, signed.adapter) != (self._ref.tenant, self._ref.adapter) or wanted not in (
            None,
            signed.version,
        ):
            raise InvalidReferenceError(
                f"The bundle is for {signed.tenant}/{signed.adapter}@{signed.version}; push it there."
            )
        if signed != self._content.manifest(self._ref, signed.version, signed.created):
            raise ConflictError("The directory is not what the bundle was made for; sign it again.")
        return signed.version

    def _upload(self, reservation: Reservation, progress: Progress | None, log: PushLog) -> CommittedRecord:
        """Store every file and return the record to commit."""
        manifest, bundle = self._signed_manifest(reservation.version)
        attest = self._attest(reservation.version, manifest)
        seal = None
        if self._sealer is not None:
            seal = self._sealer.begin(self._ref, reservation.version, reservation.pid)
        files = store_files(
            self._store,
            self._ref,
            reservation.version,
            reservation.pid,
            self._content,
            seal=seal,
            progress=progress,
            log=None if self._resumables is None else log,
        )
        encryption = None if seal is None else seal.encryption
        record = CommittedRecord(reservation.pid, manifest, bundle, files, attest, encryption)
        if len(record.to_bytes()) > COMMITTED_BYTES_MAX:
            raise UnsupportedAdapterError(
                f"The record of the version would be longer than {COMMITTED_BYTES_MAX} bytes; shorten the texts, "
                "the annotations or the attestations."
            )
        return record

    def _attest(self, version: Version, manifest: bytes) -> tuple[dict[str, Any], ...]:
        """Return what the record attests: the statements given, and those signed now about this very manifest."""
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        made = [
            make_attestation(self._ref, version, digest, one.predicate_type, one.predicate, one.signer)
            for one in self._content.statements
        ]
        try:
            return check_attestations([*self._content.attest, *made])
        except StrictJsonError as error:
            raise InvalidReferenceError(f"The attestations are refused: {error}.") from error

    def _signed_manifest(self, version: Version) -> tuple[bytes, dict[str, Any]]:
        if self._content.signed is not None:
            return self._content.signed.manifest_bytes, self._content.signed.bundle
        manifest = self._content.manifest(self._ref, version, self._created)
        body = manifest.to_bytes()
        signed = {file.name: file.sha256 for file in manifest.files}
        signed[MANIFEST_NAME] = hashlib.sha256(body).hexdigest()
        return body, sign_files(signed, self._signers[0], subject=f"{self._ref.name}@{version}")

    def _commit(self, reservation: Reservation, record: CommittedRecord) -> Outcome:
        key = layout.version_key(self._ref, reservation.version)
        try:
            etag = write_conditionally(self._store, key, record.to_bytes(), etag=reservation.etag)
        except KeyConflictError as error:
            # Our own commit may have succeeded, its reply been lost, and the record been changed since.
            found = get_record(self._store, self._ref, reservation.version)
            if found is not None and found[0].pid == reservation.pid:
                if isinstance(found[0], CommittedRecord):
                    return Outcome(reservation.version, found[0], found[1], created=True)
                if isinstance(found[0], DeletingRecord | DeletedRecord):
                    raise ConflictError(
                        f"{self._ref.name}@{reservation.version} was pushed and deleted at once; push it again."
                    ) from error
            raise ConflictError(
                f"Another push took over {self._ref.name}@{reservation.version} before this one was done; push again."
            ) from error
        return Outcome(reservation.version, record, etag, created=True)

    @contextlib.contextmanager
    def _aborted_on_failure(self, reservation: Reservation, log: PushLog) -> Iterator[None]:
        """Give the version free at once when the upload fails, unless the same command can go on with it.

        Safe because no commit was tried yet: the swap only succeeds on our own pending record.
        """
        try:
            yield
        except BaseException as error:
            if log.kept and isinstance(error, RESUMABLE):
                raise
            reason = error.code if isinstance(error, RegistryError) else "interrupted"
            body = AbortedRecord(reservation.pid, reason).to_bytes()
            with contextlib.suppress(StoreError):
                key = layout.version_key(self._ref, reservation.version)
                self._store.swap(key, body, etag=reservation.etag)
            self._abort_uploads(reservation.version, reservation.pid, log.uploads)
            log.forget()
            raise

    def _is_this(self, record: CommittedRecord) -> bool:
        """Say whether a record holds this content, signed with this key, and encrypted if that is wanted."""
        if self._sealer is not None and record.encryption is None:
            return False
        if self._content.signed is not None:
            return record.manifest_bytes == self._content.signed.manifest_bytes
        try:
            found = record.manifest_unverified()
            ours = self._content.manifest(self._ref, found.version, found.created)
            verify_bundle(record.bundle, self._signers[0].public_key)
        except SignatureInvalidError:
            return False
        return found == ours
