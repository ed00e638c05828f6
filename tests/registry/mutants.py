"""Planted bugs: one change each to our own code, and the test that must notice it.

The tree is copied to a temporary directory, changed there, and the test is run with that copy first on Python's path. A
mutant whose text is not in the code any more is an error: write it anew, do not drop it.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = "registry/loraplex_registry"
LIMIT_S: Final = 240
_LEFT_OUT: Final = (
    ".git",
    ".venv*",
    "node_modules",
    "__pycache__",
    ".hypothesis",
    ".mypy_cache",
    ".ruff_cache",
    "*.so",
)
NOTICED: Final = 1
"""pytest's exit code when tests ran and one failed."""


@dataclass(frozen=True)
class Mutant:
    """A bug: in `file` of the package, `old` (there exactly once) becomes `new`; `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


SCHEDULES = "test_schedules.py::test_no_order_of_calls_breaks_an_invariant"
CRASHES = "test_crashes.py::test_whatever_dies_anywhere_is_completed_by_the_same_command"

MUTANTS: Final = (
    Mutant(
        "tag without re-check",
        "lifecycle/tagging.py",
        "    if move.moved:\n        mover.recheck(target, move)\n    return move\n",
        "    return move\n",
        SCHEDULES,
    ),
    Mutant(
        "tag without log",
        "lifecycle/tagging.py",
        "        if before is not None and not self._keep(before):\n            return False\n",
        "",
        "test_tagging.py",
    ),
    Mutant(
        "tag moved whatever was expected",
        "lifecycle/tag_state.py",
        "    if expect is None:\n        return\n",
        "    return\n",
        "test_tagging.py",
    ),
    Mutant(
        "a tag put back is moved on",
        "lifecycle/tagging.py",
        "        if found is not None and found.body == body and later is None:",
        "        if found is not None and found.body == body:",
        "test_tagging.py",
    ),
    Mutant(
        "collect without compare-and-swap",
        "lifecycle/gc.py",
        "                write_conditionally(self._store, key, body, etag=etag)",
        "                pass",
        "test_gc.py",
    ),
    Mutant(
        "collect what is being pushed",
        "lifecycle/gc.py",
        '        if not record.lease_over(self._now_s - self._grace_s):\n            return "pushing"\n',
        "",
        "test_gc.py",
    ),
    Mutant(
        "collect what cannot be read",
        "lifecycle/gc.py",
        '        except DamagedError:\n            return "unreadable"',
        '        except DamagedError:\n            return "purged"',
        "test_gc.py",
    ),
    Mutant(
        "believe the storage's list of parts",
        "storage/s3_parts.py",
        '        and entry.get("ChecksumSHA256") == part.checksum\n',
        "",
        "test_mutants.py::test_a_part_that_is_listed_counts_by_size_and_signed_digest",
    ),
    Mutant(
        "go on with a push that is not ours any more",
        "lifecycle/versions.py",
        "        return found[1] if (found[0].pid, found[0].by) == (pid, self._by) else None",
        "        return found[1]",
        "test_mutants.py::test_a_pending_push_of_another_is_not_gone_on_with",
    ),
    Mutant(
        "no tombstone",
        "lifecycle/versions.py",
        "            elif not isinstance(record, AbortedRecord):",
        '            elif not isinstance(record, AbortedRecord) and "Deleted" not in type(record).__name__:',
        "test_delete.py",
    ),
    Mutant(
        "delete without looking for tags",
        "lifecycle/delete.py",
        "    tags = referencing_tags(store, ref)\n    if tags and not force:",
        "    tags: list[str] = []\n    if tags and not force:",
        "test_delete.py",
    ),
    Mutant(
        "a deletion whose bytes come back",
        "lifecycle/delete.py",
        '    name = f"{by[:200]} {uuid.uuid4().hex}"',
        '    name = f"{by[:200]}"',
        "test_mutants.py::test_a_state_of_deleting_is_unique",
    ),
    Mutant(
        "reuse an aborted push id",
        "lifecycle/versions.py",
        "    def _reserve(self, version: Version, *, etag: str) -> Reservation:\n        pid = uuid.uuid4().hex\n",
        '    def _reserve(self, version: Version, *, etag: str) -> Reservation:\n        pid = "0" * 32\n',
        "test_mutants.py::test_a_push_id_is_never_used_twice",
    ),
    Mutant(
        "believe that a lost reply means nothing was done",
        "storage/conditional.py",
        "            if not doubt:\n                raise\n            written = _read_back(store, key, body)",
        "            if not doubt:\n                raise\n            written = None",
        "test_mutants.py::test_a_lost_reply_is_read_back",
    ),
    Mutant(
        "believe a conflict with oneself",
        "storage/conditional.py",
        "        except KeyConflictError:\n            written = _read_back(store, key, body)",
        "        except KeyConflictError:\n            written = None",
        "test_mutants.py::test_a_write_sent_twice_is_no_conflict",
    ),
    Mutant(
        "mend by uploading before the record says so",
        "lifecycle/repair.py",
        "    etag = _swap(store, ref, target, record)\n    size = _upload(store, ref, record, good, seal, progress)\n",
        "    size = _upload(store, ref, record, good, seal, progress)\n    etag = _swap(store, ref, target, record)\n",
        "test_fsck.py",
    ),
    Mutant(
        "mend from a copy nobody compared",
        "lifecycle/repair.py",
        "    for file in manifest.files:\n        _require_good(file, good)\n",
        "",
        "test_fsck.py",
    ),
    Mutant(
        "no check of a chunk's digest",
        "delivery/download.py",
        "        if self._found.hexdigest() != self._digest:",
        "        if False:",
        "test_download.py",
    ),
    Mutant(
        "ignore a threshold",
        "signing/quorum.py",
        "    if len(counting) >= threshold:",
        "    if len(counting) >= 1:",
        "test_policy.py test_trust.py test_vectors.py test_revocations.py",
    ),
    Mutant(
        "skip revoked versions",
        "trust/revocations.py",
        "            if entry.digest is not None and entry.digest == digest:",
        "            if False:",
        "test_revocations.py",
    ),
    Mutant(
        "accept an older generation",
        "trust/marks.py",
        "            if mark.number < before.number:",
        "            if False:",
        "test_marks.py",
    ),
    Mutant(
        "drop an fsync",
        "storage/local_files.py",
        "            self._disk.sync(descriptor)\n            yield path",
        "            yield path",
        "test_power_cut.py",
    ),
    Mutant(
        "swap without comparing",
        "storage/local.py",
        "            if current is None or _etag(current) != etag:",
        "            if current is None:",
        "test_store_contract.py",
    ),
)
"""Every planted bug."""


def copy_tree(place: Path) -> Path:
    """Copy the working tree and return the copy's root."""
    tree = place / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
    return tree


def faults_of_list() -> list[str]:
    """Return what is wrong with the list itself: a text that is gone or not unique, a test file that is gone."""
    faults: list[str] = []
    for mutant in MUTANTS:
        count = (ROOT / PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1 or mutant.old == mutant.new:
            faults.append(f"{mutant.name}: its text is {count} times in {mutant.file}")
        for test in mutant.test.split():
            if not (ROOT / "tests/registry" / test.partition("::")[0]).is_file():
                faults.append(f"{mutant.name}: {test} is gone")
    return faults


def is_noticed(mutant: Mutant, tree: Path) -> bool:
    """Plant a bug in a copied tree, run its tests, take it out again; say whether they noticed."""
    path = tree / PACKAGE / mutant.file
    good = path.read_text(encoding="utf-8")
    assert good.count(mutant.old) == 1, mutant.name
    path.write_text(good.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return _exit_code(tree, mutant.test) == NOTICED
    finally:
        path.write_text(good, encoding="utf-8")


def is_clean(tree: Path, tests: str) -> bool:
    """Say whether tests pass on an unchanged copy; if not, they would notice anything."""
    return _exit_code(tree, tests) == 0


def _exit_code(tree: Path, tests: str) -> int:
    packages = [str(tree / "registry"), str(tree / "examples"), str(tree)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/registry/{test}" for test in tests.split())],
        cwd=tree,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(packages),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LORAPLEX_IN_MUTANT": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode
