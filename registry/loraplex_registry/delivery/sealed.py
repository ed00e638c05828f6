"""Verified bytes that cannot change any more: sealed memory, and a directory of it that an engine can open.

`SealedFile` is a Linux memfd. While it is open for writing it is ours to fill; `seal` then forbids writing, growing,
shrinking and unsealing (fcntl(2), "File Sealing"), for every process, whatever its rights. Digests are taken of the
sealed bytes, so what was checked is what every later reader sees.

`SealedDirectory` gives an engine that wants a path one directory of links to such files. The links lie on a disk, where
another process of the same user could replace them. So the directory is reached through an open descriptor, never by
its place in the tree, and `confirm`, called after the engine has read, tells whether a link was touched since it was
made. Together: what was loaded is the verified bytes, or `confirm` raises.

Other processes reach the files as `/proc/<pid>/fd/<n>`: they must run as the same user and see the same /proc, and this
process must live and not have closed them. Linux only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import DigestMismatchError, StoreUnavailableError
from ..format.manifest import FileEntry
from .download import matches
from .private_dirs import DIRECTORY_FLAGS

COPY_BYTES: Final = 8 << 20
"""Bytes copied at a time."""

SETTLE_S_MAX: Final = 2.0
"""Longest wait for the file system's clock to pass the moment a directory was made, in seconds."""

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_NOEXEC_SEAL: Final = 0x0008  # MFD_NOEXEC_SEAL (memfd_create(2)), Linux 6.3; older kernels refuse the flag
_CLOCK_REALTIME_COARSE: Final = 5  # clock_gettime(2): the clock that file systems stamp with


class SealedFile:
    """Bytes in memory under one descriptor; written first, then sealed for good."""

    def __init__(self, name: str) -> None:
        """Make an empty one; `name` shows in /proc only.

        Raises:
            StoreUnavailableError: no memory or no descriptor is left.
        """
        self.name = name
        self._descriptor: int | None = None
        try:
            self._descriptor = _memfd(name)
        except OSError as error:
            raise _no_memory(error) from error
        self._sealed = False

    def __enter__(self) -> SealedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def descriptor(self) -> int:
        """The descriptor; writable until `seal`, never afterwards."""
        if self._descriptor is None:
            raise ValueError("the sealed file is closed")
        return self._descriptor

    @property
    def path(self) -> str:
        """Where another process of this user opens it, while this one holds it."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    @property
    def size(self) -> int:
        """Size in bytes."""
        return os.fstat(self.descriptor).st_size

    def write(self, body: bytes) -> None:
        """Append bytes.

        Raises:
            StoreUnavailableError: no memory is left.
        """
        view = memoryview(body)
        try:
            while len(view):
                view = view[os.write(self.descriptor, view) :]
        except OSError as error:
            raise _no_memory(error) from error

    def copy(self, source: BinaryIO, *, size_bytes: int) -> None:
        """Append the next `size_bytes` of a file, inside the kernel.

        Raises:
            DigestMismatchError: the file ends before.
            StoreUnavailableError: it cannot be read, or no memory is left.
        """
        offset, left = source.tell(), size_bytes
        while left > 0:
            try:
                copied = os.sendfile(self.descriptor, source.fileno(), offset, min(left, COPY_BYTES))
            except OSError as error:
                raise _no_memory(error) from error
            if copied == 0:
                raise DigestMismatchError(f"{self.name} is shorter than was signed; fetch it again.")
            offset, left = offset + copied, left - copied

    def seal(self) -> None:
        """Forbid every change from now on and give up the right to write.

        Raises:
            StoreUnavailableError: the kernel refuses, because somebody has mapped it for writing.
        """
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            reading = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreUnavailableError(
                f"{self.name} cannot be sealed ({error.strerror}); try again."
            ) from error
        os.close(self.descriptor)
        self._descriptor = reading
        self._sealed = True

    def check(self, file: FileEntry) -> None:
        """Compare the sealed bytes with a signed size and the signed digests of their chunks.

        Raises:
            DigestMismatchError: they differ.
        """
        assert self._sealed, "only sealed bytes are worth checking"
        if not matches(self.descriptor, file):
            raise DigestMismatchError(f"{self.name} differs from the signed digest; fetch it again.")

    def open(self) -> BinaryIO:
        """Open it again for reading, from the start.

        Raises:
            StoreUnavailableError: no descriptor is left.
        """
        try:
            return open(f"/proc/self/fd/{self.descriptor}", "rb")
        except OSError as error:
            raise _no_memory(error) from error

    def close(self) -> None:
        """Give the memory back once no other reader holds it. Closing twice does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class SealedDirectory:
    """A directory of links to sealed files, for an engine that opens files by path. Its files stay the caller's."""

    def __init__(self, place: Path, descriptor: int, name: str, files: Mapping[str, SealedFile]) -> None:
        """Make `<place>/<name>/` with one link per file; call `watch` next.

        Args:
            place: a private directory that nobody else uses.
            descriptor: the open `place`; stays the caller's, and must outlive this object.
            name: the directory's name, so that its path carries the digest.
            files: sealed files by the name of their link.

        Raises:
            OSError: it cannot be made.
        """
        self._outer = descriptor
        self._name = name
        self._targets = {link: file.path for link, file in files.items()}
        inner = place / name
        inner.mkdir(mode=0o700)
        for link, target in self._targets.items():
            (inner / link).symlink_to(target)
        inner.chmod(0o500)
        self.path = Path(f"/proc/{os.getpid()}/fd/{descriptor}/{name}")
        self._stamp: tuple[int, ...] | None = None

    def watch(self) -> None:
        """Remember the directory as it is now; every later change will show.

        Waits, a few milliseconds at most, until the file system's clock has moved on since it was made, so that a
        change in the same tick cannot hide.

        Raises:
            DigestMismatchError: somebody has changed it already.
            StoreUnavailableError: the clock stands still.
            OSError: it is gone.
        """
        stamp = self._look()
        wait_past(max(stamp[1], stamp[4]))
        if self._look() != stamp or not self._leads_right():
            raise DigestMismatchError(
                f"The links at {self._name} were changed while they were made; try again."
            )
        self._stamp = stamp

    def confirm(self) -> None:
        """Make sure that every path below `path` has led to the sealed bytes ever since `watch`.

        A changed link or a renamed directory shows in the change times of the two directories, which no process can
        set back.

        Raises:
            DigestMismatchError: somebody changed the directory; what was read from it may be anything.
        """
        try:
            unchanged = self._look() == self._stamp and self._leads_right()
        except OSError:
            unchanged = False
        if not unchanged:
            raise DigestMismatchError(
                f"The links at {self._name} were changed while an engine read them; look who writes in the cache."
            )

    def _look(self) -> tuple[int, ...]:
        outer = os.fstat(self._outer)
        inner = os.stat(self._name, dir_fd=self._outer, follow_symlinks=False)
        return outer.st_ino, outer.st_ctime_ns, inner.st_dev, inner.st_ino, inner.st_ctime_ns

    def _leads_right(self) -> bool:
        inner = os.open(self._name, DIRECTORY_FLAGS, dir_fd=self._outer)
        try:
            found = {link: os.readlink(link, dir_fd=inner) for link in os.listdir(inner)}
        finally:
            os.close(inner)
        return found == self._targets


def wait_past(changed_ns: int) -> None:
    """Return once the clock that file systems stamp with is past a change time, in nanoseconds since 1970.

    Raises:
        StoreUnavailableError: it stands still, or was set back.
    """
    until = time.monotonic() + SETTLE_S_MAX
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= changed_ns:
        if time.monotonic() > until:
            raise StoreUnavailableError("The clock stands still or was set back; try again.")
        time.sleep(0.001)


def _memfd(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(name, flags)


def _no_memory(error: OSError) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"No memory or descriptor for an adapter's bytes ({error.strerror}); hold fewer adapters or raise the limits."
    )
