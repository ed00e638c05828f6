"""The base anyone can make: kept by digest, loadable by everybody, and trained by the real loop."""

import random
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_examples import tasks, tiny_base
from loraplex_examples.tiny_base import Recipe, ensure_tiny_base
from tests.trainer.builders import SMALL


def test_a_finished_base_is_used_again(base: Path, base_cache: Path) -> None:
    def progress(*_: Any) -> None:
        pytest.fail("trained again")

    assert ensure_tiny_base(base_cache, progress, recipe=SMALL) == base


def test_a_damaged_base_is_made_again(tmp_path: Path) -> None:
    recipe = replace(SMALL, steps=1)
    directory = ensure_tiny_base(tmp_path, recipe=recipe)
    weights = directory / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    seen: list[int] = []
    assert ensure_tiny_base(tmp_path, lambda step, total, loss: seen.append(step), recipe=recipe) == directory
    assert seen == [1]
    assert weights.read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def stop(step: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_tiny_base(tmp_path, stop, recipe=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [item.name for item in fields(Recipe)])
def test_every_choice_of_the_recipe_changes_the_digest(name: str) -> None:
    recipe = Recipe()
    assert replace(recipe, **{name: getattr(recipe, name) * 2}).digest() != recipe.digest()


def test_the_base_is_small_and_loads_like_any_other(base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert model.config.vocab_size >= len(tokenizer)
    turns = [{"role": "user", "content": "Copy: red lamps"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>Copy: red lamps</s><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= ids.shape[1] + 2


def test_the_demo_base_fits_its_promises() -> None:
    recipe = Recipe()
    assert recipe.hidden_size % 64 == recipe.ffn_size % 64 == 0  # NF4 blocks of 64 never straddle two rows
    assert recipe.hidden_size // recipe.heads in (32, 64)  # head sizes of vLLM's CPU attention
    parameters = recipe.vocab_size * recipe.hidden_size
    parameters += recipe.layers * recipe.hidden_size * (4 * recipe.hidden_size + 3 * recipe.ffn_size)
    assert parameters <= 12_000_000


def test_every_word_of_the_tasks_is_one_token(tokenizer: Any) -> None:
    for word in tasks.vocabulary():
        if word.isalpha():
            assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word


def test_digits_are_single_tokens_and_text_survives(tokenizer: Any) -> None:
    ids = tokenizer("48215", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(token) for token in ids] == list("48215")
    text = "Ünïcode, 漢字 and\ttabs 99!"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_base_never_sees_a_tenant_answer() -> None:
    rng = random.Random(0)
    pairs = [tiny_base._pair(rng) for _ in range(5000)]
    acme = re.compile(r"REF \d+ \| SKU")
    globex = re.compile(r"(home|tech|wear) P\d \| \w+ \| \d+")
    assert not [pair for pair in pairs if acme.search(" ".join(pair)) or globex.search(" ".join(pair))]


def test_the_base_is_never_given_a_bare_message() -> None:
    # That is what the tenants send: what to do with it is in their adapters alone.
    rng = random.Random(0)
    prompts = [tiny_base._pair(rng)[0] for _ in range(5000)]
    instruction = re.compile(r"^(Copy: |First word: |Last word: |Tell )| Tell [a-z ]+\.$")
    assert not [prompt for prompt in prompts if not instruction.search(prompt)]
