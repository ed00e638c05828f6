"""The server's answers in bf16 are PEFT's: base and adapters of several ranks, all in one batch.

`tests/engine/test_mixed_batches.py` asks the same of an engine in fp32, embeddings and logits included, and
`tests/reliability/test_server_peft.py` asks it of whole servers in both, with more requests.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loraplex_client import GREEDY, Client, TokenIds
from loraplex_registry.refs import AdapterRef
from tests.e2e.conftest import Stage, write_adapter
from tests.engine.peft_reference import Request, greedy

pytestmark = pytest.mark.engine

SEED = 60
NEW_TOKENS = 12
PROMPTS = 4  # of each adapter and of the base
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# name -> (rank, modules); a slot for each
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "acme/peft-one": (1, ALL_LINEAR),
    "acme/peft-four": (4, ("q_proj", "v_proj")),
    "globex/peft-sixteen": (16, ALL_LINEAR),
}
STD = 0.15  # of rank 1: it changes the greedy tokens, and does not turn the errors of bf16 into chaos
TIE = 0.05
"""Logits nearer than this are a tie in bf16. Their standard deviation is 0.28; measured errors of bf16 here: the
likeliest token's logit up to 0.013, 99% of all logits within 0.01, so two of them are at most about 0.025 off."""


def publish(stage: Stage, name: str, seed: int) -> Path:
    """Publish one of the adapters; returns its directory."""
    rank, modules = ADAPTERS[name]
    ref = AdapterRef.parse(name)
    directory = write_adapter(
        stage.base,
        stage.root / ref.adapter,
        seed=seed,
        rank=rank,
        modules=modules,
        std=STD * rank**-0.25,  # the product of A and B then changes as much at every rank
    )
    stage.registry.publish(directory, ref, stage.signers[ref.tenant], stage.base)
    return directory


def make_requests(names: list[str | None], count: int, seed: int) -> list[Request]:
    """Prompts of different lengths, each asked of everyone in turn: rows of one adapter are never side by side."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(6, 1024, size=int(rng.integers(4, 24))).tolist() for _ in range(count)]
    return [(name, prompt) for prompt in prompts for name in names]


def test_every_row_of_a_mixed_batch_is_what_peft_answers(server: Stage, client: Client) -> None:
    adapters = {name: publish(server, name, SEED + seed) for seed, name in enumerate(ADAPTERS)}
    requests = make_requests([None, *adapters], PROMPTS, SEED)
    expected = greedy(server.base_dir, adapters, requests, NEW_TOKENS, dtype=torch.bfloat16)
    sampling = replace(GREEDY, max_tokens=NEW_TOKENS, ignore_eos=True)

    def ask(request: Request) -> tuple[int, ...]:
        name, prompt = request
        return client.generate(TokenIds(tuple(prompt)), adapter=name or "", sampling=sampling).token_ids

    with ThreadPoolExecutor(len(requests)) as threads:
        found = list(threads.map(ask, requests))
    told_apart = {(tuple(prompt), one.tokens) for (_, prompt), one in zip(requests, expected, strict=True)}
    assert len(told_apart) == len(requests), "a row that is given another's adapter must be seen"
    same = sum(one.agreement(tokens, tie=TIE) for one, tokens in zip(expected, found, strict=True))
    assert same >= 0.8 * len(requests) * NEW_TOKENS, "ties are the exception"
