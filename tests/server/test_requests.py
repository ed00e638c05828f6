"""From wire messages to checked requests."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.v1 import generation_pb2 as pb
from loraplex_server.errors import ContextTooLongError, InvalidRequestError
from loraplex_server.requests import check_token_ids, final_sampling, parse_generate


def message(**changes: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "hello", **changes})  # type: ignore[arg-type]


def sampling(**values: object) -> pb.GenerateRequest:
    return message(sampling=pb.SamplingParams(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_message", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(text=""), "text"),
        (message(text="x" * 101), "text"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids"),
        (pb.GenerateRequest(chat=pb.Chat()), "chat.messages"),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="root", content="x")])),
            "chat.messages[0].role",
        ),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user")])), "chat.messages"),
        (message(adapter="acme"), "adapter"),
        (message(adapter="acme/../etc"), "adapter"),
        (message(adapter="acme/orders@sha256:xyz"), "adapter"),
        (message(request_id="a b"), "request_id"),
        (message(request_id="x" * 129), "request_id"),
        (sampling(max_tokens=0), "sampling.max_tokens"),
        (sampling(temperature=math.nan), "sampling.temperature"),
        (sampling(temperature=-0.1), "sampling.temperature"),
        (sampling(temperature=2.1), "sampling.temperature"),
        (sampling(temperature=math.inf), "sampling.temperature"),
        (sampling(top_p=0.0), "sampling.top_p"),
        (sampling(top_p=math.nan), "sampling.top_p"),
        (sampling(min_p=-1.0), "sampling.min_p"),
        (sampling(presence_penalty=3.0), "sampling.presence_penalty"),
        (sampling(frequency_penalty=-3.0), "sampling.frequency_penalty"),
        (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
        (sampling(seed=2**63), "sampling.seed"),
        (sampling(stop=[""]), "sampling.stop"),
        (sampling(stop=["x"] * 17), "sampling.stop"),
        (sampling(stop_token_ids=range(17)), "sampling.stop_token_ids"),
    ],
)
def test_a_bad_field_is_named(request_message: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_generate(request_message, prompt_chars_max=100)
    assert caught.value.field == field


def test_zero_temperature_is_greedy_and_not_unset() -> None:
    final = final_sampling(pb.SamplingParams(temperature=0), prompt_tokens=1, context_tokens=9, vocab_size=9)
    assert final.temperature == 0
    unset = final_sampling(pb.SamplingParams(), prompt_tokens=1, context_tokens=9, vocab_size=9)
    assert unset.temperature == 1


@given(prompt=st.integers(1, 100), asked=st.none() | st.integers(1, 100), context=st.integers(1, 100))
def test_prompt_and_answer_always_fit_the_context_or_are_refused(
    prompt: int, asked: int | None, context: int
) -> None:
    params = pb.SamplingParams() if asked is None else pb.SamplingParams(max_tokens=asked)
    if prompt + (asked or 1) > context:
        with pytest.raises(ContextTooLongError):
            final_sampling(params, prompt_tokens=prompt, context_tokens=context, vocab_size=9)
    else:
        final = final_sampling(params, prompt_tokens=prompt, context_tokens=context, vocab_size=9)
        assert final.max_tokens >= 1
        assert prompt + final.max_tokens <= context
        assert asked is None or final.max_tokens == asked


def test_token_ids_outside_the_vocabulary_are_named() -> None:
    check_token_ids((0, 8), vocab_size=9)
    with pytest.raises(InvalidRequestError, match=r"token_ids\.ids\[1\].*9 is outside"):
        check_token_ids((0, 9), vocab_size=9)
