"""The server's answers are PEFT's, on a base in NF4 and in bf16: base and adapters of several ranks, all in one batch.

`tests/engine/test_mixed_batches.py` asks the same of an engine in fp32, embeddings and logits included, and
`tests/reliability/test_server_peft.py` asks it of whole servers without NF4 in both, with more requests.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from loraplex_client import GREEDY, Client, TokenIds
from loraplex_registry.refs import AdapterRef
from tests.e2e.conftest import Stage, write_adapter
from tests.engine.peft_reference import Greedy, Request, greedy

pytestmark = pytest.mark.engine

SEED = 60
NEW_TOKENS = 12
PROMPTS = 4  # of each adapter and of the base
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Kind(NamedTuple):
    """A random adapter: strong enough to change greedy tokens, and not to turn the errors of bf16 into chaos."""

    rank: int
    modules: Sequence[str]
    std: float


ADAPTERS = {
    "acme/peft-one": Kind(1, ALL_LINEAR, 0.15),
    "acme/peft-four": Kind(4, ("q_proj", "v_proj"), 0.1),
    "globex/peft-sixteen": Kind(16, ALL_LINEAR, 0.075),
}
TIE = 0.03
"""Logits nearer than this are a tie in bf16: twice the largest error measured here of the difference between two of the
five likeliest (0.015; the logits' standard deviation is 0.28)."""


def publish(stage: Stage, adapters: Mapping[str, Kind], seed: int) -> dict[str, Path]:
    """Publish adapters; returns their directories by name."""
    directories = {}
    for number, (name, kind) in enumerate(adapters.items()):
        ref = AdapterRef.parse(name)
        place = stage.root / f"{ref.adapter}-{seed}"
        directories[name] = write_adapter(stage.base, place, seed=seed + number, **kind._asdict())
        stage.registry.publish(place, ref, stage.signers[ref.tenant], stage.base)
    return directories


def make_requests(names: list[str | None], count: int, seed: int) -> list[Request]:
    """Prompts of different lengths, each asked of everyone in turn: rows of one adapter are never side by side."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(6, 1024, size=int(rng.integers(4, 24))).tolist() for _ in range(count)]
    return [(name, prompt) for prompt in prompts for name in names]


def told_apart(requests: Iterable[Request], expected: Iterable[Greedy]) -> bool:
    """Tell whether a row that is given another's adapter would be seen: everyone answers every prompt differently."""
    answers = [(tuple(prompt), one.tokens) for (_, prompt), one in zip(requests, expected, strict=True)]
    return len(set(answers)) == len(answers)


def ask_together(client: Client, requests: Sequence[Request], new_tokens: int) -> list[tuple[int, ...]]:
    """Greedy answers to requests that are all sent at once."""
    sampling = replace(GREEDY, max_tokens=new_tokens, ignore_eos=True)

    def ask(request: Request) -> tuple[int, ...]:
        name, prompt = request
        return client.generate(TokenIds(tuple(prompt)), adapter=name or "", sampling=sampling).token_ids

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(ask, requests))


def test_every_row_of_a_mixed_batch_is_what_peft_answers(server: Stage, client: Client) -> None:
    adapters = publish(server, ADAPTERS, SEED)
    requests = make_requests([None, *adapters], PROMPTS, SEED)
    expected = greedy(server.base_dir, adapters, requests, NEW_TOKENS, dtype=torch.bfloat16, nf4=True)
    found = ask_together(client, requests, NEW_TOKENS)
    assert told_apart(requests, expected)
    same = sum(one.agreement(tokens, tie=TIE) for one, tokens in zip(expected, found, strict=True))
    assert same >= 0.8 * len(requests) * NEW_TOKENS, "ties are the exception"
