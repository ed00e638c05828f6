"""Single files that a power cut does not undo: when a function here returns, the bytes and the name are on the disk.

For keys, policies and marks. What a registry holds goes through `storage`, where it can be recorded and made to fail.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        OSError: as `open` and `fsync` do.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, body: bytes, *, mode: int) -> None:
    """Write a file that must not exist yet.

    Raises:
        FileExistsError: it does.
        OSError: it cannot be written.
    """
    _create(path, body, mode)
    sync_directory(path.parent)


def replace(path: Path, body: bytes, *, mode: int = 0o600) -> None:
    """Put a file in the place of another, or of none; a crash leaves the one or the other, never a part.

    Raises:
        OSError: it cannot be written; the file is as it was, or the new one whose name may not be durable.
    """
    with beside(path, body) as temporary:
        temporary.chmod(mode)
        os.rename(temporary, path)
        sync_directory(path.parent)


@contextlib.contextmanager
def beside(path: Path, body: bytes) -> Iterator[Path]:
    """Yield a hidden file in the same directory, its owner's alone; it is gone afterwards unless it was moved.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _create(temporary, body, 0o600)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path, body: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(descriptor)
    except BaseException:  # a full disk: half a file must not be in the way of the next try
        path.unlink(missing_ok=True)
        raise
