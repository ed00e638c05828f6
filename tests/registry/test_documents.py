"""Documents that promise something name the test that proves it; such a test exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`((?:[a-z0-9_]+/)+test_[a-z0-9_]+\.py)(?:::(test_[a-z0-9_]+))?`")


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = NAMED.findall((ROOT / "docs/threat-model.md").read_text())
    assert len(named) >= 50
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / "tests" / file).is_file() or (name and name not in functions_of(ROOT / "tests" / file))
    ]
    assert missing == []


def test_every_row_of_the_threat_model_names_a_test() -> None:
    lines = (ROOT / "docs/threat-model.md").read_text().splitlines()
    rows = [
        line for line in lines if line.startswith("| ") and not line.startswith(("| attack |", "| fault |"))
    ]
    assert len(rows) >= 30
    assert [row for row in rows if not NAMED.search(row)] == []


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
