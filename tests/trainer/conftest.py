"""Fixtures: a tiny base with random weights, made by the real recipe, and settings for a run of a few steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex_examples import tasks
from loraplex_examples.tiny_base import ensure_tiny_base
from loraplex_trainer.config import TrainConfig, parse_config
from tests.trainer.builders import SMALL, ConfigMaker


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without settings of the `registry` command, so that no test depends on whose machine it runs on."""
    place = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
    for name in ("LORAPLEX_REGISTRY", "LORAPLEX_KEY_PASSPHRASE_FILE"):
        monkeypatch.delenv(name, raising=False)
    return place


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the small base."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="session")
def base(base_cache: Path) -> Path:
    """The small base's directory."""
    return ensure_tiny_base(base_cache, recipe=SMALL)


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    """The small base's tokenizer."""
    from loraplex_trainer.methods import load_tokenizer

    return load_tokenizer(base)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Sixteen rows of a tenant's task."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tasks.dataset("acme/orders", "train", 16)))
    return path


@pytest.fixture
def make_config(base: Path, rows_file: Path, tmp_path: Path) -> ConfigMaker:
    """Make settings of a short run; keyword arguments replace whole sections."""

    def make(**sections: Any) -> TrainConfig:
        document: dict[str, Any] = {
            "base_model": str(base),
            "output": "adapter",
            "data": [{"path": rows_file.name, "type": "messages"}],
            "lora": {"r": 4, "alpha": 8},
            "train": {"max_steps": 4, "micro_batch": 4, "lr": 1e-2, "seq_len": 128},
        }
        return parse_config({**document, **sections}, folder=tmp_path)

    return make
