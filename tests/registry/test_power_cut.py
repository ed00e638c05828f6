"""A power cut at any moment loses nothing that was acknowledged by a local store, and shows nothing half-written.

The long form is in tests/reliability/test_registry_store_faults.py.
"""

from pathlib import Path

import pytest

from tests.registry import power_cuts
from tests.registry.power_cut import ForgetfulDisk


def test_a_power_cut_loses_nothing_acknowledged(tmp_path: Path) -> None:
    tally = power_cuts.campaign(tmp_path, states=300, seed=1)
    assert tally.wrong == []
    assert tally.states >= 300


class NoFileSync(ForgetfulDisk):
    """A disk for a store that forgets to fsync files."""

    def sync(self, descriptor: int) -> None:
        """Do nothing."""


class NoDirectorySync(ForgetfulDisk):
    """A disk for a store that forgets to fsync the directory after a link or rename."""

    def sync_directory(self, path: Path) -> None:
        """Do nothing."""


class NoParentSync(ForgetfulDisk):
    """A disk for a store that makes directories durable only themselves, not their names."""

    def sync_directory(self, path: Path) -> None:
        if any(name.is_file() for name in path.iterdir()):
            super().sync_directory(path)


class RenameFirst(ForgetfulDisk):
    """A disk for a store that replaces a file whose bytes it had not made durable."""

    def sync(self, descriptor: int) -> None:
        self._late = descriptor

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        super().sync(self._late)

    def link(self, source: Path, target: Path) -> None:
        super().sync(self._late)
        super().link(source, target)


@pytest.mark.parametrize("disk", [NoFileSync, NoDirectorySync, NoParentSync, RenameFirst])
def test_every_fsync_is_needed(disk: type[ForgetfulDisk], tmp_path: Path) -> None:
    """A store without one of them is found out, so the test above would see it go."""
    assert power_cuts.campaign(tmp_path, states=600, seed=2, disk=disk).wrong
