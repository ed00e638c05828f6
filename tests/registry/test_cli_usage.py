"""How the command treats those who type: help, mistakes, scripts, and what it loads before it knows what is wanted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loraplex_registry import cli, configured
from loraplex_registry.cli import COMMANDS, command_parser, main
from loraplex_registry.completions import syntax_of
from loraplex_registry.storage.store import CountingStore
from tests.registry import builders
from tests.registry.shell import COMMAND, Shell

HEAVY = {
    "boto3",
    "botocore",
    "cryptography",
    "numpy",
    "securesystemslib",
    "tink",
    "hvac",
    "google",
    "model_signing",
}


def places() -> list[tuple[str, ...]]:
    """Every command, and every action of a command."""
    found: list[tuple[str, ...]] = []
    for name in COMMANDS:
        found.append((name,))
        found += [(name, action) for action in syntax_of(command_parser(name), "").actions]
    return found


def test_parsing_any_command_loads_nothing_heavy() -> None:
    code = (
        "import sys; from loraplex_registry.cli import COMMANDS, build_parser, command_parser\n"
        "build_parser()\n"
        "for name in COMMANDS:\n"
        "    command_parser(name)\n"
        "    print(name, *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        command, *loaded = line.split()
        assert not HEAVY & set(loaded), command


@pytest.mark.parametrize("words", places(), ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.startswith(f"usage: registry {' '.join(words)}")
    assert len(said) > 100


@pytest.mark.parametrize("words", places(), ids=" ".join)
def test_every_option_and_argument_has_a_help_text(words: tuple[str, ...]) -> None:
    syntax = syntax_of(command_parser(words[0]), "")
    for action in words[1:]:
        syntax = syntax.actions[action]
    options = {name for word in syntax.options for name in word.names}
    assert all(word.help for word in syntax.options), words
    assert syntax.actions or {"--json", "--quiet", "--registry"} <= options


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["pul"], "did you mean 'pull'?"),
        (["keys", "gn"], "did you mean 'gen'?"),
        (["push", "x", "--tga", "y"], "did you mean --tag?"),
        (["push", "x", "--ta", "y"], "did you mean --tag?"),  # no abbreviations
        (["ls", "a", "b"], "one word too many"),
        (["zzz"], "--help lists them"),
        ([], "COMMAND"),
        (["pull", "x"], "DIR"),
    ],
)
def test_a_mistake_gets_one_sentence_with_a_hint(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert hint in err
    assert "usage: registry" in err
    code, out, err = said(capsys, *words, "--json")
    assert (code, err) == (2, "")
    assert hint in json.loads(out)["error"]["message"]


def test_options_may_stand_before_the_command(tmp_path: Path) -> None:
    shell = Shell(tmp_path, {})
    shell("init", "--tenant", "acme")
    there = (tmp_path / ".local/share/loraplex/registry").as_uri()
    assert json.loads(shell("--registry", there, "--json", "ls")) == {"tenants": [], "next": None}
    assert json.loads(shell("--json", "ls", "--registry", there)) == {"tenants": [], "next": None}
    assert shell("-q", "ls") == ""


def test_a_fault_of_ours_is_one_sentence_and_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Any) -> int:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(cli, "_run", broken)
    monkeypatch.delenv("LORAPLEX_TRACEBACK", raising=False)
    code, _, err = said(capsys, "ls")
    assert (code, err.count("\n")) == (1, 1)
    assert "LORAPLEX_TRACEBACK=1" in err
    code, out, _ = said(capsys, "ls", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (1, "INTERNAL")
    monkeypatch.setenv("LORAPLEX_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["ls"])


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    code, _, err = said(capsys, "ls")
    assert code == 130
    assert "run the same command again" in err


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return publish_in(tmp_path_factory.mktemp("home"))


def publish_in(home: Path) -> Shell:
    shell = Shell(home, {})
    builders.make_base(shell.home / "base")
    builders.make_adapter(shell.home / "orders")
    shell("init", "--tenant", "acme")
    shell("push", "orders", "--base", "base", "--tag", "prod")
    return shell


def test_a_reader_that_goes_away_ends_the_command_quietly(published: Shell) -> None:
    done = subprocess.run(
        f"{COMMAND} completion bash | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        env=published.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.split("\n")[-2] in {"0", "141"}


def test_a_terminal_without_these_characters_is_no_obstacle(published: Shell) -> None:
    done = subprocess.run(
        [COMMAND, "show", "orders"],
        env={**published.environment, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.isascii()


# What each command asks of the storage, once the registry holds one version with a tag.
REQUESTS = {
    "resolve orders@prod": 2,
    "resolve orders@1": 2,
    "resolve orders": 3,
    "show orders@prod": 2,
    "ls": 1,
    "ls acme": 1,
    "ls acme/orders": 4,
    "pull orders@prod out-{n}": 3,
    "tag orders@1 prod": 4,  # with the root's marker, which every command that writes reads, and the revocation list
    "log orders@prod": 2,
    "completion bash": 0,
    "policy check": 0,
}


@pytest.mark.parametrize("line", REQUESTS)
def test_commands_ask_the_storage_for_no_more_than_they_need(
    line: str, published: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stores: list[CountingStore] = []

    def counted(*arguments: Any, **options: Any) -> CountingStore:
        stores.append(CountingStore(real(*arguments, **options)))
        return stores[-1]

    real = configured.open_store
    monkeypatch.setattr(configured, "open_store", counted)
    for name in list(os.environ):
        if name.startswith(("XDG_", "LORAPLEX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(published.home))
    monkeypatch.chdir(published.home)
    assert main(line.format(n=os.getpid()).split()) == 0, capsys.readouterr().err
    assert sum(store.requests for store in stores) == REQUESTS[line]


def test_a_tag_that_was_put_back_is_not_moved_on_from_there(tmp_path: Path) -> None:
    published = publish_in(tmp_path)
    (stored,) = published.home.rglob("tags/prod.json")
    earlier = stored.read_bytes()
    published("untag", "orders@prod")
    published("tag", "orders@1", "prod")
    published("resolve", "orders@prod")  # seen: a later generation
    stored.chmod(0o644)
    stored.write_bytes(earlier)
    for words in (("tag", "orders@1", "prod"), ("untag", "orders@prod")):
        assert "ROLLBACK" in published(*words, "--json", code=6)
    stored.unlink()
    assert "ROLLBACK" in published("tag", "orders@1", "prod", "--json", code=6)
