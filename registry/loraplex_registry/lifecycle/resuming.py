"""Pushes that can be gone on with: one small file of the user's, while a long upload in parts is under way.

The same command again finds the file, and with it the push id and the uploads that a killed process left. Its contract:

- the push goes on only if its record is still pending under that very push id and by the same key, and only after its
  lease was renewed by compare-and-swap (`versions.Reserver.resume`). A push that was aborted, taken over or collected
  is not found again: everything begins anew. The old process, should it live, finds its record changed at its commit;
- nothing in the file is believed. It names a record and uploads to *look at*; what is there is compared with the
  signed digests (`s3_uploads`). The worst a forged file does is a longer upload;
- the file is locked while a process pushes, so two on one machine never share a push; the lock goes with the process;
- other content under the same name gives the version free that the first one holds, and its parts are removed.

Why a file, when the storage knows everything that was uploaded: the storage cannot tell a dead push from one that is
alive elsewhere, and to find a push there every publisher would need to list the uploads of the whole bucket
(`s3:ListBucketMultipartUploads` cannot be limited to a tenant). Who holds the file may go on, and nobody else.

Only uploads in parts are worth it, so a push of short files never writes here. Encrypted pushes cannot be gone on with:
the data key is never stored in clear, and every push has its own.

One file per registry, adapter and version asked for; mode 0600, at most STATE_BYTES_MAX, forgotten after EXPIRES_S.
A file that cannot be written costs the resumption, not the push.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import InvalidReferenceError
from ..format.canonical import StrictJsonError, canonical, exact_object, parse_canonical
from ..format.manifest import FileEntry
from ..refs import AdapterRef, Version, check_version

EXPIRES_S: Final = 7 * 24 * 3600.0
"""Seconds after which an interrupted push is forgotten; storages drop its parts earlier by rule, 2 days in `deploy`."""

STATE_BYTES_MAX: Final = 256 << 10
"""Longest file, in bytes."""

UPLOADS_MAX: Final = 64
"""Most uploads in parts of one push that are remembered."""

FILES_SWEPT_MAX: Final = 1000
"""Most files looked at for expired ones in one push."""

_FORMAT: Final = 1
_PID = re.compile(r"[0-9a-f]{32}")
_UPLOAD_ID = re.compile(r"[!-~]{1,1024}")
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

Told = Callable[[int, int], None]
"""Called with the number of parts that are there already, and the number of all parts of the file."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """What a process left: its version and push id, a digest of what it pushed, and the uploads it began, by key."""

    version: Version
    pid: str
    content: str
    uploads: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the form of the file."""
        return canonical(
            {
                "fmt": _FORMAT,
                "version": self.version,
                "pid": self.pid,
                "content": self.content,
                "uploads": self.uploads,
            }
        )


def read_interrupted(body: bytes) -> Interrupted:
    """Read a file.

    Raises:
        StrictJsonError: not as it was written.
    """
    value = parse_canonical(body, limit_bytes=STATE_BYTES_MAX)
    fields = exact_object(value, frozenset({"fmt", "version", "pid", "content", "uploads"}))
    if type(fields["fmt"]) is not int or fields["fmt"] != _FORMAT:
        raise StrictJsonError(f"fmt is not {_FORMAT}")
    pid, content, uploads = fields["pid"], fields["content"], fields["uploads"]
    try:
        check_version(fields["version"])
    except InvalidReferenceError as error:
        raise StrictJsonError("the version is out of shape") from error
    if not isinstance(pid, str) or not _PID.fullmatch(pid):
        raise StrictJsonError("the push id is out of shape")
    if not isinstance(content, str) or not re.fullmatch(r"[0-9a-f]{64}", content):
        raise StrictJsonError("the content's digest is out of shape")
    if not isinstance(uploads, dict) or len(uploads) > UPLOADS_MAX:
        raise StrictJsonError("the uploads are no table of acceptable length")
    for upload_id in uploads.values():
        if not isinstance(upload_id, str) or not _UPLOAD_ID.fullmatch(upload_id):
            raise StrictJsonError("an upload's id is out of shape")
    return Interrupted(fields["version"], pid, content, dict(uploads))


def content_digest(files: Sequence[FileEntry]) -> str:
    """Return a digest of what is uploaded: the files, whatever manifest they get."""
    return hashlib.sha256(canonical([file.to_value() for file in files])).hexdigest()


class PushLog:
    """The uploads of one push; a `store.UploadLog`. Made by `Resumables.claim`; safe for many threads.

    Attributes:
        left: what an earlier process left here; None without.
        uploads: uploads of this push, key -> id, whether or not they could be written down.
    """

    def __init__(self, path: Path | None, told: Told | None) -> None:
        self.left: Interrupted | None = None
        self.uploads: dict[str, str] = {}
        self._path = path
        self._told = told
        self._file: int | None = None
        self._push: Interrupted | None = None
        self._kept = False
        self._lock = threading.Lock()  # guards _file, _push, _kept and uploads
        if path is not None:
            self._look(path)

    @property
    def kept(self) -> bool:
        """Whether another process can go on with this push."""
        return self._kept

    def start(self, version: Version, pid: str, content: str) -> None:
        """Begin a push, or go on with the one that was left when the push id is the same."""
        with self._lock:
            same = self.left is not None and self.left.pid == pid
            self.uploads = dict(self.left.uploads) if same and self.left is not None else {}
            self._push = Interrupted(version, pid, content, self.uploads)
            self._kept = same and self._file is not None

    def begun(self, key: str) -> str | None:
        """See `store.UploadLog`."""
        return self.uploads.get(key)

    def begin(self, key: str, upload_id: str) -> None:
        """See `store.UploadLog`."""
        with self._lock:
            self.uploads[key] = upload_id
            self._kept = self._write()

    def found(self, parts_there: int, parts: int) -> None:
        """See `store.UploadLog`."""
        if self._told is not None:
            self._told(parts_there, parts)

    def forget(self) -> None:
        """Remove the file: there is nothing to go on with."""
        with self._lock:
            self.left, self._kept = None, False
            if self._file is not None and self._path is not None:
                with contextlib.suppress(OSError):
                    self._path.unlink()
                self._close()

    def close(self) -> None:
        """Let other processes have the file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _look(self, path: Path) -> None:
        """Lock the file if there is one, and read it."""
        try:
            self._file = _locked(path, _FLAGS)
        except FileNotFoundError:
            return
        except OSError:  # somebody is pushing this, or the file is not ours: do without
            self._path = None
            return
        with contextlib.suppress(OSError, StrictJsonError):
            if os.fstat(self._file).st_mtime > time.time() - EXPIRES_S:
                self.left = read_interrupted(os.pread(self._file, STATE_BYTES_MAX + 1, 0))

    def _write(self) -> bool:
        """Write the file, made when absent; False when that is not possible."""
        if self._path is None or self._push is None or len(self.uploads) > UPLOADS_MAX:
            return False
        try:
            if self._file is None:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _require_private(os.stat(self._path.parent))
                self._file = _locked(self._path, _FLAGS | os.O_CREAT)
            body = self._push.to_bytes()
            os.pwrite(self._file, body, 0)
            os.ftruncate(self._file, len(body))
            os.fsync(self._file)
        except OSError:
            return False
        return True


class Resumables:
    """Interrupted pushes of a user, in a directory that is made when the first one needs it.

    Args:
        directory: where; private to the user.
        told: hears how much of a file need not be sent again.
    """

    def __init__(self, directory: Path, *, told: Told | None = None) -> None:
        self._directory = directory
        self._told = told

    @contextlib.contextmanager
    def claim(self, url: str, ref: AdapterRef, wanted: Version | None) -> Iterator[PushLog]:
        """Yield the log of a push; while it is open no other process of this machine gets it.

        Args:
            url: the registry.
            ref: tenant and adapter.
            wanted: the version asked for, None for the next number.
        """
        self._sweep()
        name = hashlib.sha256(canonical([url, ref.name, "" if wanted is None else str(wanted)]))
        log = PushLog(self._directory / f"{name.hexdigest()[:32]}.json", self._told)
        try:
            yield log
        finally:
            log.close()

    def _sweep(self) -> None:
        """Remove expired files that nobody works with."""
        with contextlib.suppress(OSError), os.scandir(self._directory) as entries:
            for entry, _ in zip(entries, range(FILES_SWEPT_MAX), strict=False):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < time.time() - EXPIRES_S:
                        descriptor = _locked(Path(entry.path), _FLAGS)
                        os.unlink(entry.path)
                        os.close(descriptor)


@contextlib.contextmanager
def no_log() -> Iterator[PushLog]:
    """Yield a log that keeps nothing."""
    yield PushLog(None, None)


def _locked(path: Path, flags: int) -> int:
    """Open a file of ours and lock it.

    Raises:
        OSError: it is absent, a link, somebody else's, or locked.
    """
    descriptor = os.open(path, flags, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError("not a file")
        _require_private(found)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino != found.st_ino:  # it was removed while we came
            raise FileNotFoundError(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_private(found: Any) -> None:
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError("others may write to it")
