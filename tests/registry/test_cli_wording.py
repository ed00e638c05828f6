"""What the command says to those who do not know it yet: what was wrong, and the next step."""

import json
import subprocess
from pathlib import Path

import pytest

from loraplex_registry.output import shown
from tests.registry import builders
from tests.registry.shell import COMMAND, Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A home with a registry of one version, `orders@1`, tagged prod."""
    shell = Shell(tmp_path, {})
    builders.make_base(tmp_path / "base")
    builders.make_adapter(tmp_path / "orders")
    shell("init", "--tenant", "acme")
    shell("push", "orders", "--base", "base", "--tag", "prod")
    return shell


def configure(shell: Shell, key: str) -> None:
    """Set the encryption key."""
    path = shell.home / ".config/loraplex/config.toml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("encryption_key")]
    path.write_text("\n".join([*lines, f'encryption_key = "file:{shell.home}/{key}"', ""]))


def test_a_deleted_version_says_when_and_why(shell: Shell) -> None:
    digest = shell.json("resolve", "orders@1")["digest"]
    shell("rm", "orders@1", "--force", "--reason", "wrong data")
    for words in (("resolve", "orders@1"), ("pull", "orders@1", "out"), ("resolve", f"orders@{digest}")):
        said = shell(*words, code=3)
        assert "was deleted at 20" in said
        assert "'wrong data'" in said


def test_damage_names_the_command_that_finds_and_mends_it(shell: Shell) -> None:
    (blob,) = (path for path in shell.home.rglob("b/*/*") if path.is_file())
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    for words in (("pull", "orders", "out"), ("verify", "orders")):
        said = shell(*words, code=5)
        assert "`registry fsck acme/orders --deep`" in said
        assert "`--repair --from COPY`" in said
    blob.unlink()
    assert "`registry fsck acme/orders --deep`" in shell("pull", "orders", "out", code=8)


def test_verifying_a_directory_that_is_not_signed_says_what_is_missing(shell: Shell) -> None:
    said = shell("verify", "./orders", code=5)
    assert "no adapter.manifest.json and no adapter.sig.json" in said
    assert "`registry pull REF DIR`" in said
    shell("pull", "orders", "out")
    (shell.home / "out/adapter.manifest.json").unlink()
    assert "holds no adapter.manifest.json, so" in shell("verify", "./out", code=5)
    assert "is no directory" in shell("verify", "./nope", code=2)


def test_rewrap_and_shred_tell_what_is_left_to_do(shell: Shell) -> None:
    for name in ("old.kek", "new.kek"):
        shell("keys", "gen", name, "--encryption")
    configure(shell, "old.kek")
    shell("push", "orders", "enc", "--base", "base")
    kek = shell.json("show", "enc")["encryption"]["kek"]
    assert f"encrypted with key {kek}" in shell("show", "enc")
    part = shell("rewrap", "acme/enc", "--to", "file:new.kek").splitlines()[-1]
    assert f'"file:{shell.home}/new.kek, file:{shell.home}/old.kek"' in part
    whole = shell("rewrap", "acme", "--to", "file:new.kek").splitlines()[-1]
    assert whole.startswith(f'Next: set encryption_key = "file:{shell.home}/new.kek" in ')
    assert "config.toml, and in every server's settings." in whole
    configure(shell, "new.kek")
    assert "Next:" not in shell("rewrap", "acme", "--to", "file:new.kek")
    for words in (("shred", "acme"), ("shred", "acme", "--apply")):
        said = shell(*words)
        assert "keys of before a rewrap" in said
        assert "backups" in said
        assert "versioned bucket" in said
        assert "destroy those keys too" in said


def test_helps_and_errors_name_where_a_word_comes_from(shell: Shell) -> None:
    assert "registry keys list --json" in " ".join(shell("revoke", "--help").split())
    assert "`registry keys list --json`" in shell("revoke", "--keyid", "ea8b", "--reason", "x", code=2)
    assert "hours" in shell("gc", "--help")
    assert "--tag TAG" in shell("push", "orders", "--base", "base", "--expect", "1", code=2)
    assert "none is no directory" in shell("push", "none", code=5)
    assert "`registry ls TENANT`" in shell.run("ls").stderr
    assert shell.run("ls").stdout == "acme\n"
    assert shell.run("ls", "--quiet").stderr == ""


def test_an_init_that_died_half_way_is_completed(shell: Shell) -> None:
    place = shell.home / ".config/loraplex"
    keyid = shell.json("keys", "list")["keys"][0]["keyid"]
    (place / "keys/acme.pub").unlink()
    (place / "config.toml").unlink()
    assert shell.json("init", "--tenant", "acme")["keyid"] == keyid
    (place / "policy.toml").unlink()
    assert shell.json("init", "--tenant", "acme")["policy_created"]
    shell("resolve", "orders@prod")


@pytest.mark.parametrize("words", [["ls"], ["ls", "acme/orders"], ["show", "orders", "--json"]])
def test_an_answer_that_cannot_be_written_is_told(shell: Shell, words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [COMMAND, *words],
            cwd=shell.home,
            env=shell.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 7
    assert done.stderr.startswith("registry: The answer cannot be written")
    assert done.stderr.count("\n") == 1


def test_names_from_a_bucket_cannot_command_a_terminal(shell: Shell) -> None:
    (place,) = shell.home.rglob("registry/t")
    (place / "evil\x1b[31m").mkdir()
    assert "\x1b" not in shell("ls") + json.dumps(shell.json("ls"))
    assert shown("a\x1b[31m\u202eb\n\tc") == "a\\x1b[31m\\u202eb\n\tc"
