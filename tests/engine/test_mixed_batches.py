"""Base and four adapters in one batch of the real engine: each row as if it were alone, and as PEFT has it.

The same batch through vLLM's own wrapper answers the base request wrongly. Two engine starts, each in a
process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraplex_server.vllm_plugin import CPU_LORA_ENV, NATIVE_WRAPPER, STOCK_WRAPPER
from loraplex_server.vllm_plugin.cpu.kernels import load
from tests.engine.mixed_models import ADAPTERS, VOCABULARY, make_adapters, make_base
from tests.engine.peft_reference import Request, greedy

pytestmark = pytest.mark.engine

SEED = 20
NEW_TOKENS = 12
ENGINE_TIMEOUT_S = 300
NAMES: list[str | None] = [None, *ADAPTERS, "four", None, "sixteen", "one"]


def make_requests() -> list[tuple[str | None, list[int]]]:
    """Prompts of different lengths, base and adapters in turn, one adapter more than once."""
    rng = np.random.default_rng(SEED)
    return [(name, rng.integers(3, VOCABULARY, size=int(rng.integers(4, 40))).tolist()) for name in NAMES]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("mixed")
    base = make_base(directory, SEED)
    adapters = make_adapters(base, directory, SEED)
    return {
        "base": str(base),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "requests": make_requests(),
        "new_tokens": NEW_TOKENS,
    }


def by_peft(job: dict[str, Any], requests: list[Request]) -> list[list[int]]:
    adapters = {name: Path(path) for name, path in job["adapters"].items()}
    return [list(answer.tokens) for answer in greedy(Path(job["base"]), adapters, requests, NEW_TOKENS)]


@pytest.fixture(scope="module")
def peft_tokens(job: dict[str, Any]) -> list[list[int]]:
    return by_peft(job, job["requests"])


def run_engine(job: dict[str, Any], directory: Path, wrapper: str) -> dict[str, Any]:
    """Run the job in a child with the chosen wrapper; its log is shown if it fails."""
    (directory / "job.json").write_text(json.dumps(job))
    environment = os.environ | {
        CPU_LORA_ENV: wrapper,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # One thread, not bound: the model is tiny, and a bound spinning thread starves on a shared machine.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("mixed_engine.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(directory / "job.json"), str(directory / "result.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=ENGINE_TIMEOUT_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def results(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of both engines, started side by side: each has one thread, and most of a start is waiting for imports."""
    load()  # once, not by both
    places = {wrapper: tmp_path_factory.mktemp(wrapper) for wrapper in ("native", "stock")}
    with ThreadPoolExecutor() as pool:
        return dict(zip(places, pool.map(lambda one: run_engine(job, places[one], one), places), strict=True))


@pytest.fixture(scope="module")
def ours(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return results["native"]


@pytest.fixture(scope="module")
def stock(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return results["stock"]


def test_each_adapter_changes_the_answer_so_that_a_mix_up_would_be_seen(job, peft_tokens):
    prompt = job["requests"][0][1]
    answers = by_peft(job, [(name, prompt) for name in (None, *ADAPTERS)])
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert answers[0] == peft_tokens[0]


def test_the_engine_really_holds_the_wrapper_that_was_asked_for(ours, stock):
    assert ours["wrapper"] == NATIVE_WRAPPER
    assert stock["wrapper"] == STOCK_WRAPPER


def test_every_row_of_a_mixed_batch_is_as_if_it_were_alone(ours):
    assert ours["mixed"] == ours["alone"]


def test_every_row_of_a_mixed_batch_is_what_peft_answers(ours, peft_tokens):
    assert ours["mixed"] == peft_tokens


def test_the_stock_wrapper_answers_the_base_requests_of_the_same_batch_wrongly(stock, peft_tokens):
    """The same batch, the same check: it fails for the base requests, and for them alone.

    If this test fails, vLLM has fixed its CPU wrapper: then the plugin is needed for speed alone.
    """
    wrong = [row for row, expected in enumerate(peft_tokens) if stock["mixed"][row] != expected]
    assert wrong == [row for row, name in enumerate(NAMES) if name is None]


def test_the_stock_wrapper_is_wrong_even_when_base_requests_are_alone(stock, ours, peft_tokens):
    """Its logits skip no row: the last slot's lm_head adapter is added to a batch of base requests too."""
    base_rows = [row for row, name in enumerate(NAMES) if name is None]
    assert all(stock["alone"][row] != peft_tokens[row] for row in base_rows)
    assert all(ours["alone"][row] == peft_tokens[row] for row in base_rows)
