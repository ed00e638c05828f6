"""The server's reference pages say what the code does."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from prometheus_client import CollectorRegistry

from loraplex_server.calls.status import STATUS_OF_REASON
from loraplex_server.config import Config, TenantSettings
from loraplex_server.metrics import Metrics

DOCS = Path(__file__).parents[2] / "docs"


def test_every_reason_has_a_row_in_the_table_of_errors() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(STATUS_OF_REASON)


def test_every_setting_is_documented_and_no_other() -> None:
    text = (DOCS / "server.md").read_text()
    rows = re.findall(r"^\| (`\w+\.\w+`(?:, `\w+\.\w+`)*) \|", text, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+\.\w+)`", row)}
    known = {
        f"{section}.{item.name}"
        for section, kind in {**get_type_hints(Config), "tenants": TenantSettings}.items()
        for item in fields(kind)
    }
    assert documented == known


def test_every_metric_is_documented_and_no_other() -> None:
    registry = CollectorRegistry()
    Metrics(tenants_max=1, registry=registry)
    known = {metric.name for metric in registry.collect()}
    documented = set(re.findall(r"`(loraplex_\w+?)(?:_total)?`", (DOCS / "server.md").read_text()))
    assert {name for name in documented if name != "loraplex_server"} == known


def test_every_metric_that_operators_are_told_to_watch_exists() -> None:
    registry = CollectorRegistry()
    Metrics(tenants_max=1, registry=registry)
    known = {metric.name for metric in registry.collect()}
    used = set(
        re.findall(
            r"\b(loraplex_\w+?)(?:_total|_bucket|_count|_sum)?\b", (DOCS / "operations.md").read_text()
        )
    )
    assert len(used) > 5
    assert used <= known


def test_every_module_stands_in_the_architecture_page() -> None:
    text = (DOCS / "architecture.md").read_text()
    root = DOCS.parent
    for package in ("registry", "server", "client", "trainer", "examples"):
        for path in (root / package / f"loraplex_{package}").rglob("*.py"):
            if path.stem in {"__init__", "__main__"} or path.parent.name == "commands":
                continue  # a command's module is named like the command, which docs/cli.md has
            assert re.search(rf"`(\w+/)?{path.stem}`", text), f"{path.relative_to(root)} is not on the page"
