"""`loraplex train`: from a settings file to a signed version that verifies."""

import datetime as dt
import io
import json
from pathlib import Path

import pytest

from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import generate_key
from loraplex_registry.storage.store import open_store
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.weights import Limits
from loraplex_trainer.cli import StepPrinter, main
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
    "change", ["publish.key=/nowhere/other.key", "publish.registry=ftp://x", "publish.ref=acme"]
)
def test_a_failed_publication_ends_with_status_1_and_keeps_the_adapter(
    change: str, settings_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(settings_file), change]) == 1
    assert capsys.readouterr().err.strip()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


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
