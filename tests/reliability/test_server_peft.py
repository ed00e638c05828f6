"""A whole server in fp32, embeddings and output layer adapted too: every token as PEFT has it.

In bf16 the logits of this base lie no further apart than rounding moves them (neighbouring values from 4 to 8 are 0.03
apart), so that a fifth of the answers ends in a tie; `tests/e2e/test_peft.py` has that case on the shared engine. An
engine start of its own, so not in the suite that every change runs.
"""

from collections.abc import Callable

import pytest
import torch

from loraplex_client import Client
from tests.e2e.conftest import Stage, serving, write_settings
from tests.e2e.conftest import base_dir as base_dir
from tests.e2e.conftest import stage as stage
from tests.e2e.test_peft import (
    ADAPTERS,
    ALL_LINEAR,
    Kind,
    ask_together,
    make_requests,
    publish,
    told_apart,
)
from tests.engine.peft_reference import greedy

pytestmark = [pytest.mark.engine, pytest.mark.reliability]

NEW_TOKENS = 24
PROMPTS = 20
AT_ONCE = 20  # four prompts of everyone
EVERYONE = ADAPTERS | {"globex/peft-everything": Kind(16, (*ALL_LINEAR, "embed_tokens", "lm_head"), 0.04)}
TIES = {torch.float32: 1e-3}


@pytest.mark.parametrize("dtype", list(TIES), ids=str)
def test_server_peft_has_the_same_tokens(
    stage: Stage, dtype: torch.dtype, seed: int, figure: Callable[..., None]
) -> None:
    name = str(dtype).rpartition(".")[2]
    adapters = publish(stage, EVERYONE, seed)
    requests = make_requests([None, *adapters], PROMPTS, seed)
    expected = greedy(stage.base_dir, adapters, requests, NEW_TOKENS, dtype=dtype)
    settings = write_settings(
        stage,
        stage.root / f"{name}.toml",
        model__quantization='"none"',
        model__dtype=f'"{name}"',
        adapters__embeddings="true",
    )
    found = []
    with serving(settings) as served, Client(f"127.0.0.1:{served.grpc_port}", timeout_s=60) as client:
        for start in range(0, len(requests), AT_ONCE):
            found += ask_together(client, requests[start : start + AT_ONCE], NEW_TOKENS)
    same = ties = others = 0
    for one, tokens in zip(expected, found, strict=True):
        try:
            agreed = one.agreement(tokens, tie=TIES[dtype])
        except AssertionError as error:
            print(error)
            others += 1
        else:
            same += agreed
            ties += agreed < NEW_TOKENS
    asked = len(requests) * NEW_TOKENS
    figure(f"{name}: answers compared", len(requests), "= 100", len(requests) == 100)
    figure(
        f"{name}: a mix-up would be seen",
        int(told_apart(requests, expected)),
        "= 1",
        told_apart(requests, expected),
    )
    figure(f"{name}: share of tokens that are PEFT's", round(same / asked, 4), ">= 0.8", same >= 0.8 * asked)
    figure(f"{name}: answers that end in a near tie", ties, "<= 5", ties <= 5)
    figure(f"{name}: answers with another token", others, "= 0", others == 0)
