"""`loraplex train`: from a settings file to a signed version that verifies."""

import datetime as dt
import io
import json
import os
from pathlib import Path

import pytest

from loraplex_registry.cli import main as registry_command
from loraplex_registry.encryption.kek_file import generate_encryption_key
from loraplex_registry.lifecycle.audit import AuditLog
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import generate_key, load_signer
from loraplex_registry.storage.store import open_store
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.weights import Limits
from loraplex_trainer.cli import StepPrinter, main
from loraplex_trainer.config import load_config
from loraplex_trainer.publish import destination
from loraplex_trainer.recipe import Step


@pytest.fixture
def settings_file(base: Path, rows_file: Path, tmp_path: Path) -> Path:
    """Settings of a two-step run that publishes."""
    generate_key(tmp_path / "acme.key")
    path = tmp_path / "train.yaml"
    path.write_text(
        f"""
base_model: {base}
output: adapter
data: [{{path: {rows_file.name}}}]
lora: {{r: 4}}
train: {{max_steps: 2, micro_batch: 2, seq_len: 128}}
publish:
  ref: acme/orders
  registry: {(tmp_path / "registry").as_uri()}
  key: acme.key
  tag: prod
"""
    )
    return path


def test_a_published_adapter_verifies_and_can_be_fetched(settings_file: Path, tmp_path: Path) -> None:
    assert main([str(settings_file)]) == 0
    registry = Registry(open_store((tmp_path / "registry").as_uri()))
    (tmp_path / "policy.toml").write_text(
        'version = 1\ndefault = "deny"\n[[rules]]\nscope = "acme/**"\nkeys = [{ path = "acme.pub" }]\n'
    )
    from loraplex_registry.validation.base import BaseModel

    base = BaseModel.from_json((tmp_path / "adapter" / "base_model.json").read_bytes())
    resolved = registry.resolve(AdapterRef.parse("acme/orders@prod"))
    policy = TrustPolicy.load(tmp_path / "policy.toml")
    verified = registry.verify(resolved, policy, base_digest=base.digest, now=dt.datetime.now(dt.UTC))
    staged = registry.fetch(verified, tmp_path / "staging", base=base, limits=Limits())
    trained = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (Path(staged.path) / "adapter_model.safetensors").read_bytes() == trained


def test_the_summary_says_what_was_made_and_where(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(settings_file), "method=qlora"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("qlora on tiny-base-")
    assert "2 steps" in shown.out
    assert str(tmp_path / "adapter") in shown.out
    assert "pushed acme/orders@sha256:" in shown.out
    assert "step 2/2" in shown.err


def test_the_same_adapter_again_is_already_pushed(
    settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(settings_file)]) == 0
    assert main([str(settings_file), f"output={tmp_path / 'again'}"]) == 0
    assert "already pushed acme/orders@sha256:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [("lora.rank=8", "unknown setting lora.rank"), ("data=[{path: none.jsonl}]", "none.jsonl")],
)
def test_wrong_settings_or_data_end_with_status_2(
    change: str, message: str, settings_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(settings_file), change]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", ["publish.key=/nowhere/other.key", "publish.encryption_key=file:/nowhere.kek"]
)
def test_a_failed_publication_ends_with_status_1_and_keeps_the_adapter(
    change: str, settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(settings_file), change]) == 1
    assert "/nowhere" in capsys.readouterr().err
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("publish.registry=ftp://x", "'ftp://x' is not an address"),
        ("publish.ref=acme", "publish: No tenant is set"),
        ("publish.registry=", "give publish.registry"),
        ("publish.key=", "give publish.key"),
        ("publish.encryption_key=pgp:x", "of no known kind"),
    ],
)
def test_a_publication_that_cannot_succeed_is_refused_before_the_training(
    change: str, message: str, settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if change.endswith("="):
        change += "''"
    assert main([str(settings_file), change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def user_settings(home: Path, text: str) -> None:
    """Write the settings of the `registry` command."""
    path = home / "config" / "loraplex" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_what_the_registry_settings_demand_of_a_push_holds_for_the_trainer(
    settings_file: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same adapter by the trainer and by `registry push`, under the same settings, leaves the same in the store."""
    generate_encryption_key(tmp_path / "acme.kek", "acme")
    url = (tmp_path / "registry").as_uri()
    user_settings(
        home,
        f'registry = "{url}"\ntenant = "acme"\nkey = "{tmp_path}/acme.key"\naudit = "on"\n'
        f'encryption_key = "file:{tmp_path}/acme.kek"\n',
    )
    own = ["publish={ref: orders, tag: prod}"]  # all else is as the user's settings say
    assert main([str(settings_file), *own]) == 0
    assert registry_command(["push", str(tmp_path / "adapter"), "acme/pushed", "--tag", "prod"]) == 0
    store = open_store(url)
    trained, pushed = (
        Registry(store).resolve(AdapterRef("acme", name)).record for name in ("orders", "pushed")
    )
    assert trained.encryption is not None
    assert trained.encryption.kek == pushed.encryption.kek
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    stored = [path.read_bytes() for path in (tmp_path / "registry").rglob("*") if path.is_file()]
    assert len(stored) > 4
    assert not any(weights[-4096:] in body for body in stored), "nothing of the weights lies there in clear"
    signer = load_signer(tmp_path / "acme.key")
    told = [(entry.action, entry.subject, entry.actor) for entry in AuditLog(store, "acme").entries()]
    expected = [("push", "{}@1"), ("tag", "{}@prod")]
    assert told == [
        (action, "acme/" + subject.format(name), signer.keyid)
        for name in ("orders", "pushed")
        for action, subject in expected
    ]


def test_publish_settings_come_before_those_of_the_registry_command(
    settings_file: Path, home: Path, tmp_path: Path
) -> None:
    generate_encryption_key(tmp_path / "acme.kek", "acme")
    user_settings(
        home, 'registry = "file:///nowhere"\nkey = "/nowhere.key"\naudit = "on"\n[s3]\ntimeout_s = 7\n'
    )
    changes = ["publish.encryption_key=file:acme.kek", "publish.audit=off"]
    config = load_config(settings_file, changes)
    target = destination(config.publish, os.environ)
    assert target.settings.registry == (tmp_path / "registry").as_uri()
    assert target.settings.key == str(tmp_path / "acme.key")
    assert (
        target.settings.encryption_key == f"file:{Path.cwd() / 'acme.kek'}"
    )  # a change: as a shell completes it
    assert (target.settings.audit, target.settings.s3.timeout_s) == ("off", 7)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def steps(count: int) -> list[Step]:
    return [Step(step=n, steps=count, loss=1.0, lr=1e-3, grad_norm=1.0) for n in range(1, count + 1)]


def test_a_terminal_gets_one_line_redrawn() -> None:
    stream = Terminal()
    printer = StepPrinter(stream)
    for step in steps(100):
        printer(step)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 100


def test_a_file_gets_ten_plain_lines() -> None:
    stream = io.StringIO()
    printer = StepPrinter(stream)
    for step in steps(100):
        printer(step)
    assert stream.getvalue().splitlines()[-1] == "train step 100/100  loss 1.000"
    assert len(stream.getvalue().splitlines()) == 10
    assert "\r" not in stream.getvalue()


def test_a_change_of_publication_is_seen_in_the_registry_only_when_asked(
    settings_file: Path, tmp_path: Path
) -> None:
    assert main([str(settings_file), "publish={}"]) == 0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert not (tmp_path / "registry").exists()
