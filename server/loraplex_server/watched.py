"""A file that is read again when it changes, so that a credential or a weight is added or taken away without a restart.

Promises: `value` is always the content of a file that was read whole and understood; when the file has become wrong or
unreadable, the content before it stays in force, the reason is logged once per change, and the file is tried again when
it changes. `refresh` may run on a thread while `value` is read on others.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from loraplex_server.errors import ConfigError

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

FILE_BYTES_MAX: Final = 32 << 20
"""Longest file read, in bytes (32 MiB: 100,000 keys take 15)."""


CHECK_INTERVAL_S: Final = 1.0
"""Seconds between two looks at the files."""


class WatchedFile(Generic[_T]):
    """See the module."""

    def __init__(self, path: Path, parse: Callable[[bytes], _T]) -> None:
        """Read the file for the first time.

        Args:
            path: the file.
            parse: turns its bytes into the content; raises ConfigError.

        Raises:
            ConfigError: it cannot be read, is too long, or `parse` refuses it.
        """
        self.path = path
        self._parse = parse
        self._seen = _stamp(path)
        self._value = self._read()

    @property
    def value(self) -> _T:
        """The last good content."""
        return self._value

    def refresh(self) -> bool:
        """Read the file if it is another one than before; say whether there is new content."""
        stamp = _stamp(self.path)
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self._value = self._read()
        except ConfigError as error:
            _log.error("%s was changed and is not used, what was in force stays: %s", self.path, error)
            return False
        _log.info("%s was read again", self.path)
        return True

    def _read(self) -> _T:
        try:
            with self.path.open("rb") as file:
                body = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error
        if len(body) > FILE_BYTES_MAX:
            raise ConfigError(f"{self.path}: longer than {FILE_BYTES_MAX >> 20} MiB")
        return self._parse(body)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written or replaced; None when it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


async def refresh_for_ever(refreshes: Sequence[Callable[[], object]]) -> None:
    """Take over changed files, each by its own `refresh`, until cancelled."""
    while True:
        await asyncio.sleep(CHECK_INTERVAL_S)
        for refresh in refreshes:
            try:
                await asyncio.to_thread(refresh)
            except Exception:  # whatever a file holds: the next change of another one must still be seen
                _log.exception("a changed file could not be read; what was in force stays")
