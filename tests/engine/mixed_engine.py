"""Child process of test_mixed_batches: one real vLLM engine, the requests together and each alone.

    python mixed_engine.py JOB.json RESULT.json

JOB: {"base": dir, "adapters": {name: dir}, "requests": [[name or null, [token, ...]], ...], "new_tokens": n}
RESULT: {"wrapper": class name, "mixed": [[token, ...], ...], "alone": [[token, ...], ...]}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job_path: str, result_path: str) -> None:
    """Run the job; vLLM's start-up code runs only under the main guard, because its children are spawned."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job: dict[str, Any] = json.loads(Path(job_path).read_text())
    llm = LLM(
        model=job["base"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        enable_lora=True,
        max_loras=len(job["adapters"]),  # the last slot is in use: it is the one a base row would be given
        max_lora_rank=16,
        enable_prefix_caching=False,
        disable_log_stats=True,
        worker_extension_cls="loraplex_server.vllm_plugin.worker.WorkerExtension",
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["new_tokens"],
        min_tokens=job["new_tokens"],
        detokenize=False,
        ignore_eos=True,
    )
    adapters = {
        name: LoRARequest(name, number + 1, path)
        for number, (name, path) in enumerate(job["adapters"].items())
    }

    for adapter in adapters.values():  # one by one, so that the order of the slots is the order of the job
        llm.llm_engine.add_lora(adapter)

    def answer(requests: list[Any]) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": tokens} for _, tokens in requests],
            sampling,
            lora_request=[adapters.get(name) for name, _ in requests],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    result = {
        "wrapper": llm.collective_rpc("loraplex_lora_wrapper")[0],
        "mixed": answer(job["requests"]),
        "alone": [answer([request])[0] for request in job["requests"]],
    }
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
