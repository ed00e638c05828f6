"""`docs/cli.md`, executed: every block in its order, and every command has a section there."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from loraplex_registry import errors
from loraplex_registry.cli import COMMANDS, EXIT_CODES, main
from tests.registry import builders

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the directories the page speaks of; we are in it."""
    for name in list(os.environ):
        if name.startswith(("XDG_", "LORAPLEX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    builders.make_base(tmp_path / "base")
    builders.make_adapter(tmp_path / "orders")
    downloaded = builders.make_adapter(
        tmp_path / "downloaded", seed=2, config=builders.adapter_config(target_modules=".*_proj")
    )
    shutil.copytree(downloaded, tmp_path / "to-sign")
    (tmp_path / "to-sign/adapter_config.json").write_text(json.dumps(builders.adapter_config()))
    builders.make_adapter(downloaded / "checkpoint-500")
    (downloaded / "optimizer.pt").write_bytes(b"\x80")
    (downloaded / "tokenizer.json").write_text("{}")
    (tmp_path / "evaluation.json").write_text('{"accuracy": 0.9}')
    return tmp_path


def expected(lines: list[str]) -> re.Pattern[str]:
    """What the lines below a command stand for: `…` for a part of a line, on a line of its own for any lines."""
    pattern = ""
    for line in lines:
        if line == "…":
            pattern += r"(?:.*\n)*"
        else:
            pattern += ".*".join(map(re.escape, line.split("…"))) + r" *\n"
    return re.compile(pattern)


def test_every_block_of_the_page_is_true(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: set[str] = set()
    for block in _BLOCK.findall(PAGE):
        for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, output = command.partition("\n")
            words = shlex.split(line, comments=True)
            assert words[0] == "registry"
            code = re.search(r"# exit ([0-9]+)$", line)
            capsys.readouterr()
            ended = main(words[1:])  # one process: forty of them would take half a minute
            said = "".join(capsys.readouterr())
            assert ended == (int(code[1]) if code else 0), (line, said)
            assert expected(output.splitlines()).fullmatch(said), f"{line}\n{said}"
            ran.add(words[1])
    assert ran == set(COMMANDS)


def test_every_command_has_a_section_in_the_order_of_the_help() -> None:
    sections = [name for name in re.findall(r"^## (.+)$", PAGE, re.MULTILINE) if name != "For all commands"]
    assert sections == list(COMMANDS)
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[2:]:
        assert "Exit codes: " in section, section[:40]


def test_every_exit_code_is_in_the_table() -> None:
    assert [int(code) for code in re.findall(r"^\| ([0-9]+) \|", PAGE, re.MULTILINE)] == list(EXIT_CODES)


def test_the_page_of_errors_names_every_reason_under_its_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs/errors.md").read_text()
    rows = dict(re.findall(r"^\| ([0-9]+) \| (.*) \|$", page, re.MULTILINE))
    classes = errors.RegistryError.__subclasses__()
    while classes:
        error = classes.pop()
        classes += error.__subclasses__()
        if error.__module__ == errors.__name__ and error.code != "INTERNAL":
            assert f"`{error.code}`" in rows[str(error.exit_code)], error
