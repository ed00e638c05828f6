"""Builders of small real adapters, bases, keys and policies for the registry's tests."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from loraplex_registry.signing import Signer, generate_key, load_signer
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.base import BaseModel

HIDDEN, WIDE, VOCAB, LAYERS = 16, 24, 40, 2
MODULES = ("q_proj", "v_proj")


def base_tensors() -> dict[str, np.ndarray]:
    """A tiny Llama-shaped checkpoint."""
    tensors = {"model.embed_tokens.weight": np.zeros((VOCAB, HIDDEN), np.float16)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = np.zeros((HIDDEN, HIDDEN), np.float16)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = np.zeros((HIDDEN // 2, HIDDEN), np.float16)
        tensors[f"{prefix}.mlp.up_proj.weight"] = np.zeros((WIDE, HIDDEN), np.float16)
        tensors[f"{prefix}.input_layernorm.weight"] = np.zeros((HIDDEN,), np.float16)
    return tensors


def make_base(directory: Path, **config: object) -> Path:
    """Write a base checkpoint directory and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        **config,
    }
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(base_tensors(), directory / "model.safetensors")
    return directory


def adapter_tensors(*, rank: int = 4, seed: int = 0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """LoRA weights for q_proj and v_proj of every layer of the tiny base."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, width in (("q_proj", HIDDEN), ("v_proj", HIDDEN // 2)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, HIDDEN)).astype(dtype)
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((width, rank)).astype(dtype)
    return tensors


def adapter_config(*, rank: int = 4, **changes: object) -> dict[str, object]:
    """The settings PEFT would write, the ones that matter."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(MODULES),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "/somewhere/base",
        "lora_dropout": 0.05,
        "inference_mode": True,
        **changes,
    }


def make_adapter(
    directory: Path,
    *,
    rank: int = 4,
    seed: int = 0,
    tensors: dict[str, np.ndarray] | None = None,
    config: dict[str, object] | None = None,
) -> Path:
    """Write an adapter directory and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors or adapter_tensors(rank=rank, seed=seed), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config or adapter_config(rank=rank)))
    return directory


def make_signer(directory: Path, name: str, *, algorithm: str = "ecdsa-p256") -> Signer:
    """Make a key pair `name.key`, `name.pub` and return its signer."""
    generate_key(directory / f"{name}.key", algorithm=algorithm)
    return load_signer(directory / f"{name}.key")


def make_policy(directory: Path, text: str) -> TrustPolicy:
    """Write `policy.toml` beside the keys and load it."""
    path = directory / "policy.toml"
    path.write_text(text)
    return TrustPolicy.load(path)


def acme_policy(directory: Path, *, key: str = "acme", tenant: str = "acme", extra: str = "") -> TrustPolicy:
    """A policy of one rule: everything of one tenant, signed by one key."""
    return make_policy(
        directory,
        f"""
version = 1
default = "deny"
[[rules]]
scope = "{tenant}/**"
keys = [{{ path = "{key}.pub" }}]
{extra}
""",
    )


def load_base(directory: Path) -> BaseModel:
    """Make and read the tiny base."""
    return BaseModel.from_directory(make_base(directory))
