"""vLLM's outputs as ours, by vLLM's own types."""

from types import SimpleNamespace
from typing import Any

import pytest

from loraplex_server.engine.protocol import LOGPROB_MIN, Form, Sampling
from loraplex_server.engine.vllm_values import chunks, embedding
from loraplex_server.errors import EngineUnavailableError, InvalidRequestError

PLAIN = Sampling(max_tokens=4)


def output(*, finish_reason: str | None = None, logprobs: Any = None) -> Any:
    part = SimpleNamespace(text="ab", token_ids=[7], finish_reason=finish_reason, logprobs=logprobs)
    return SimpleNamespace(outputs=[part], num_cached_tokens=3)


def position(*told: tuple[int, float, int]) -> dict[int, Any]:
    """What vLLM tells of one position: the taken token first, then the likeliest; (id, logprob, rank) of each."""
    return {
        token_id: SimpleNamespace(logprob=logprob, rank=rank, decoded_token=f"t{token_id}")
        for token_id, logprob, rank in told
    }


@pytest.mark.parametrize(
    ("asked", "told", "top"),
    [
        (0, [(7, -3.0, 9)], []),
        (2, [(7, -3.0, 9), (1, -0.5, 1), (2, -1.0, 2)], [1, 2]),
        (2, [(7, -1.0, 2), (1, -0.5, 1)], [1, 7]),
        (1, [(7, -0.5, 1)], [7]),
        (
            2,
            [(7, -0.5, 1), (1, -0.5, 1), (2, -0.5, 2)],
            [1, 2],
        ),  # as likely as the likeliest, and not named with them
    ],
)
def test_the_likeliest_are_as_many_as_were_asked_for_with_or_without_the_taken_one(
    asked: int, told: list[tuple[int, float, int]], top: list[int]
) -> None:
    sampling = Sampling(max_tokens=4, logprobs=asked)
    (chunk,) = chunks(output(logprobs=[position(*told)]), sampling)
    (found,) = chunk.logprobs
    assert (found.text, found.logprob) == ("t7", told[0][1])
    assert [candidate.token_id for candidate in found.top] == top


def test_a_probability_of_nothing_has_a_number_that_json_knows() -> None:
    sampling = Sampling(max_tokens=4, logprobs=1)
    (chunk,) = chunks(output(logprobs=[position((7, float("-inf"), 9), (1, 0.0, 1))]), sampling)
    assert chunk.logprobs[0].logprob == LOGPROB_MIN
    assert chunks(output(), PLAIN)[0].logprobs == ()


def test_an_error_is_the_callers_where_it_asked_for_a_form() -> None:
    formed = Sampling(max_tokens=4, form=Form("regex", "a"))
    with pytest.raises(InvalidRequestError) as caught:
        chunks(output(finish_reason="error"), formed)
    assert caught.value.field == "sampling.structured_output.regex"
    for sampling, reason in ((PLAIN, "error"), (formed, "abort")):
        with pytest.raises(EngineUnavailableError):
            chunks(output(finish_reason=reason), sampling)


def test_vectors_have_length_one_or_are_none() -> None:
    torch = pytest.importorskip("torch")

    def pooled(*values: float) -> Any:
        return SimpleNamespace(outputs=SimpleNamespace(data=torch.tensor(values)), num_cached_tokens=0)

    assert embedding(pooled(3.0, 4.0)).vector == pytest.approx((0.6, 0.8))
    for broken in (pooled(0.0, 0.0), pooled(float("nan"), 1.0), pooled(float("inf"), 1.0)):
        with pytest.raises(EngineUnavailableError):
            embedding(broken)
