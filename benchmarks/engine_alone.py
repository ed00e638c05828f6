"""The engine of `benchmarks.frontend` without a port: what no front end around it can exceed.

    python -m benchmarks.engine_alone BASE ROUNDS

Prints one JSON object per round: `tok_s` with answers that are told whole at their end, which costs the front end next
to nothing, and `ttft_p99_s` with every token told, in this process.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

from benchmarks.frontend_servers import ENVIRONMENT, EngineSettings

STREAMS, TOKENS, PROMPT_TOKENS = 64, 128, 16


async def measure(base: Path, rounds: int) -> None:
    """Start the engine, and print a line after each round but the first, which warms up."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = EngineSettings()
    arguments = AsyncEngineArgs(
        model=str(base),
        dtype="bfloat16",
        seed=0,
        max_num_seqs=engine.batch_requests,
        max_model_len=engine.context_tokens,
        enforce_eager=True,
        enable_prefix_caching=True,
    )
    llm = AsyncLLM.from_vllm_config(arguments.create_engine_config(), disable_log_stats=False)
    try:
        for number in range(rounds + 1):
            tok_s, _ = await _round(llm, RequestOutputKind.FINAL_ONLY, seed=2 * number)
            _, ttft_s = await _round(llm, RequestOutputKind.DELTA, seed=2 * number + 1)
            if number:
                print(json.dumps({"tok_s": tok_s, "ttft_p99_s": ttft_s}), flush=True)
    finally:
        llm.shutdown()


async def _round(llm: object, kind: object, *, seed: int) -> tuple[float, float]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(10, 600) for _ in range(PROMPT_TOKENS)] for _ in range(STREAMS)]
    started = time.perf_counter()
    firsts = await asyncio.gather(
        *(_stream(llm, prompt, kind, f"{seed}-{index}") for index, prompt in enumerate(prompts))
    )
    seconds = time.perf_counter() - started
    return STREAMS * TOKENS / seconds, statistics.quantiles(firsts, n=100, method="inclusive")[98]


async def _stream(llm: object, prompt: list[int], kind: object, name: str) -> float:
    """Generate; return the seconds to the first output."""
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(
        max_tokens=TOKENS,
        temperature=0,
        ignore_eos=True,
        output_kind=kind,
        detokenize=kind is RequestOutputKind.DELTA,
    )
    started, first = time.perf_counter(), 0.0
    async for _ in llm.generate(tokens_input(prompt), params, name):  # type: ignore[attr-defined]
        first = first or time.perf_counter() - started
    return first


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    import uvloop

    uvloop.run(measure(Path(sys.argv[1]), int(sys.argv[2])))
