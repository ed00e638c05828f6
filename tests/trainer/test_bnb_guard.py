"""bitsandbytes 0.50 loses gradients after an evaluation on CPUs with AVX512-BF16; the guard keeps them."""

from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from loraplex_trainer.config import TrainConfig
from loraplex_trainer.data import collate, load_examples
from loraplex_trainer.methods import build_model, keep_gradients_on_cpu, load_tokenizer, model_directory
from loraplex_trainer.recipe import accumulate, evaluate
from tests.trainer.builders import ConfigMaker

PAD = 0


def gradients(config: TrainConfig, *, guarded: bool, after_eval: bool) -> dict[str, torch.Tensor]:
    """Gradient of every adapter weight in one fresh model, the same one each time."""
    directory = model_directory(config.base_model)
    examples = load_examples(config.data, load_tokenizer(directory), seq_len=128)[:4]
    torch.manual_seed(0)
    model: Any = build_model(config, directory)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # a fresh B is zero and would hide A's gradient
            torch.nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if not guarded and isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = has_avx512bf16()  # as bitsandbytes sets it
    model.train()
    if after_eval:
        evaluate(model, examples, rows=4, pad_id=PAD)
    accumulate(model, [collate(examples, pad_id=PAD)])
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def largest_relative_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


@pytest.fixture
def config(make_config: ConfigMaker) -> TrainConfig:
    return make_config(method="qlora")


def test_gradients_after_an_evaluation_are_those_without(config: TrainConfig) -> None:
    before = gradients(config, guarded=True, after_eval=False)
    after = gradients(config, guarded=True, after_eval=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_the_guard_an_evaluation_breaks_gradients(config: TrainConfig) -> None:
    if not has_avx512bf16():
        pytest.skip("the fault needs a CPU with AVX512-BF16")
    before = gradients(config, guarded=False, after_eval=False)
    after = gradients(config, guarded=False, after_eval=True)
    first_layer = {name: grad for name, grad in before.items() if ".layers.0.self_attn.q_proj." in name}
    assert first_layer
    assert largest_relative_error(after, first_layer) > 0.1


def test_every_quantized_layer_is_guarded(config: TrainConfig) -> None:
    model = build_model(config, model_directory(config.base_model))
    linears = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert keep_gradients_on_cpu(model) == len(linears) == 2 * 7
    assert not any(module.support_avx512bf16_for_cpu for module in linears)
