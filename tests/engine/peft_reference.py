"""The reference for served adapters: what PEFT on transformers answers, greedily, one request at a time.

It always computes in fp32, on the numbers that the engine holds: for one in bf16 the weights of base and adapters are
rounded to bf16 first, for a base in NF4 its linear layers go through NF4 and back. So only the engine's arithmetic
differs. That may turn a near tie of two tokens round: `Greedy.agreement` says what is one, and what is compared then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

Request = tuple[str | None, Sequence[int]]
"""Adapter's name, None for the base, and the prompt's token ids."""


@dataclass(frozen=True)
class Greedy:
    """One answer.

    Attributes:
        tokens: the likeliest token at each position.
        logits: fp32, (positions, vocabulary), each after the tokens before it.
    """

    tokens: tuple[int, ...]
    logits: np.ndarray

    def agreement(self, found: Sequence[int], *, tie: float) -> int:
        """Return how many of the first tokens are the reference's, which is all of them but for a near tie.

        Where the first other token is found, its logit must be within `tie` of the likeliest one's. Nothing after it
        is compared: from there on the two continue different texts.

        Raises:
            AssertionError: another token that was no near tie, or another number of tokens.
        """
        assert len(found) == len(self.tokens)
        for position, (ours, theirs) in enumerate(zip(found, self.tokens, strict=True)):
            if ours != theirs:
                row = self.logits[position]
                behind = float(row[theirs] - row[ours])
                assert behind < tie, (
                    f"token {ours} at {position}, {behind:.4f} behind {theirs}: {found}, {self.tokens}"
                )
                return position
        return len(self.tokens)


def greedy(
    base: Path,
    adapters: Mapping[str, Path],
    requests: Iterable[Request],
    new_tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    nf4: bool = False,
) -> list[Greedy]:
    """Answer each request with the weights as they are in `dtype`, the base's linear layers in NF4 if asked."""
    first, *others = adapters.items()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if nf4:
        _round_to_nf4(model, dtype)
    peft = PeftModel.from_pretrained(model, first[1], adapter_name=first[0]).eval()
    for name, path in others:
        peft.load_adapter(path, adapter_name=name)
    with torch.inference_mode():
        for parameter in peft.parameters():
            parameter.copy_(parameter.to(dtype))
        return [_answer(peft, name, prompt, new_tokens) for name, prompt in requests]


def _round_to_nf4(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """As vLLM's loader does it: every linear layer but the output layer, each weight for itself."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = quantize_4bit(
                module.weight.data.to(dtype), compress_statistics=True, quant_type="nf4"
            )
            module.weight.data = dequantize_4bit(packed, state).float()


def _answer(peft: PeftModel, name: str | None, prompt: Sequence[int], new_tokens: int) -> Greedy:
    if name is None:
        with peft.disable_adapter():
            return _generate(peft, prompt, new_tokens)
    peft.set_adapter(name)
    return _generate(peft, prompt, new_tokens)


def _generate(model: PeftModel, prompt: Sequence[int], new_tokens: int) -> Greedy:
    found = model.generate(
        input_ids=torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(found.logits)[:, 0].numpy()
    return Greedy(tuple(found.sequences[0, len(prompt) :].tolist()), logits)
