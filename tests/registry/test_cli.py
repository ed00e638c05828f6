"""The real `registry` command, as a stranger types it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_examples.s3_server import S3Server
from tests.registry import builders
from tests.registry.shell import Shell, failing


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path, {})


@pytest.fixture
def orders(shell: Shell) -> Path:
    """An adapter directory with its base card, as the trainer leaves it."""
    directory = builders.make_adapter(shell.home / "orders")
    (directory / "base_model.json").write_bytes(builders.load_base(shell.home / "base").to_json())
    return directory


def test_three_commands_publish_and_bring_back_an_adapter(shell: Shell, orders: Path) -> None:
    shell("init", "--tenant", "acme")
    assert "pushed acme/orders@1" in shell("push", "./orders")
    shell("pull", "acme/orders", "./x")
    for name in ("adapter_config.json", "adapter_model.safetensors", "base_model.json"):
        assert (shell.home / "x" / name).read_bytes() == (orders / name).read_bytes()
    assert (shell.home / "x/adapter.sig.json").is_file()
    assert (shell.home / ".config/loraplex/keys/acme.key").stat().st_mode & 0o777 == 0o600


def test_a_second_push_says_already_pushed(shell: Shell, orders: Path) -> None:
    shell("init", "--tenant", "acme")
    first = shell.json("push", "./orders", "--tag", "prod")
    assert first["created"]
    assert "already pushed acme/orders@1" in shell("push", "./orders", "--tag", "prod")
    second = shell.json("push", "./orders", "acme/orders")
    assert (second["created"], second["digest"]) == (False, first["digest"])


def test_every_command_tells_one_story_as_json(shell: Shell, orders: Path) -> None:
    init = shell.json("init", "--tenant", "acme")
    pushed = shell.json("push", orders, "--tag", "prod")
    digest = pushed["digest"]
    assert pushed["keyid"] == init["keyid"]
    resolved = shell.json("resolve", "orders@prod")
    assert (resolved["digest"], resolved["tag"], resolved["tag_generation"]) == (digest, "prod", 1)
    assert shell.json("resolve", f"acme/orders@{digest}")["version"] == 1
    assert shell.json("verify", "acme/orders@prod")["digest"] == digest
    assert shell.json("pull", "acme/orders@1", "out")["digest"] == digest
    assert shell.json("verify", "./out")["digest"] == digest
    shown = shell.json("show", "acme/orders")
    assert (shown["verified"], shown["digest"]) == (True, digest)
    assert shown["manifest"]["lora"]["rank"] == 4
    assert shell.json("ls") == {"tenants": ["acme"], "next": None}
    assert shell.json("ls", "acme") == {"tenant": "acme", "adapters": ["orders"], "next": None}
    listed = shell.json("ls", "acme/orders")
    assert (listed["tags"][0]["tag"], listed["versions"][0]["digest"]) == ("prod", digest)
    assert shell.json("keys", "gen", "other.key", "--no-passphrase")["algorithm"] == "ecdsa-p256"
    assert shell.json("init", "--tenant", "acme")["created"] is False


def test_the_same_story_on_s3(tmp_path: Path, s3: S3Server) -> None:
    url = s3.make_bucket("cli") + "/adapters"
    shell = Shell(tmp_path, {**s3.environment, "LORAPLEX_REGISTRY": url})
    orders = builders.make_adapter(tmp_path / "orders")
    builders.make_base(tmp_path / "base")
    assert shell.json("init", "--tenant", "acme")["registry"] == url
    assert shell.json("push", orders, "--base", tmp_path / "base", "--tag", "prod")["requests"] == 7
    assert "already pushed" in shell("push", orders, "--base", tmp_path / "base")
    shell("pull", "acme/orders@prod", "./x")
    assert (tmp_path / "x/adapter_model.safetensors").read_bytes() == (
        orders / "adapter_model.safetensors"
    ).read_bytes()
    assert shell.json("ls", "acme")["adapters"] == ["orders"]


def test_every_failure_has_its_exit_code_and_reason(shell: Shell, orders: Path) -> None:
    failing(shell, 2, "INVALID_ARGUMENT", "push", orders)
    shell("init", "--tenant", "acme")
    shell("push", orders, "--tag", "prod")
    failing(shell, 2, "INVALID_ARGUMENT", "resolve", "Acme/Orders")
    failing(shell, 2, "INVALID_ARGUMENT", "push", orders, "--key", "none.key")
    failing(shell, 2, "INVALID_ARGUMENT", "resolve", "orders", "--registry", "http://x")
    failing(shell, 3, "ADAPTER_NOT_FOUND", "resolve", "acme/orders@2")
    failing(shell, 3, "ADAPTER_NOT_FOUND", "pull", "acme/none", "out")
    shell("pull", "acme/orders", "out")
    failing(shell, 4, "CONFLICT", "pull", "acme/orders", "out")
    failing(shell, 4, "CONFLICT", "init", "--tenant", "globex")
    failing(shell, 6, "POLICY_REFUSED", "verify", "acme/orders", "--policy", "none.toml")
    failing(shell, 7, "STORE_UNAVAILABLE", "resolve", "orders", "--registry", "file:///nowhere/at/all")
    (shell.home / "out/adapter.sig.json").write_text("{}")
    failing(shell, 5, "SIGNATURE_INVALID", "verify", "./out")
    (orders / "weights.bin").write_bytes(b"x")
    failing(shell, 5, "UNSUPPORTED_ADAPTER", "push", orders)
    (record,) = (shell.home / ".local/share/loraplex/registry/t/acme/a/orders/v").glob("1.json")
    record.write_bytes(b"{")
    failing(shell, 8, "DIGEST_MISMATCH", "resolve", "acme/orders@1")


def test_a_pulled_directory_that_was_changed_is_refused(shell: Shell, orders: Path) -> None:
    shell("init", "--tenant", "acme")
    shell("push", orders)
    good = shell.home / "good"
    shell("pull", "acme/orders", good)
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "base_model.json",
        "adapter.manifest.json",
    ):
        out = shell.home / f"out-{name}"
        shutil.copytree(good, out)
        body = bytearray((out / name).read_bytes())
        body[len(body) // 2] ^= 1
        (out / name).write_bytes(bytes(body))
        assert shell.json("verify", out, code=5)["error"]["code"] in {"DIGEST_MISMATCH", "SIGNATURE_INVALID"}
    (good / "README.md").write_text("not signed")
    failing(shell, 5, "UNSUPPORTED_ADAPTER", "verify", good)


def test_a_key_with_passphrase_works_by_file_only(shell: Shell, orders: Path) -> None:
    shell("init", "--tenant", "acme")
    (shell.home / "pass").write_text("hunter2-canary\n")
    shell("keys", "gen", "locked.key", "--passphrase-file", "pass", "--algorithm", "ed25519")
    assert "ENCRYPTED" in (shell.home / "locked.key").read_text()
    assert "hunter2" not in shell("push", orders, "--key", "locked.key", code=2)
    shell.extra["LORAPLEX_KEY_PASSPHRASE_FILE"] = "pass"
    shell("push", orders, "--key", "locked.key")
    failing(shell, 5, "SIGNATURE_INVALID", "resolve", "acme/orders")
    assert shell.json("show", "acme/orders")["verified"] is False


def test_a_wrong_key_in_the_settings_names_the_nearest(shell: Shell) -> None:
    shell("init", "--tenant", "acme")
    with (shell.home / ".config/loraplex/config.toml").open("a") as file:
        file.write('polici = "x"\n')
    assert "did you mean 'policy'" in shell("ls", code=2)


def test_xdg_directories_are_honoured(shell: Shell) -> None:
    shell.extra.update(XDG_CONFIG_HOME=str(shell.home / "conf"), XDG_DATA_HOME=str(shell.home / "data"))
    shell("init", "--tenant", "acme")
    assert (shell.home / "conf/loraplex/config.toml").is_file()
    assert (shell.home / "data/loraplex/registry/registry.json").is_file()
    assert not (shell.home / ".config").exists()


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("push",), ("init",), ("pull", "a/b")])
def test_wrong_usage_is_exit_code_two(arguments: tuple[str, ...], shell: Shell) -> None:
    assert "usage: registry" in shell(*arguments, code=2)


def test_the_version_is_printed_without_loading_anything_heavy(shell: Shell) -> None:
    assert shell("--version").startswith("registry (loraplex) ")
    code = (
        "import sys; from loraplex_registry.cli import main\n"
        "try: main(['--version'])\nexcept SystemExit: pass\n"
        "heavy = {'botocore', 'numpy', 'cryptography', 'securesystemslib', 'rfc8785'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_without_its_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['rfc8785'] = None\n"
        "from loraplex_registry.cli import main; sys.exit(main(['ls']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ended.returncode == 2
    assert "pip install 'loraplex[registry]'" in ended.stderr
    assert "Traceback" not in ended.stderr
