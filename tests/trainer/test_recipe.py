"""One training run: it learns, it leaves the base alone, and it writes what the registry takes."""

import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import Limits, validate_adapter
from loraplex_trainer.config import TrainConfig
from loraplex_trainer.data import collate, load_examples
from loraplex_trainer.errors import ConfigError, DataError, DivergedError
from loraplex_trainer.methods import build_model, load_tokenizer, model_directory
from loraplex_trainer.recipe import Step, accumulate, fit, learning_rate, total_steps, train
from tests.trainer.builders import ConfigMaker

FILES = {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}
MODULES = {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def prepared(config: TrainConfig) -> tuple[Any, list[Any]]:
    directory = model_directory(config.base_model)
    torch.manual_seed(0)
    return build_model(config, directory), load_examples(config.data, load_tokenizer(directory), seq_len=128)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_short_run_lowers_the_loss_and_leaves_the_base_as_it_was(
    method: str, make_config: ConfigMaker, base: Path
) -> None:
    before = digests(base)
    seen: list[Step] = []
    train_settings = {"max_steps": 10, "micro_batch": 4, "lr": 2e-2, "seq_len": 128}
    result = train(make_config(method=method, train=train_settings), seen.append)
    assert [step.step for step in seen] == list(range(1, 11))
    assert seen[-1].loss < seen[0].loss - 0.3
    assert result.steps == 10
    assert digests(base) == before


def test_an_adapter_is_three_files_without_embeddings(make_config: ConfigMaker, base: Path) -> None:
    result = train(make_config())
    assert {path.name for path in result.adapter_dir.iterdir()} == FILES
    tensors = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(MODULES)  # A and B, two layers
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not [name for name in tensors if "embed" in name or "lm_head" in name]
    assert result.trainable_parameters == sum(tensor.numel() for tensor in tensors.values())
    settings = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert {name.rpartition(".")[2] for name in settings["target_modules"]} == MODULES
    assert settings["base_model_name_or_path"] == base.name
    assert str(base.parent) not in (result.adapter_dir / "adapter_config.json").read_text()


def test_the_registry_takes_the_adapter_and_knows_its_base(make_config: ConfigMaker, base: Path) -> None:
    result = train(make_config())
    card = BaseModel.from_json((result.adapter_dir / "base_model.json").read_bytes())
    assert card.digest == BaseModel.from_directory(base).digest == result.base.digest
    facts = validate_adapter(result.adapter_dir, card, Limits())
    assert facts.rank == 4


def test_the_same_settings_give_the_same_bytes(make_config: ConfigMaker) -> None:
    first = train(make_config(output="first"))
    second = train(make_config(output="second"))
    assert digests(first.adapter_dir) == digests(second.adapter_dir)


def test_another_seed_gives_another_adapter(make_config: ConfigMaker) -> None:
    settings = {"max_steps": 1, "seq_len": 128}
    first = train(make_config(output="first", train={**settings, "seed": 1}))
    second = train(make_config(output="second", train={**settings, "seed": 2}))
    assert digests(first.adapter_dir) != digests(second.adapter_dir)


def test_weights_can_be_kept_in_fp32(make_config: ConfigMaker) -> None:
    result = train(make_config(train={"max_steps": 1, "seq_len": 128, "save_dtype": "fp32"}))
    tensors = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_targets_can_be_chosen(make_config: ConfigMaker) -> None:
    result = train(make_config(lora={"r": 2, "target": ["q_proj", "v_proj"]}))
    settings = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "v_proj"]


def test_a_target_the_base_does_not_have_is_refused(make_config: ConfigMaker) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target"):
        train(make_config(lora={"target": ["query"]}))


def test_evaluation_comes_when_asked_and_at_the_end(make_config: ConfigMaker, rows_file: Path) -> None:
    seen: list[Step] = []
    held_out = {"data": [{"path": rows_file.name}], "every": 3}
    result = train(make_config(eval=held_out), seen.append)
    assert [step.step for step in seen if step.eval_loss is not None] == [3, 4]
    assert result.eval_loss == seen[-1].eval_loss
    assert result.eval_loss is not None
    assert 0 < result.eval_loss < 20


def test_micro_batches_add_up_to_one_big_batch(make_config: ConfigMaker) -> None:
    model, examples = prepared(make_config(train={"dtype": "fp32", "seq_len": 128}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    # Uneven on purpose: averaging the means of micro batches would weigh short answers too much.
    parts = [examples[:1], examples[1:4], examples[4:8]]
    found = []
    for micro in ([examples[:8]], parts):
        loss = accumulate(model, [collate(rows, pad_id=0) for rows in micro])
        found.append((loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    (whole_loss, whole), (parts_loss, split) = found
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(whole, split, strict=True)) <= 1e-5
    assert max(float(a.abs().max()) for a in whole) > 1e-3


def test_only_the_adapter_can_be_trained_and_it_is_in_fp32(make_config: ConfigMaker) -> None:
    for method in ("lora", "qlora"):
        model, _ = prepared(make_config(method=method))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())


def poison(model: Any, *, gradient_only: bool) -> None:
    if gradient_only:
        adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adapter[-1].register_hook(lambda grad: grad * math.nan)
    else:
        model.get_input_embeddings().weight.data[:] = math.nan


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_diverging_run_stops_with_advice_and_an_untouched_adapter(
    gradient_only: bool, make_config: ConfigMaker
) -> None:
    config = make_config()
    model, examples = prepared(config)
    poison(model, gradient_only=gradient_only)
    before = [parameter.clone() for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(DivergedError, match=r"step 1 of 4: lower train\.lr"):
        list(fit(model, examples, [], config, pad_id=0))
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_used_output_directory_is_refused_before_anything_is_loaded(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "keep.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        train(make_config(base_model="/nowhere"))
    assert (tmp_path / "adapter" / "keep.txt").read_text() == "mine"


def test_bad_data_stops_a_run_before_the_first_step(make_config: ConfigMaker, rows_file: Path) -> None:
    rows_file.write_text(rows_file.read_text() + "{}\n")
    seen: list[Step] = []
    with pytest.raises(DataError, match=":17"):
        train(make_config(), seen.append)
    assert not seen


def test_a_base_that_is_nowhere_is_named(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"nobody/nothing"):
        train(make_config(base_model="nobody/nothing"))


@given(steps=st.integers(1, 500), warmup=st.floats(0, 1), highest=st.floats(1e-6, 1))
def test_the_learning_rate_rises_once_and_then_only_falls(steps: int, warmup: float, highest: float) -> None:
    rates = [learning_rate(n, steps=steps, highest=highest, warmup=warmup) for n in range(1, steps + 1)]
    top = rates.index(max(rates))
    assert all(0 < rate <= highest * (1 + 1e-9) for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))


@given(
    rows=st.integers(1, 1000),
    micro=st.integers(1, 64),
    accum=st.integers(1, 16),
    epochs=st.integers(1, 5),
)
def test_epochs_see_all_rows_and_hardly_more(rows: int, micro: int, accum: int, epochs: int) -> None:
    config = TrainConfig(base_model="b", output="o", data=())
    settings = replace(config.train, micro_batch=micro, grad_accum=accum, epochs=float(epochs))
    steps = total_steps(replace(config, train=settings), rows=rows)
    micro_batches = epochs * math.ceil(rows / micro)
    assert micro_batches <= steps * accum < micro_batches + accum
