"""Shell completion, asked for the way a shell asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_registry.cli import COMMANDS
from tests.registry import builders
from tests.registry.shell import Shell

# What bash does on TAB: the line, the cursor, and the words as bash cuts them (at `@` and `:` too).
_TAB = r"""
source "$HOME/completion.bash"
COMP_LINE=$1; COMP_POINT=${#COMP_LINE}
COMP_WORDBREAKS=$' \t\n"\'><=;|&(:@'
read -ra COMP_WORDS <<<"$COMP_LINE"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_registry
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def tabbed(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A home with a registry of two adapters, and the script of bash beside it."""
    shell = Shell(tmp_path_factory.mktemp("home"), {})
    adapter = builders.make_adapter(shell.home / "orders")
    builders.make_base(shell.home / "base")
    shell("init", "--tenant", "acme")
    shell("push", adapter, "--base", "base", "--tag", "prod")
    shell("push", adapter, "offers", "--base", "base")
    (shell.home / "completion.bash").write_text(shell("completion", "bash"))
    return shell


def tab(shell: Shell, line: str) -> set[str]:
    """What bash offers at the end of a line."""
    done = subprocess.run(
        ["bash", "--norc", "-c", _TAB, "bash", line],
        cwd=shell.home,
        env={**shell.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("registry pu", {"push", "pull"}),
        ("registry keys g", {"gen"}),
        ("registry push --ta", {"--tag"}),
        ("registry --json res", {"resolve"}),
        ("registry push ./ord", {"./orders"}),
        ("registry push --base ba", {"base"}),
        ("registry push --tag x ./ord", {"./orders"}),
        ("registry show acme/o", {"acme/orders", "acme/offers"}),
        ("registry show of", {"offers"}),
        ("registry pull acme/orders@p", {"prod"}),
        ("registry pull orders@", {"prod", "1"}),
        ("registry verify o", {"orders", "offers"}),
        ("registry show globex/", set()),
        ("registry completion f", {"fish"}),
    ],
)
def test_bash_completes_commands_options_files_and_references(
    tabbed: Shell, line: str, offered: set[str]
) -> None:
    found = tab(tabbed, line)
    assert offered <= found
    assert offered or not found


def test_bash_offers_every_command_and_every_option(tabbed: Shell) -> None:
    assert tab(tabbed, "registry ") == set(COMMANDS)
    assert {"--tag", "--base", "--key", "--json", "--registry"} <= tab(tabbed, "registry push -")


def test_no_registry_is_no_reason_for_noise(tmp_path: Path) -> None:
    assert Shell(tmp_path, {})("completion", "refs", "acme/") == ""


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_every_script_names_every_command(tabbed: Shell, shell_name: str) -> None:
    script = tabbed("completion", shell_name)
    assert all(name in script for name in COMMANDS)
    assert tabbed.json("completion", shell_name)["script"] == script
