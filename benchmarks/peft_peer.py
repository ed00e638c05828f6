"""Transformers and PEFT as a peer: a process that generates for many adapters in one batch, or one after the other.

`python -m benchmarks.peft_peer SPEC` speaks as `benchmarks.engines` does: one JSON request per line, one answer each.
A request names adapters by number; `"serial": true` asks for `set_adapter` and a `generate` of its own per row,
otherwise all rows go into one batch, each with its adapter in `adapter_names`.

What was found to be its fastest way here is what it does; `benchmarks/README.md` says what was tried.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.engines import Child
from loraplex_server.engine.vllm_settings import SPIN_COUNT

BASE_ROW = "__base__"  # PEFT's own name for a row without adapter


@dataclass(frozen=True)
class PeftSpec:
    """Base and adapters, each a directory; all are loaded at the start, in bf16."""

    base: str
    adapters: tuple[str, ...]
    threads: int


class PeftPeer(Child):
    """A child process with the model and its adapters."""

    def __init__(self, spec: PeftSpec) -> None:
        environment = {
            "OMP_NUM_THREADS": str(spec.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": SPIN_COUNT,
            "HF_HUB_OFFLINE": "1",
        }
        super().__init__(
            [sys.executable, "-m", "benchmarks.peft_peer", json.dumps(asdict(spec))], environment
        )


def _load(spec: PeftSpec) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec.threads)
    base = AutoModelForCausalLM.from_pretrained(spec.base, dtype=torch.bfloat16, attn_implementation="sdpa")
    model: Any = None
    for number, path in enumerate(spec.adapters):
        # Without autocast PEFT would keep the adapters in fp32 and cast every row there and back.
        options = {"adapter_name": f"a{number}", "autocast_adapter_dtype": False}
        if model is None:
            model = PeftModel.from_pretrained(base, path, **options)
        else:
            model.load_adapter(path, **options)
    # The last positions of a prompt's rows do not lie side by side. For such an input torch copies the output layer's
    # weights once per row, 4.4 GB here, which takes longer than everything else together: lay them side by side.
    base.lm_head.register_forward_pre_hook(lambda _, inputs: tuple(one.contiguous() for one in inputs))
    return model.eval()


def _generate(model: Any, rows: int, request: dict[str, Any], **more: Any) -> list[list[int]]:
    import torch

    prompt = torch.tensor([[2 + i % 500 for i in range(request["prompt_tokens"])]] * rows)
    found = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request["new_tokens"],
        do_sample=False,
        eos_token_id=None,  # nothing ends a row early
        pad_token_id=0,
        **more,
    )
    tokens: list[list[int]] = found[:, prompt.shape[1] :].tolist()
    return tokens


def _answer(model: Any, request: dict[str, Any]) -> list[list[int]]:
    rows: list[int | None] = request["rows"]
    if not request.get("serial"):
        names = [BASE_ROW if row is None else f"a{row}" for row in rows]
        return _generate(model, len(rows), request, adapter_names=names)
    tokens = []
    for row in rows:
        model.set_adapter(f"a{row}", inference_mode=True)
        tokens += _generate(model, 1, request)
    return tokens


def _main() -> None:
    import torch

    fields = json.loads(sys.argv[1])
    spec = PeftSpec(**(fields | {"adapters": tuple(fields["adapters"])}))
    answers = os.fdopen(
        os.dup(1), "w"
    )  # the answers keep the real stdout; whatever is printed goes to stderr
    os.dup2(2, 1)
    model = _load(spec)
    print(json.dumps({"adapters": len(spec.adapters)}), file=answers, flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            start = time.perf_counter()
            tokens = _answer(model, request)
            seconds = time.perf_counter() - start
            assert all(len(row) == request["new_tokens"] for row in tokens)
            print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    _main()
