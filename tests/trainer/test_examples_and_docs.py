"""The shipped settings files train as they are, and the page about training names every setting."""

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from loraplex_examples import tasks
from loraplex_registry.signing import generate_key
from loraplex_trainer.cli import main
from loraplex_trainer.config import TrainConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_there_are_examples() -> None:
    assert [path.name for path in EXAMPLES] == ["train-and-publish.yaml", "train.yaml"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_trains(
    path: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = [f"base_model={base}", "train.max_steps=1", "output=./out"]
    if "publish" in path.stem:
        generate_key(tmp_path / "tenant.key")
        changes += ["publish.key=./tenant.key", f"publish.registry={(tmp_path / 'registry').as_uri()}"]
    assert main([str(path), *changes]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "task", "split"),
    [
        ("orders-train", "acme/orders", "train"),
        ("orders-heldout", "acme/orders", "heldout"),
        ("tickets-train", "globex/tickets", "train"),
    ],
)
def test_the_shipped_data_are_the_tasks(name: str, task: str, split: str) -> None:
    rows = [
        json.loads(line) for line in (ROOT / "examples" / "data" / f"{name}.jsonl").read_text().splitlines()
    ]
    for row, made in zip(rows, tasks.dataset(task, split, len(rows)), strict=True):  # type: ignore[arg-type]
        question, answer = (turn["content"] for turn in made["messages"])
        alpaca = {"instruction": question, "output": answer}
        assert row == (alpaca if name.startswith("tickets") else {"messages": made["messages"]})


def settings(kind: Any, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for item in fields(kind):
        hint = get_type_hints(kind)[item.name]
        inner = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
        names |= settings(inner, f"{prefix}{item.name}.") if inner else {prefix + item.name}
    return names


def test_every_setting_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| (`[\w.]+`(?:, `[\w.]+`)*) \|", text, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w.]+)`", row)} == settings(TrainConfig)


def test_the_settings_shown_on_the_page_are_accepted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex_trainer.config import load_config

    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    path = tmp_path / "page.yaml"
    path.write_text(block)
    assert load_config(path).method == "qlora"
