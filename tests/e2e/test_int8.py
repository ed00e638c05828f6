"""The base in int8: made once from the same files, served under the same digest, adapters on top."""

import json
from pathlib import Path

import pytest

from loraplex_client import Client
from loraplex_server.vllm_plugin.cpu.build import CACHE_ENV, cache_directory
from tests.e2e.conftest import PROMPT, SIXTEEN, Stage, serving, write_settings

pytestmark = pytest.mark.engine


def test_an_int8_base_serves_adapters_made_for_the_same_base(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_ENV, str(cache_directory()))  # compiled already
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stage.toxics.heal()
    stage.publish("acme/on-int8", seed=600)
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "policy.toml").write_text((stage.root / "policy.toml").read_text())
    for tenant in ("acme", "globex"):
        (folder / f"{tenant}.pub").write_text((stage.root / f"{tenant}.pub").read_text())
    settings = write_settings(stage, folder / "server.toml", model__quantization='"int8"')
    with serving(settings) as served, Client(f"127.0.0.1:{served.grpc_port}", timeout_s=60) as client:
        base = client.generate(PROMPT, sampling=SIXTEEN)
        adapted = client.generate(PROMPT, adapter="acme/on-int8", sampling=SIXTEEN)
    assert base.header.base_digest == adapted.header.base_digest == stage.base.digest
    assert base.token_ids != adapted.token_ids
    copies = list((tmp_path / "cache/loraplex/int8").iterdir())
    assert [copy.name for copy in copies] == [stage.base.digest.replace(":", "-")]
    settings_of_copy = json.loads((copies[0] / "config.json").read_text())
    assert settings_of_copy["quantization_config"]["load_in_8bit"] is True
