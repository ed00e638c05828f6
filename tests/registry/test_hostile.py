"""Hostile adapters are refused with a declared reason, quickly, in little memory, and touch nothing else."""

import random
from pathlib import Path

import pytest

from loraplex_registry.errors import SettingsError
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.lora_config import read_config
from tests.registry import builders, hostile


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory, base: BaseModel) -> None:
    hostile.warm_up(tmp_path_factory.mktemp("warm"), base)


@pytest.mark.parametrize("name", hostile.CASES)
def test_a_hostile_directory_is_refused(name: str, tmp_path: Path, base: BaseModel) -> None:
    directory = builders.make_adapter(tmp_path / "adapter")
    hostile.CASES[name](directory)
    before = hostile.reset_peak()
    assert hostile.judge(directory, base) != "accepted"
    assert hostile.peak_bytes() - before < hostile.GROWTH_MAX


def test_there_are_fifty_at_least() -> None:
    assert len(hostile.CASES) >= 50


def test_the_watch_sees_what_it_forbids(tmp_path: Path) -> None:
    watch = hostile.Watch.get()
    watch.broken.clear()
    with watch.only(tmp_path), open("/etc/hostname", "rb"):
        pass
    with watch.only(tmp_path), open(tmp_path / "new", "wb"):
        pass
    with watch.only(tmp_path):
        exec("1 + 1")
    assert [seen.split()[0] for seen in watch.broken] == ["open", "open", "compile", "exec"]
    watch.broken.clear()


def test_generated_headers_and_settings_raise_declared_errors_only(tmp_path: Path, base: BaseModel) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    found = hostile.generated_campaign(tmp_path, base, cases=3000, seed=seed)
    print(dict(found))
    assert found["growth"] < hostile.GROWTH_MAX
    assert found["UNSUPPORTED_ADAPTER"] > 1000
    assert found["accepted"] > 0, "mutants that stay right show that not everything is refused"


def test_an_engine_never_sees_a_publishers_bytes_or_words() -> None:
    rng = random.Random(1)
    for _ in range(300):
        body = hostile.mutated_config(rng)
        try:
            text = read_config(body, rank_max=8).to_json().decode()
        except hostile.DECLARED:
            continue
        assert "://" not in text
        assert "/" not in text
        assert read_config(text.encode(), rank_max=8).to_json().decode() == text


@pytest.mark.parametrize(
    "layers",
    [
        b"{" + b",".join(b'"m%07d":1' % number for number in range(1_000_000)) + b"}",
        b"{" + b",".join(b'"m%07d":[1,{}]' % number for number in range(190_000)) + b"}",
        b"[" * 500_000,
        b'{"a":' * 500_000,
        b"{" + b'"a":1,' * 1_000_000 + b'"b":1}',
        b"[" + b"1," * 3_000_000 + b"1]",
    ],
)
def test_a_base_card_that_unfolds_in_memory_is_refused_before(
    layers: bytes, tmp_path: Path, base: BaseModel
) -> None:
    card = base.to_json()
    begin = card.index(b'"layers":') + 9
    (tmp_path / "base_model.json").write_bytes(card[:begin] + layers + b"}")
    before = hostile.reset_peak()
    with pytest.raises(SettingsError):
        BaseModel.load(tmp_path)
    assert hostile.peak_bytes() - before < hostile.GROWTH_MAX


def test_a_pipe_among_a_bases_files_does_not_block(base_directory: Path, tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((base_directory / "config.json").read_bytes())
    with pytest.raises(SettingsError):
        BaseModel.from_directory(tmp_path)
