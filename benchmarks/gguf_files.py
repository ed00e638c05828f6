"""Base models and adapters of `benchmarks.models` as GGUF files, for llama.cpp.

    PYTHONPATH=.llamacpp/gguf-py python -m benchmarks.gguf_files BASE BASE.gguf ADAPTER ADAPTER.gguf ...

llama.cpp's own converter wants a real tokenizer, which models of random weights do not have; its writer, the
package `gguf` of the same sources, is all that is needed. The vocabulary is made up: prompts are token ids.
The base's weights stay bf16 (norms and biases, which llama.cpp takes in fp32 alone, are widened), to be quantized by
llama.cpp; adapters become fp16, in which it computes 1.6 times as fast as in bf16.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

BYTES = 256
# Hugging Face's name of a layer's module -> GGUF's, for the Qwen2 architecture
MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHERS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
PARTS = {".lora_A.weight": ".weight.lora_a", ".lora_B.weight": ".weight.lora_b"}


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor of the base or, with PEFT's prefix, of an adapter.

    Raises:
        ValueError: a tensor that models of this architecture do not have.

    """
    plain = name.removeprefix("base_model.model.")
    if plain in OTHERS:
        return OTHERS[plain]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(\.lora_[AB]\.weight|\.weight|\.bias)", plain)
    if found is None or found[2] not in MODULES:
        raise ValueError(f"no place in GGUF for {name}")
    return f"blk.{found[1]}.{MODULES[found[2]]}{PARTS.get(found[3], found[3])}"


def write_base(directory: Path, target: Path) -> None:
    """Write a base of the Qwen2 architecture, bf16."""
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_vocabulary(writer, config["vocab_size"], end=config["eos_token_id"])
    _write(writer, directory / "model.safetensors")


def write_adapter(directory: Path, target: Path) -> None:
    """Write a LoRA adapter for such a base, fp16."""
    config = json.loads((directory / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    _write(writer, directory / "adapter_model.safetensors")


def _add_vocabulary(writer: Any, size: int, *, end: int) -> None:
    """A byte-level vocabulary; single bytes read as GPT-2 writes them, the rest as anything."""
    plain = {*range(ord("!"), ord("~") + 1), *range(161, 173), *range(174, 256)}
    others = [code for code in range(BYTES) if code not in plain]
    letters = [chr(code if code in plain else BYTES + others.index(code)) for code in range(BYTES)]
    tokens = letters + [f"t{i}" for i in range(BYTES, size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["a b"])  # llama.cpp wants at least one
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def _write(writer: Any, weights: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, the file is no mapping
            _add_tensor(writer, gguf_name(name), file.get_tensor(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
    elif ".lora_" in name:
        writer.add_tensor(name, tensor.half().numpy())
    else:  # as it is: numpy has no bf16
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def main() -> None:
    """Convert the pairs on the command line: the first is the base, all others are adapters."""
    paths = [Path(argument) for argument in sys.argv[1:]]
    for number, (source, target) in enumerate(zip(paths[::2], paths[1::2], strict=True)):
        partial = target.with_name(target.name + ".partial")
        (write_adapter if number else write_base)(source, partial)
        partial.rename(target)


if __name__ == "__main__":
    main()
