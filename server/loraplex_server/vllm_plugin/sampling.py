"""On CPU, log-probabilities without a compiler in the middle of a step.

vLLM compiles the one-line function that ranks a token when the first request asks for log-probabilities: on CPU that
builds C++ for ten seconds and more within a step that every request waits for. What it saves there is one copy of a
small table.
"""

from __future__ import annotations

import sys


def rank_uncompiled() -> None:
    """Have vLLM rank tokens by the function as it is written. Calling it again is harmless."""
    from vllm.v1.sample.ops import logprobs

    compiled = logprobs.batched_count_greater_than
    plain = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    logprobs.batched_count_greater_than = plain
    sampler = sys.modules.get("vllm.v1.sample.sampler")
    if sampler is not None:
        sampler.batched_count_greater_than = plain  # type: ignore[attr-defined]
