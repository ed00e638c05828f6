"""The verdict vectors of `tests/vectors`, through the library and through the command."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from loraplex_registry import cli
from loraplex_registry.errors import RegistryError
from loraplex_registry.format.canonical import canonical
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.storage.store import open_store
from loraplex_registry.trust.marks import MemoryMarks
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.trust.verifier import Verifier
from tests.registry import forge
from tests.vectors import generate

FOLDERS = sorted(path.parent for path in generate.PLACE.glob("*/expected.json"))
ACCEPTED_WITH_A_WARNING = {
    "audit_mode_accepts_a_stranger",
    "blob_changed_in_audit_mode_fail",
    "rollback_in_audit_mode_fail",
    "stale_list_warns",
}
THROUGH_A_PROCESS = {"version", "tag_rollback_fail"}
if "LORAPLEX_VECTOR_COMMAND" in os.environ:
    THROUGH_A_PROCESS = {folder.name for folder in FOLDERS}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "expected.json").read_bytes())["steps"]


def lay_out(folder: Path, step: dict[str, Any], root: Path) -> None:
    """Make the registry of one step: nothing of an earlier step stays."""
    shutil.rmtree(root, ignore_errors=True)
    for key, name in step["objects"].items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, path)
    root.mkdir(parents=True, exist_ok=True)
    (root / "registry.json").write_bytes(canonical({"fmt": 1}))


def by_library(folder: Path, step: dict[str, Any], root: Path, marks: MemoryMarks, out: Path) -> str:
    registry = Registry(open_store(root.as_uri()))
    try:
        policy = TrustPolicy.load(folder / step["policy"])
        verified = Verifier(registry, policy, marks=marks, refresh_s=0).verify(AdapterRef.parse(step["ref"]))
        registry.pull(verified, out)
    except RegistryError as error:
        return error.code
    assert bool(verified.warnings) == (folder.name in ACCEPTED_WITH_A_WARNING)
    return "OK"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_vector_through_the_library(folder: Path, tmp_path: Path) -> None:
    marks = MemoryMarks()
    for number, step in enumerate(steps_of(folder)):
        lay_out(folder, step, tmp_path / "root")
        verdict = by_library(folder, step, tmp_path / "root", marks, tmp_path / f"out-{number}")
        assert verdict == step["expect"], f"step {number}"


def command(folder: Path, step: dict[str, Any], root: Path) -> list[str]:
    return [
        "verify",
        step["ref"],
        "--registry",
        root.as_uri(),
        "--policy",
        str(folder / step["policy"]),
        "--json",
    ]


def verdict_of(output: str, code: int) -> str:
    """What the command said: `OK` with exit code 0, or the reason with another one."""
    reason = json.loads(output).get("error", {"code": "OK"})["code"]
    assert (code == 0) == (reason == "OK")
    return reason


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_vector_through_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "LORAPLEX_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    for number, step in enumerate(steps_of(folder)):
        lay_out(folder, step, tmp_path / "root")
        code = cli.main(command(folder, step, tmp_path / "root"))
        assert verdict_of(capsys.readouterr().out, code) == step["expect"], f"step {number}"


@pytest.mark.parametrize("name", sorted(THROUGH_A_PROCESS))
def test_vector_through_a_process(name: str, tmp_path: Path) -> None:
    """Another implementation runs the same way: $LORAPLEX_VECTOR_COMMAND in the place of ours."""
    folder = generate.PLACE / name
    named = os.environ.get("LORAPLEX_VECTOR_COMMAND")
    program = named.split() if named else [sys.executable, "-m", "loraplex_registry.cli"]
    for step in steps_of(folder):
        lay_out(folder, step, tmp_path / "root")
        done = subprocess.run(
            [*program, *command(folder, step, tmp_path / "root")],
            env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert verdict_of(done.stdout, done.returncode) == step["expect"]


def test_there_are_enough_vectors_of_both_kinds() -> None:
    failing = [folder for folder in FOLDERS if folder.name.endswith("_fail")]
    assert len(failing) >= 60
    assert len(FOLDERS) - len(failing) >= 15


def test_a_name_says_how_the_last_step_ends() -> None:
    for folder in FOLDERS:
        assert (steps_of(folder)[-1]["expect"] == "OK") != folder.name.endswith("_fail"), folder.name
        assert (folder / "README.md").read_text().startswith(f"# {folder.name}\n")


def test_the_folders_are_what_the_generator_makes() -> None:
    with tempfile.TemporaryDirectory() as place:
        made = generate.cases(forge.Forge(Path(place)))
    assert {item.name for item in made} == {folder.name for folder in FOLDERS}
    assert [name for item in made for name in generate.write(item)] == []
