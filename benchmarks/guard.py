"""Processes of a benchmark go with it, however it ends: engines that nobody asks any more still poll, and the next
measurement would have them beside it.
"""

from __future__ import annotations

import subprocess


class Guard:
    """Kills a process group when this process has ended, a stopped one too."""

    def __init__(self, group: int) -> None:
        """Begin to watch; `group` is the process group's id."""
        # The pipe's other end is this process's alone: nothing that it starts inherits it.
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -s KILL -- "-$0"', str(group)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def release(self) -> None:
        """Watch no more: the group has ended, and its id may be somebody else's soon. Again is harmless."""
        self._watcher.kill()
        self._watcher.wait()
