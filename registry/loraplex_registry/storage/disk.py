"""The system calls by which a local store changes its directory, in one place, and what file system it is on.

`LocalStore` makes every change through a `Disk`, so that its order of writes, fsyncs, links and renames can be recorded
or made to fail; that is how crash safety is tested.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

from ..durable import sync_directory

NETWORK_FILE_SYSTEMS: Final = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "afs",
        "ceph",
        "glusterfs",
        "lustre",
        "gpfs",
        "beegfs",
        "ocfs2",
    }
)
"""File systems whose locks or renames may not hold across machines."""

_MOUNTINFO: Final = Path("/proc/self/mountinfo")


class Disk:
    """The real thing. Every method raises OSError as the system call does."""

    def make_directory(self, path: Path) -> None:
        """Make one directory; one that is there is left alone."""
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o755)

    def create(self, path: Path, mode: int) -> int:
        """Create a file that must not exist and return its descriptor, open for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Append some of `data` and return how many bytes; may be fewer than given."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Make a file's bytes durable."""
        os.fsync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; FileExistsError when that is taken."""
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file, replacing what has the name."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name; one that is gone already is fine."""
        path.unlink(missing_ok=True)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        sync_directory(path)


def file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, as `ext4` or `fuse.sshfs`; "unknown" when not on Linux.

    Read from mountinfo (proc(5)) and not from statfs, which calls every FUSE file system by the same number.
    """
    try:
        table = _MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return "unknown"
    real = os.path.realpath(path)
    best, found = -1, "unknown"
    for line in table.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split(" ")
        if not dash or len(fields) < 5:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:  # a later mount at the same place hides the earlier
            best, found = len(mount), after.split(" ", 1)[0]
    return found


def is_network_file_system(kind: str) -> bool:
    """Say whether a type of file system is one that `flock` cannot be relied on for, FUSE included."""
    return kind in NETWORK_FILE_SYSTEMS or kind == "fuse" or kind.startswith("fuse.")
