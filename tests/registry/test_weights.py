"""Validation of adapter directories: what passes, what is refused and with which reason."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_registry.errors import BaseMismatchError, RankTooLargeError, UnsupportedAdapterError
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.lora_config import AdapterConfig, ModuleRules, read_config
from loraplex_registry.validation.weights import Limits, validate_adapter
from tests.registry import builders

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

# adapter_config.json as PEFT 0.21.2 writes it for LoraConfig(r=4, target_modules=["q_proj", "v_proj"]).
PEFT_CONFIG = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_plain_adapter_passes_and_its_facts_are_right(dtype: type, tmp_path: Path, base: BaseModel) -> None:
    directory = builders.make_adapter(tmp_path / "a", tensors=builders.adapter_tensors(dtype=dtype))
    facts = validate_adapter(directory, base, Limits())
    assert (facts.rank, facts.alpha, facts.n_tensors) == (4, 8.0, 8)
    assert facts.dtype == {np.float32: "F32", np.float16: "F16"}[dtype]
    assert facts.n_params == sum(tensor.size for tensor in builders.adapter_tensors().values())
    assert facts.size_bytes == (directory / WEIGHTS).stat().st_size
    assert [file.name for file in facts.files] == [CONFIG, WEIGHTS]


def test_a_configuration_as_peft_writes_it_passes(tmp_path: Path, base: BaseModel) -> None:
    facts = validate_adapter(builders.make_adapter(tmp_path / "a", config=PEFT_CONFIG), base, Limits())
    assert facts.target_modules == ("q_proj", "v_proj")


def test_the_configuration_given_to_an_engine_means_the_same_and_holds_nothing_else() -> None:
    config = builders.adapter_config(
        use_rslora=True, rank_pattern={"b.q_proj": 2, "a.q_proj": 3}, revision="main"
    )
    original = read_config(json.dumps(config).encode(), rank_max=8)
    again = read_config(original.to_json(), rank_max=8)
    assert again == original
    assert list(json.loads(original.to_json())["rank_pattern"]) == ["b.q_proj", "a.q_proj"]
    assert b"revision" not in original.to_json()
    assert b"/somewhere" not in original.to_json()


def test_a_rank_pattern_gives_its_modules_their_own_rank(tmp_path: Path, base: BaseModel) -> None:
    tensors = builders.adapter_tensors(rank=4)
    for half, axis in (("A", 0), ("B", 1)):
        name = f"{Q0}.lora_{half}.weight"
        tensors[name] = np.ascontiguousarray(np.take(tensors[name], [0, 1], axis=axis))
    config = builders.adapter_config(rank_pattern={"layers.0.self_attn.q_proj": 2})
    assert (
        validate_adapter(builders.make_adapter(tmp_path / "a", tensors=tensors, config=config), base).rank
        == 4
    )
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UnsupportedAdapterError, match="says rank 4"):
        validate_adapter(builders.make_adapter(tmp_path / "a", tensors=tensors), base)


def test_an_embedding_adapter_passes_with_the_right_shapes(tmp_path: Path, base: BaseModel) -> None:
    tensors = builders.adapter_tensors()
    name = "base_model.model.model.embed_tokens"
    tensors[f"{name}.lora_embedding_A"] = np.ones((4, builders.VOCAB), np.float32)
    tensors[f"{name}.lora_embedding_B"] = np.ones((builders.HIDDEN, 4), np.float32)
    config = builders.adapter_config(target_modules=["q_proj", "v_proj", "embed_tokens"])
    validate_adapter(builders.make_adapter(tmp_path / "a", tensors=tensors, config=config), base)
    tensors[f"{name}.lora_embedding_A"] = np.ones((4, builders.VOCAB + 1), np.float32)
    with pytest.raises(BaseMismatchError):
        validate_adapter(builders.make_adapter(tmp_path / "b", tensors=tensors, config=config), base)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin",
        "weights.pt",
        "x.pkl",
        "optimizer.PTH",
        "run.py",
        "tokenizer.json",
        "lib.so",
        "license",
        ".hidden",
    ],
)
def test_a_file_that_does_not_belong_is_refused_by_name(name: str, adapter: Path, base: BaseModel) -> None:
    (adapter / name).write_bytes(b"x")
    with pytest.raises(UnsupportedAdapterError, match=name.replace(".", r"\.")):
        validate_adapter(adapter, base)


def test_a_directory_with_pickled_weights_alone_is_refused(adapter: Path, base: BaseModel) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapterError, match="pickled"):
        validate_adapter(adapter, base)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_directories_and_pipes_are_refused(
    name: str, adapter: Path, base: BaseModel, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (adapter / name).rename(elsewhere)
    for replace in (
        lambda path: path.symlink_to(elsewhere),
        lambda path: os.link(elsewhere, path),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
    ):
        replace(adapter / name)
        with pytest.raises(UnsupportedAdapterError):
            validate_adapter(adapter, base)
        (adapter / name).rmdir() if (adapter / name).is_dir() else (adapter / name).unlink()
    with pytest.raises(UnsupportedAdapterError, match=name.replace(".", r"\.")):
        validate_adapter(adapter, base)


@pytest.mark.parametrize("cut", [1, 100, 2000, -8, -4])
def test_truncated_weights_are_refused(cut: int, adapter: Path, base: BaseModel) -> None:
    body = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(body[:-cut])
    with pytest.raises(UnsupportedAdapterError):
        validate_adapter(adapter, base)


def test_bytes_after_the_last_tensor_are_refused(adapter: Path, base: BaseModel) -> None:
    with (adapter / WEIGHTS).open("ab") as file:
        file.write(b"PK\x03\x04")
    with pytest.raises(UnsupportedAdapterError, match="too long"):
        validate_adapter(adapter, base)


def test_a_rank_above_the_limit_is_refused(adapter: Path, base: BaseModel) -> None:
    with pytest.raises(RankTooLargeError) as caught:
        validate_adapter(adapter, base, Limits(max_rank=3))
    assert caught.value.code == "RANK_TOO_LARGE"


def test_a_rank_hidden_from_the_configuration_is_refused(tmp_path: Path, base: BaseModel) -> None:
    directory = builders.make_adapter(
        tmp_path / "a", tensors=builders.adapter_tensors(rank=8), config=builders.adapter_config(rank=4)
    )
    with pytest.raises(UnsupportedAdapterError):
        validate_adapter(directory, base)
    with pytest.raises(RankTooLargeError):
        validate_adapter(directory, base, Limits(max_rank=4))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{Q0}.lora_A.weight", (4, builders.HIDDEN + 1)),
        (f"{Q0}.lora_B.weight", (builders.HIDDEN + 8, 4)),
    ],
)
def test_shapes_that_do_not_fit_the_base_are_refused(
    name: str, shape: tuple[int, int], tmp_path: Path, base: BaseModel
) -> None:
    tensors = {**builders.adapter_tensors(), name: np.ones(shape, np.float32)}
    with pytest.raises(BaseMismatchError) as caught:
        validate_adapter(builders.make_adapter(tmp_path / "a", tensors=tensors), base)
    assert caught.value.code == "BASE_MISMATCH"


def test_a_layer_the_base_does_not_have_is_refused(tmp_path: Path, base: BaseModel) -> None:
    tensors = {
        name.replace("layers.1", "layers.7"): value for name, value in builders.adapter_tensors().items()
    }
    with pytest.raises(BaseMismatchError, match=r"layers\.7"):
        validate_adapter(builders.make_adapter(tmp_path / "a", tensors=tensors), base)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"{Q0}.lora_B.weight", f"{Q0}.lora_C.weight"),
        (f"{Q0}.lora_B.weight", f"{Q0}.lora_B.default.weight"),
        (f"{Q0}.lora_B.weight", "../../x"),
        (f"{Q0}.lora_B.weight", f"{Q0}.base_layer.weight"),
        (f"{Q0}.lora_B.weight", "model.layers.0.self_attn.q_proj.lora_A.weight"),
        (f"{Q0}.lora_B.weight", f"{Q0}.lora_embedding_B"),
    ],
)
def test_tensors_that_are_not_whole_pairs_are_refused(
    old: str, new: str, tmp_path: Path, base: BaseModel
) -> None:
    tensors = builders.adapter_tensors()
    tensors[new] = tensors.pop(old)
    with pytest.raises(UnsupportedAdapterError):
        validate_adapter(builders.make_adapter(tmp_path / "a", tensors=tensors), base)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8])
def test_weights_of_another_dtype_are_refused(dtype: type, tmp_path: Path, base: BaseModel) -> None:
    directory = builders.make_adapter(tmp_path / "a", tensors=builders.adapter_tensors(dtype=dtype))
    with pytest.raises(UnsupportedAdapterError, match="F16, BF16 or F32"):
        validate_adapter(directory, base)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_not_finite_are_refused(
    value: float, dtype: type, tmp_path: Path, base: BaseModel
) -> None:
    tensors = builders.adapter_tensors(dtype=dtype)
    tensors[f"{Q0}.lora_B.weight"][-1, -1] = value
    with pytest.raises(UnsupportedAdapterError, match="NaN or infinity"):
        validate_adapter(builders.make_adapter(tmp_path / "a", tensors=tensors), base)


def test_the_largest_finite_weights_pass(tmp_path: Path, base: BaseModel) -> None:
    tensors = builders.adapter_tensors(dtype=np.float16)
    tensors[f"{Q0}.lora_B.weight"][0, 0] = np.finfo(np.float16).max
    validate_adapter(builders.make_adapter(tmp_path / "a", tensors=tensors), base)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping"),
        ({"target_modules": ".*"}, "target_modules"),
        ({"target_modules": ["(a+)+$"]}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"rank_pattern": {"(a|b)*": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 0}, "r "),
        ({"r": True}, "r "),
        ({"r": "4"}, "r "),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": 1e5}, "lora_alpha"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"auto_map": {}}, "auto_map.*run code"),
        ({"custom_pipelines": {}}, "custom_pipelines.*run code"),
        ({"parent_library": "os"}, "parent_library"),
        ({"megatron_core": "os"}, "megatron_core.*import code"),
        ({"eva_config": {"url": "https://x"}}, "eva_config"),
        ({"exclude_modules": "/etc/passwd"}, "exclude_modules"),
        ({"exclude_modules": [["../x"]]}, "exclude_modules"),
        ({"layers_pattern": [[[[[["x"]]]]]]}, "layers_pattern"),
        ({"layers_to_transform": list(range(5000))}, "layers_to_transform"),
        ({"revision": "https://x"}, "revision"),
        ({"peft_version": "0.21 <script>"}, "peft_version"),
        ({"lora_dropout": -1}, "lora_dropout"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"r": 1 << 31}, "r "),
        (
            {
                "rank_pattern": {f"m{i}": 4 for i in range(200)},
                "alpha_pattern": {f"m{i}": 4 for i in range(57)},
            },
            "257",
        ),
        ({"lora_alfa": 1}, "lora_alpha"),
    ],
)
def test_a_setting_beyond_plain_lora_is_refused_by_name(
    change: dict[str, object], word: str, adapter: Path, base: BaseModel
) -> None:
    (adapter / CONFIG).write_text(json.dumps(builders.adapter_config(**change)))
    with pytest.raises(UnsupportedAdapterError, match=word):
        validate_adapter(adapter, base)


def test_many_rank_patterns_over_many_modules_cost_little(tmp_path: Path) -> None:
    config = read_config(
        json.dumps(builders.adapter_config(rank_pattern={f"x.y{i}.z": 4 for i in range(256)})).encode(),
        rank_max=8,
    )
    rules = ModuleRules(config)
    assert {rules.rank_of(f"model.layers.{i}.self_attn.q_proj") for i in range(4000)} == {4}
    assert rules.targets("a.b.q_proj")
    assert not rules.targets("a.b.xq_proj")


@given(
    patterns=st.lists(
        st.tuples(st.from_regex(r"[ab](\.[ab]){0,2}", fullmatch=True), st.integers(1, 8)), max_size=6
    ),
    module=st.from_regex(r"[abx](\.?[abx]){0,4}", fullmatch=True),
)
def test_the_rank_of_a_module_is_the_one_peft_and_vllm_find(
    patterns: list[tuple[str, int]], module: str
) -> None:
    """Law of `rank_of`: `re.match(rf"(.*\\.)?({key})$", name)`, first match wins (peft.utils.other.get_pattern_key)."""
    pattern = dict(patterns)
    config = AdapterConfig(3, 8.0, False, ("a",), rank_pattern=tuple(pattern.items()))
    theirs = next((rank for key, rank in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), 3)
    assert config.rank_of(module) == theirs


@pytest.mark.parametrize("missing", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_configuration_without_a_needed_key_is_refused(
    missing: str, adapter: Path, base: BaseModel
) -> None:
    config = builders.adapter_config()
    del config[missing]
    (adapter / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UnsupportedAdapterError, match=missing):
        validate_adapter(adapter, base)


def test_duplicate_keys_in_the_configuration_are_refused(adapter: Path, base: BaseModel) -> None:
    text = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(text[:-1] + ', "r": 4}')
    with pytest.raises(UnsupportedAdapterError, match="twice"):
        validate_adapter(adapter, base)


@pytest.mark.parametrize(
    "limits",
    [Limits(max_bytes=100), Limits(max_tensors=7), Limits(max_header_bytes=64)],
)
def test_every_size_has_a_limit(limits: Limits, adapter: Path, base: BaseModel) -> None:
    with pytest.raises(UnsupportedAdapterError):
        validate_adapter(adapter, base, limits)


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + data)
    return path


def entry(begin: int, end: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
SIZE = 4 * builders.HIDDEN * 4


@pytest.mark.parametrize(
    "header",
    [
        {A: entry(0, SIZE, [4, 16]), B: entry(0, SIZE, [16, 4])},
        {A: entry(0, SIZE, [4, 16]), B: entry(SIZE + 4, 2 * SIZE + 4, [16, 4])},
        {A: entry(0, SIZE, [4, 16]), B: entry(SIZE, 2 * SIZE - 4, [16, 4])},
        {A: entry(0, 0, [0, 16]), B: entry(0, 0, [16, 0])},
        {A: entry(0, SIZE, [1 << 40, 1 << 40]), B: entry(SIZE, 2 * SIZE, [16, 4])},
        {A: entry(-4, SIZE, [4, 16])},
        {A: {"dtype": "F32", "shape": [4, 16]}},
        {A: entry(0, SIZE, [4, 16]) | {"extra": 1}},
        {"__metadata__": {"a": 1}},
        {"__metadata__": {"a": "x" * 20_000}},
        [],
        b"{" + b" " * 50,
        b'{"a":' * 3000,
        b"[" * 50_000,
        b"\x00" * 16,
    ],
)
def test_hostile_headers_are_refused(header: object, adapter: Path, base: BaseModel) -> None:
    header_file(adapter / WEIGHTS, header, bytes(2 * SIZE))
    with pytest.raises(UnsupportedAdapterError):
        validate_adapter(adapter, base)


def test_duplicate_tensor_names_in_the_header_are_refused(adapter: Path, base: BaseModel) -> None:
    one = json.dumps({A: entry(0, SIZE, [4, 16])})[1:-1]
    header_file(adapter / WEIGHTS, f"{{{one},{one}}}".encode(), bytes(SIZE))
    with pytest.raises(UnsupportedAdapterError, match="twice"):
        validate_adapter(adapter, base)


@settings(max_examples=200, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 1400), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.none() | st.integers(0, 2**63),
)
def test_mutated_headers_raise_declared_errors_only(
    edits: list[tuple[int, int]],
    length: int | None,
    tmp_path_factory: pytest.TempPathFactory,
    base: BaseModel,
) -> None:
    adapter = builders.make_adapter(tmp_path_factory.getbasetemp() / "mutated")
    body = bytearray((adapter / WEIGHTS).read_bytes())
    for position, value in edits:
        body[position % len(body)] = value
    if length is not None:
        body[:8] = length.to_bytes(8, "little")
    (adapter / WEIGHTS).write_bytes(bytes(body))
    with contextlib.suppress(UnsupportedAdapterError, BaseMismatchError, RankTooLargeError):
        validate_adapter(adapter, base)
