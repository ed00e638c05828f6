"""A base served for vectors, on the real engine: an engine of its own, so not in the suite that every change runs."""

import math
from collections.abc import Iterator

import openai
import pytest

from loraplex_client import Client, Sampling, TokenIds, UnsupportedByBaseError
from tests.e2e.conftest import PROMPT, Served, Stage, serving, write_settings
from tests.e2e.conftest import base_dir as base_dir
from tests.e2e.conftest import stage as stage

pytestmark = [pytest.mark.engine, pytest.mark.reliability]


@pytest.fixture(scope="module")
def embedding(stage: Stage) -> Iterator[Served]:
    """A server of vectors, with an adapter to load."""
    stage.publish("acme/vectors", seed=70)
    with serving(write_settings(stage, stage.root / "embed.toml", model__task='"embed"')) as served:
        yield served


def test_an_adapters_vectors_have_length_one_and_are_not_the_bases(embedding: Served) -> None:
    with Client(f"127.0.0.1:{embedding.grpc_port}", timeout_s=60) as client:
        base, mine = client.embed(PROMPT), client.embed(PROMPT, adapter="acme/vectors")
        for found in (base, mine):
            assert math.hypot(*found.vector) == pytest.approx(1, abs=1e-6)
            assert found.usage.prompt_tokens == len(PROMPT.ids)
        assert mine.header.adapter.startswith("acme/vectors@sha256:")
        assert base.header.adapter == ""
        alike = sum(a * b for a, b in zip(base.vector, mine.vector, strict=True))
        assert alike < 0.99, "the adapter must change the vector"
        again = client.embed(PROMPT, adapter="acme/vectors")
        assert again.vector == pytest.approx(mine.vector, abs=1e-3)
        other = client.embed(TokenIds((1, 50, 40, 30, 20)), adapter="acme/vectors")
        assert sum(a * b for a, b in zip(other.vector, mine.vector, strict=True)) < 0.99
        with pytest.raises(UnsupportedByBaseError):
            client.generate(PROMPT, sampling=Sampling(max_tokens=1))


def test_the_openai_client_gets_the_same_vectors(embedding: Served) -> None:
    http = openai.OpenAI(base_url=f"http://127.0.0.1:{embedding.http_port}/v1", api_key="none", timeout=60)
    with Client(f"127.0.0.1:{embedding.grpc_port}", timeout_s=60) as client:
        wanted = [
            client.embed(text, adapter="acme/vectors").vector for text in ("copy: cat", "order 3 lamps")
        ]
    told = http.embeddings.create(model="acme/vectors", input=["copy: cat", "order 3 lamps"])
    for row, vector in zip(told.data, wanted, strict=True):
        assert row.embedding == pytest.approx(vector, abs=1e-3)
