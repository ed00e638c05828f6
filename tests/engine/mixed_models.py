"""A tiny random Llama and four LoRA adapters of different ranks, made with transformers and PEFT.

Random weights, strong enough that each adapter changes the greedy tokens; fp32, so that no two tokens tie.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# name -> (rank, modules): all linear layers; two of three packed projections; and, in the last slot, every
# kind of module that vLLM wraps, embeddings and logits included.
ADAPTERS: dict[str, tuple[int, list[str]]] = {
    "one": (1, ATTENTION + MLP),
    "four": (4, ["q_proj", "v_proj"]),
    "eight": (8, ATTENTION + MLP),
    "sixteen": (16, [*ATTENTION, *MLP, "embed_tokens", "lm_head"]),
}


def make_base(directory: Path, seed: int) -> Path:
    """Write a random Llama (hidden 256, 4 layers, 8 heads over 4) and return its directory."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory / "base")
    return directory / "base"


def make_adapters(base: Path, directory: Path, seed: int) -> dict[str, Path]:
    """Write the `ADAPTERS` in PEFT's format and return their directories."""
    paths = {}
    for number, (name, (rank, modules)) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed + number)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=modules,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.06 if "embed" not in key else 0.02)
        model.save_pretrained(directory / name, save_embedding_layers=False)
        paths[name] = directory / name
    return paths
