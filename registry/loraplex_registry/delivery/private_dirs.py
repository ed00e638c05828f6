"""Private directories that processes share: whose they are, who works in them, and how they go away.

A *temporary* is a directory `.tmp-…` in a private root, locked exclusively with `flock` by whoever works in it. The
kernel drops the lock when a process dies, so a temporary that can be locked is a left-over, and `sweep` removes it.
Everything is opened without following links; `declared` turns what the file system says into one of our errors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..errors import SettingsError, StoreUnavailableError

TEMPORARY: Final = ".tmp-"
"""What the names of temporaries begin with."""

DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

NOT_A_DIRECTORY: Final = frozenset({errno.ELOOP, errno.ENOTDIR})
"""What opening a link or a file with DIRECTORY_FLAGS fails with."""

_WRITABLE_BY_OTHERS: Final = 0o022
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_CLAIM_S_MAX: Final = 5.0


@contextlib.contextmanager
def declared(root: Path) -> Iterator[None]:
    """Turn any OSError of the block into StoreUnavailableError naming `root`."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(
            f"The cache {root} cannot be used ({error.strerror}); make room or name another directory."
        ) from error


def says_disk_full(error: BaseException | None) -> bool:
    """Say whether an error, or one that caused it, is a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def private_root(root: Path) -> Iterator[int]:
    """Yield the descriptor of a directory that is ours alone, made with mode 0700 when absent.

    Raises:
        SettingsError: it is a link or a file, belongs to another user, or others may enter it.
        OSError: it cannot be made or opened.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(root, DIRECTORY_FLAGS)
    except OSError as error:
        if error.errno not in NOT_A_DIRECTORY:
            raise
        raise SettingsError(f"{root} is a link or a file; name the directory itself.") from error
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise SettingsError(
                f"{root} belongs to another user or may be entered by others; "
                "name another directory or `chmod 700` it."
            )
        yield descriptor
    finally:
        os.close(descriptor)


def temporary_name() -> str:
    """Return a new name for a temporary."""
    return TEMPORARY + secrets.token_hex(8)


def claim(path: Path, *, wait_s: float = _CLAIM_S_MAX) -> int:
    """Make and lock a temporary of this name, waiting while somebody else holds it; return the lock's descriptor.

    The lock ends when the descriptor is closed. What a dead process left in the directory is still there.

    Args:
        path: below a private root.
        wait_s: longest wait in seconds.

    Raises:
        StoreUnavailableError: somebody held it all that time.
        OSError: it cannot be made.
    """
    until, pause_s = time.monotonic() + wait_s, 0.005
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        descriptor = _locked(path)
        if descriptor is not None:
            return descriptor
        if time.monotonic() > until:
            raise StoreUnavailableError(
                f"Another process has been working in {path} for {wait_s:g} s; try again, or look what it does."
            )
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.1)


def sweep(root: Path) -> int:
    """Remove the temporaries that nobody holds and return their number."""
    return sum(_swept(path) for path in root.glob(f"{TEMPORARY}*"))


def is_at(path: Path, descriptor: int) -> bool:
    """Say whether what is open is what the path names now."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_private(found: os.stat_result) -> bool:
    """Say whether something is ours and nobody else may write it."""
    return found.st_uid == os.geteuid() and not found.st_mode & _WRITABLE_BY_OTHERS


def is_private_file(found: os.stat_result) -> bool:
    """Say whether it is a private regular file with one name."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and is_private(found)


def remove_tree(path: Path) -> None:
    """Remove a file, a link, or a directory made read-only on purpose; absent is fine, links are not followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):
        path.chmod(0o700)
        for item in path.iterdir():
            if item.is_dir() and not item.is_symlink():
                remove_tree(item)
    shutil.rmtree(path, ignore_errors=True)


def _locked(path: Path) -> int | None:
    """Open and lock a directory; None when somebody holds it or it is no longer there."""
    try:
        descriptor = os.open(path, DIRECTORY_FLAGS)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in NOT_A_DIRECTORY:
            path.unlink(missing_ok=True)
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(path, descriptor):  # a sweeper may have removed it before the lock was held
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _swept(path: Path) -> bool:
    with contextlib.suppress(OSError):
        descriptor = _locked(path)
        if descriptor is not None:
            try:
                remove_tree(path)
            finally:
                os.close(descriptor)
            return True
    return False
