"""Makes the verdict vectors: `python -m tests.vectors.generate` writes `tests/vectors/<case>/`, always the same bytes.

Folders that exist are compared and never changed: a vector is a promise about format 1. New cases are added in
`passing.py`, `failing_objects.py` and `failing_policy.py`.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_registry.format.canonical import canonical
from tests.registry import forge
from tests.registry.forge import Forge, Objects

PLACE = Path(__file__).parent
KEYS = (
    "ci",
    "ci2",
    "release",
    "release2",
    "release3",
    "security",
    "builder",
    "stranger",
    "globex",
    "p256-ci",
)


@dataclass
class Step:
    """One verification: what lies in the registry, what is asked, under which policy, and the verdict."""

    objects: Objects
    expect: str
    ref: str = "acme/orders@prod"
    policy: str = ""


@dataclass
class Case:
    """A vector. Its name ends in `_fail` when the last step is refused."""

    name: str
    why: str
    steps: list[Step]


Maker = Callable[[Forge], "list[Step] | Step"]
MAKERS: list[tuple[str, str, Maker]] = []


def case(name: str, why: str) -> Callable[[Maker], Maker]:
    """Register a function that makes a case."""

    def register(make: Maker) -> Maker:
        MAKERS.append((name, why, make))
        return make

    return register


def cases(made: Forge) -> list[Case]:
    """Every case."""
    from tests.vectors import failing_objects, failing_policy, passing  # noqa: F401

    found = []
    for name, why, make in MAKERS:
        steps = make(made)
        found.append(Case(name, why, steps if isinstance(steps, list) else [steps]))
    names = [item.name for item in found]
    assert len(set(names)) == len(names), "two cases have one name"
    return found


def files_of(item: Case) -> dict[str, bytes]:
    """The files of a case's folder."""
    files: dict[str, bytes] = {}
    steps: list[dict[str, Any]] = []
    for step in item.steps:
        text = (step.policy or forge.policy_text()).encode()
        policy = _place(files, "policy.toml", text)
        layout = {key: _place(files, _name(key), body) for key, body in sorted(step.objects.items())}
        steps.append({"ref": step.ref, "policy": policy, "objects": layout, "expect": step.expect})
        for key in re.findall(r"keys/([a-z0-9-]+)\.pub", text.decode()):
            files[f"keys/{key}.pub"] = forge.signer(key).public_key.pem.encode()
    files["expected.json"] = json.dumps({"steps": steps}, indent=1).encode() + b"\n"
    files["README.md"] = f"# {item.name}\n\n{item.why}\n".encode()
    return files


def _name(key: str) -> str:
    """A short file name for a key of the registry."""
    parts = key.split("/")
    if parts[-1] == "revocations.json":
        stem = "revocations"
    elif "/b/" in key:
        stem = f"blob-{parts[-1]}"
    else:
        kind = {"v": "record", "tags": "tag"}[parts[-2]]
        stem = f"{kind}-{parts[-1].removesuffix('.json')}"
    if key.startswith("t/acme/a/orders/") or stem == "revocations":
        return stem + ("" if stem.startswith("blob") else ".json")
    return f"{parts[1]}-{parts[3]}-{stem}" + ("" if stem.startswith("blob") else ".json")


def _place(files: dict[str, bytes], name: str, body: bytes) -> str:
    """Add a file; another content under the same name gets a number."""
    stem, dot, suffix = name.partition(".")
    number = 1
    while files.get(name, body) != body:
        number += 1
        name = f"{stem}.{number}{dot}{suffix}"
    files[name] = body
    return name


def write(item: Case) -> list[str]:
    """Write a case's folder, or return the files in which an existing one differs."""
    files, folder = files_of(item), PLACE / item.name
    if folder.is_dir():
        there = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        return sorted(
            f"{item.name}/{name}"
            for name in files.keys() | there.keys()
            if name not in there or files.get(name) != there[name].read_bytes()
        )
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return []


def main() -> int:
    """Write what is missing; exit 1 when a folder is not what the generator makes."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = cases(Forge(Path(place)))
        different = [name for item in found for name in write(item)]
    for name in different:
        print(f"differs, and is left alone: {name}", file=sys.stderr)
    failing = sum(item.name.endswith("_fail") for item in found)
    print(f"{len(found) - failing} pass, {failing} fail")
    return 1 if different else 0


FORMAT_MARKER = canonical({"fmt": 1})

if __name__ == "__main__":
    # Under `-m` this module is __main__; the cases register themselves in the importable one.
    from tests.vectors import generate

    sys.exit(generate.main())
