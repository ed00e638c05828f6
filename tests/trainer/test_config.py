"""Settings are strict: what is not understood is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from loraplex_trainer.config import TrainConfig, load_config, parse_config
from loraplex_trainer.errors import ConfigError

MINIMAL = "base_model: ./base\noutput: out\ndata:\n  - {path: train.jsonl}\n"


def load(tmp_path: Path, *changes: str, text: str = MINIMAL) -> TrainConfig:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    return load_config(path, changes)


def test_three_keys_are_enough(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.method == "lora"
    assert config.data[0].type == "messages"


def test_file_names_start_at_the_settings_file(tmp_path: Path) -> None:
    publish = "publish: {ref: acme/orders, registry: file:///r, key: keys/acme.key}\n"
    config = load(tmp_path, text=MINIMAL + publish)
    assert config.base_model == str(tmp_path / "base")
    assert config.output == str(tmp_path / "out")
    assert config.data[0].path == str(tmp_path / "train.jsonl")
    assert config.publish.key == str(tmp_path / "keys/acme.key")


def test_file_names_in_a_change_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    config = load(tmp_path, "output=./mine", "base_model=./other")
    assert config.output == str(here / "mine")
    assert config.base_model == str(here / "other")


@pytest.mark.parametrize("name", ["acme/model", "model", "/srv/models/base"])
def test_other_names_of_a_base_are_left_alone(tmp_path: Path, name: str) -> None:
    assert load(tmp_path, f"base_model={name}").base_model == name


def test_changes_on_the_command_line_win_over_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, "train.lr=1e-3", "lora.r=8", "method=qlora", "lora.target=[q_proj, v_proj]")
    assert (config.train.lr, config.lora.r, config.method) == (1e-3, 8, "qlora")
    assert config.lora.target == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("metod=lora", "unknown setting metod; did you mean method?"),
        ("train.lrr=1e-3", r"unknown setting train\.lrr; did you mean train\.lr\?"),
        ("lora.rank=8", r"unknown setting lora\.rank"),
        ("method=adalora", "method must be one of lora, qlora, not 'adalora'"),
        ("lora.r=0", r"lora\.r must be from 1 to 512, not 0"),
        ("lora.r=true", r"lora\.r must be int, not True"),
        ("lora.r=8.5", r"lora\.r must be int"),
        ("lora.dropout=1", r"lora\.dropout must be from 0 to 0\.99"),
        ("train.lr=fast", r"train\.lr must be a number, not 'fast'"),
        ("train.lr=.nan", r"train\.lr must be from"),
        ("train.seq_len=1", r"train\.seq_len must be from 2"),
        ("train.dtype=fp16", r"train\.dtype must be one of bf16, fp32"),
        ("train=8", "train must be a section"),
        ("data=train.jsonl", "data must be a list"),
        ("data=[]", "data must name at least one file"),
        ("data=[{type: alpaca}]", r"setting data\[0\]\.path is required"),
        (
            "data=[{path: a, type: csv}]",
            r"data\[0\]\.type must be one of messages, alpaca, prompt_completion",
        ),
        ("publish.audit=maybe", r"publish\.audit must be one of settings, on, off"),
        ("train.lr", "'train.lr' is no change"),
        ("method.x=1", "method is not a section"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, change, text=MINIMAL + "method: lora\n")


def test_keys_of_key_services_are_no_files_and_on_is_no_truth(tmp_path: Path) -> None:
    publish = "publish: {key: 'awskms:alias/acme', encryption_key: 'file:acme.kek, vault:transit/keys/a', audit: on}\n"
    found = load(tmp_path, text=MINIMAL + publish).publish
    assert found.key == "awskms:alias/acme"
    assert found.encryption_key == f"file:{tmp_path / 'acme.kek'}, vault:transit/keys/a"
    assert found.audit == "on"
    assert load(tmp_path, "publish.audit=off", text=MINIMAL).publish.audit == "off"
    assert load(tmp_path, text=MINIMAL).publish.audit == "settings"


@pytest.mark.parametrize("missing", ["base_model", "output", "data"])
def test_a_missing_setting_is_named(missing: str) -> None:
    document: dict[str, Any] = {"base_model": "b", "output": "o", "data": [{"path": "d"}]}
    del document[missing]
    with pytest.raises(ConfigError, match=f"setting {missing} is required"):
        parse_config(document, folder=Path())


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "a: !!python/object/apply:os.system [true]\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, text=text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_change_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr"):
        load(tmp_path, "train.lr=[")
