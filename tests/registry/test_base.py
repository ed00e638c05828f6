"""The base model's layer table, digest and card."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loraplex_registry.errors import SettingsError
from loraplex_registry.validation.base import BaseModel
from tests.registry import builders

modules = st.from_regex(r"[a-z0-9_]{1,6}(\.[a-z0-9_]{1,6}){0,3}", fullmatch=True)
bases = st.builds(
    BaseModel,
    name=st.text("abcXYZ-/. 019", min_size=1, max_size=20),
    digest=st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256:{}".format),
    layers=st.dictionaries(modules, st.tuples(st.integers(1, 9999), st.integers(1, 9999)), max_size=5),
    vocab_size=st.integers(1, 10**6),
    hidden_size=st.integers(1, 10**5),
    max_position=st.integers(0, 10**7),
)


@given(bases)
def test_a_base_card_reads_back_as_the_same_base(base: BaseModel) -> None:
    assert BaseModel.from_json(base.to_json()) == base


def test_the_layer_table_holds_every_matrix_as_in_and_out(base: BaseModel) -> None:
    assert base.layers["model.layers.1.self_attn.v_proj"] == (builders.HIDDEN, builders.HIDDEN // 2)
    assert base.layers["model.layers.0.mlp.up_proj"] == (builders.HIDDEN, builders.WIDE)
    assert "model.layers.0.input_layernorm" not in base.layers
    assert (base.vocab_size, base.hidden_size, base.max_position) == (builders.VOCAB, builders.HIDDEN, 128)


def test_a_tied_output_layer_appears_with_the_shape_of_the_embedding(base: BaseModel, tmp_path: Path) -> None:
    assert base.layers["lm_head"] == base.layers["model.embed_tokens"] == (builders.HIDDEN, builders.VOCAB)
    untied = BaseModel.from_directory(builders.make_base(tmp_path, tie_word_embeddings=False))
    assert "lm_head" not in untied.layers


def test_the_digest_follows_every_byte_of_the_checkpoint_and_not_its_place(
    base: BaseModel, tmp_path: Path
) -> None:
    copy = builders.make_base(tmp_path / "copy")
    assert BaseModel.from_directory(copy).digest == base.digest
    body = bytearray((copy / "model.safetensors").read_bytes())
    body[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(body))
    assert BaseModel.from_directory(copy).digest != base.digest


@pytest.mark.parametrize(
    ("method", "shape", "expected"),
    [("gptq", (32, 48), (256, 48)), ("awq", (32, 48), (32, 384))],
)
def test_packed_four_bit_layers_get_their_true_shape(
    method: str, shape: tuple[int, int], expected: tuple[int, int], tmp_path: Path
) -> None:
    builders.make_base(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    save_file(
        {"model.layers.0.mlp.up_proj.qweight": np.zeros(shape, np.int32)}, tmp_path / "packed.safetensors"
    )
    assert BaseModel.from_directory(tmp_path).layers["model.layers.0.mlp.up_proj"] in {expected}


def test_a_directory_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"config\.json"):
        BaseModel.from_directory(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"fmt": 2},
        {"fmt": True},
        {"extra": 1},
        {"digest": "sha256:x"},
        {"layers": {"../x": [1, 2]}},
        {"layers": {"a": [1]}},
    ],
)
def test_a_card_of_another_form_is_refused(change: dict[str, object], base: BaseModel) -> None:
    card = {**json.loads(base.to_json()), **change}
    with pytest.raises(SettingsError):
        BaseModel.from_json(json.dumps(card).encode())


def test_progress_of_hashing_ends_at_the_total(base_directory: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    BaseModel.from_directory(base_directory, progress=lambda *state: seen.append(state))
    assert seen[-1][0] == "hash base"
    assert seen[-1][1] == seen[-1][2] > 0
