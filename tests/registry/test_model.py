"""The registry behaves as a dict of immutable versions and a dict of tags, faults and crashes or not."""

from pathlib import Path

from tests.registry import machine
from tests.registry.lab import Lab


def test_the_registry_and_its_model_never_differ(tmp_path: Path) -> None:
    done = machine.run(Lab.build(tmp_path), runs=16)
    assert done["operations"] >= 500
    assert done["crashes"] >= 10


def test_the_registry_in_a_directory_and_its_model_never_differ(tmp_path: Path) -> None:
    assert machine.run(Lab.build(tmp_path), runs=4, kind="local")["operations"] >= 100
