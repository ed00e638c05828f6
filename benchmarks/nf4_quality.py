"""What quantizing a trained base costs in quality, by the way in which its products are made.

The demo's base, trained here (`loraplex_examples.tiny_base`), answers questions it has not seen; every linear layer of
it is computed in bf16, from NF4 weights as bitsandbytes does it, by our kernels, and by ours in eight bits. Told of
each: the loss of the right answers, in nats a token, and how many of the best tokens are those of the bf16 base. All
other operators are those of transformers, so that differences come from the linear layers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Measurement
from loraplex_examples.tiny_base import Recipe, batches, ensure_tiny_base
from loraplex_server.vllm_plugin.cpu.nf4 import Quantized, linear, pack

BATCHES = 16
HELD_OUT = Recipe(seed=1_000_003)  # another seed than the training's: other questions

Apply = Callable[[torch.Tensor], torch.Tensor]


def measure_quality(workdir: Path) -> list[Measurement]:
    """Train the base unless `workdir` has it, and return the loss of each way and its agreement with bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = ensure_tiny_base(workdir)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    batched = list(islice(batches(AutoTokenizer.from_pretrained(directory), HELD_OUT), BATCHES))
    layers = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    ways = {way: [replacements(layer)[way] for layer in layers] for way in ("ours", "int8", "stock")}
    found: list[Measurement] = []
    expected: list[torch.Tensor] = []
    for way in ("bf16", *ways):
        for layer, apply in zip(layers, ways.get(way, []), strict=False):
            layer.forward = apply
        losses, best = zip(*answers(model, batched), strict=True)
        n_tokens = sum(map(len, best))
        found.append(_figure(f"quality_loss_{way}", torch.cat(losses).mean(), "nats/token", n_tokens))
        expected = expected or list(best)
        same = torch.cat([a == b for a, b in zip(best, expected, strict=True)]).float().mean()
        found.append(_figure(f"quality_same_tokens_{way}", same, "share", n_tokens))
    return found


def replacements(layer: torch.nn.Linear) -> dict[str, Apply]:
    """Return the ways to compute a linear layer without bias from its NF4 weight."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=False)
    one = Quantized(codes, state.absmax, tuple(state.shape), state.blocksize)

    def ours(*, int8: bool) -> Apply:
        packed = pack([one], int8=int8)
        return lambda x: linear(x, packed.memory, None, packed.out_features, packed.group, packed.int8)

    assert layer.bias is None
    return {
        "ours": ours(int8=False),
        "int8": ours(int8=True),
        "stock": lambda x: matmul_4bit(x, codes.t(), state),
    }


@torch.inference_mode()
def answers(
    model: Any, batched: list[tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield, for each batch, the loss of every token of its answers and the token that the model thinks best there."""
    for ids, labels in batched:
        wanted = labels[:, 1:] != -100
        logits = model(input_ids=ids).logits[:, :-1][wanted].float()
        yield (
            torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="none"),
            logits.argmax(-1),
        )


def _figure(name: str, value: torch.Tensor, unit: str, count: int) -> Measurement:
    return Measurement(name, round(float(value), 5), unit, None, count, None)
