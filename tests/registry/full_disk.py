"""A disk that is full, or fails, at a chosen call."""

import errno
import os
from pathlib import Path
from typing import Any

from loraplex_registry.storage.disk import Disk

CALLS = ("make_directory", "create", "write", "sync", "link", "rename", "sync_directory")


class FailingDisk(Disk):
    """Counts its changes and fails call number `at` with `code`; writes are short: half, then the rest or the fault."""

    def __init__(self, *, at: int = -1, code: int = errno.ENOSPC) -> None:
        self.at = at
        self.code = code
        self.calls: list[str] = []

    def write(self, descriptor: int, data: memoryview) -> int:
        self._may_fail("write")
        return super().write(descriptor, data[: (len(data) + 1) // 2])

    def _may_fail(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            raise OSError(self.code, os.strerror(self.code))


def _counted(name: str) -> Any:
    real = getattr(Disk, name)

    def method(self: FailingDisk, *args: Any) -> Any:
        self._may_fail(name)
        return real(self, *args)

    return method


for _name in CALLS:
    if _name != "write":
        setattr(FailingDisk, _name, _counted(_name))


def child(root: str, limit_bytes: int) -> None:
    """Write blobs in a process that may not write files longer than `limit_bytes`; prints what each call raised."""
    import hashlib
    import resource
    import signal

    from loraplex_registry.errors import RegistryError
    from loraplex_registry.format.manifest import FileEntry
    from loraplex_registry.storage.store import open_store

    source = Path(root).parent / "source"
    body = source.read_bytes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    store = open_store(root)
    entry = FileEntry("source", len(body), hashlib.sha256(body).hexdigest())
    for attempt in (
        lambda: store.put_blob("t/b/1/0", source, entry),
        lambda: store.create("t/big.json", body),
        lambda: store.swap("t/old.json", body, etag=store.get("t/old.json", limit_bytes=100).etag),
        lambda: store.create("t/small.json", b"fits"),
    ):
        try:
            attempt()
            print("done")
        except RegistryError as error:
            print(error.code, getattr(error, "ambiguous", None))


if __name__ == "__main__":
    import sys

    child(sys.argv[1], int(sys.argv[2]))
