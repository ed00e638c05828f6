"""Base models and adapters of random weights, in the shapes the benchmarks are about.

Speed does not depend on the values, so nothing is downloaded: a model is its configuration and random bf16
weights. Written once per directory and reused.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

INIT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen2 architecture: grouped-query attention, gated MLP, tied embeddings."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return module -> (in_features, out_features) for one layer."""
        kv = self.kv_heads * self.head
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.hidden, self.mlp),
            "mlp.up_proj": (self.hidden, self.mlp),
            "mlp.down_proj": (self.mlp, self.hidden),
        }


SHAPES = {
    "0.5b": Shape("0.5b", hidden=896, layers=24, heads=14, kv_heads=2, mlp=4864, vocabulary=151_936),
    "tiny": Shape("tiny", hidden=256, layers=4, heads=8, kv_heads=4, mlp=688, vocabulary=640),
}


def ensure_base(shape: Shape, directory: Path) -> Path:
    """Write the model under `directory` unless it is there, and return its directory."""
    target = directory / f"base-{shape.name}"
    return target if target.is_dir() else _complete(target, lambda path: _write_base(shape, path))


def ensure_adapters(
    shape: Shape, directory: Path, *, count: int, rank: int, modules: Sequence[str] = ()
) -> list[Path]:
    """Write `count` adapters of `rank`, bf16, and return their directories.

    Args:
        shape: of the base model.
        directory: where they are kept.
        count: adapter number n has the seed n + 1, whatever it touches.
        rank: of every module.
        modules: last parts of the linear modules' names, such as "q_proj"; empty means all of them.

    """
    kind = f"r{rank}" + "".join(f"-{module}" for module in modules)
    targets = [directory / f"adapter-{shape.name}-{kind}-{number}" for number in range(count)]
    for number, target in enumerate(targets):
        if not target.is_dir():
            write = functools.partial(_write_adapter, shape, modules=modules, rank=rank, seed=number)
            _complete(target, write)
    return targets


def linked_copies(adapters: Sequence[Path], directory: Path, count: int) -> list[Path]:
    """Make `count` directories of hard links to the files of `adapters`, in turn, and return them."""
    copies = [directory / f"copy-{number}" for number in range(count)]
    for number, copy in enumerate(copies):
        copy.mkdir()
        for path in adapters[number % len(adapters)].iterdir():
            (copy / path.name).hardlink_to(path)
    return copies


def size_bytes(paths: Sequence[Path]) -> int:
    """Return the size of the adapters' weight files together."""
    return sum((path / "adapter_model.safetensors").stat().st_size for path in paths)


def _complete(target: Path, write: Callable[[Path], object]) -> Path:
    """Write into a directory beside the target and rename it, so that a half-written one is never used."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(target)
    return target


def _write_base(shape: Shape, path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(_base_tensors(shape, generator)), path / "model.safetensors", metadata={"format": "pt"})


def _base_tensors(shape: Shape, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    def random(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(std=INIT_STD, generator=generator)

    def ones() -> torch.Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    yield "model.embed_tokens.weight", random(shape.vocabulary, shape.hidden)
    yield "model.norm.weight", ones()
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", ones()
        yield f"{prefix}.post_attention_layernorm.weight", ones()
        for module, (width, out) in shape.linears().items():
            yield f"{prefix}.{module}.weight", random(out, width)
            if module.endswith(("q_proj", "k_proj", "v_proj")):
                yield f"{prefix}.{module}.bias", random(out)


def _write_adapter(shape: Shape, path: Path, modules: Sequence[str], *, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    linears = {
        module: size
        for module, size in shape.linears().items()
        if not modules or module.rpartition(".")[2] in modules
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(module.rpartition(".")[2] for module in linears),
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(shape.layers):
        for module, (width, out) in linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            for kind, size in (("lora_A", (rank, width)), ("lora_B", (out, rank))):
                weight = torch.empty(size, dtype=torch.bfloat16).normal_(std=INIT_STD, generator=generator)
                tensors[f"{prefix}.{kind}.weight"] = weight
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
