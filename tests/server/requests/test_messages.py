"""From wire messages to checked requests."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.v1 import generation_pb2 as pb
from loraplex_server.errors import ContextTooLongError, InvalidRequestError
from loraplex_server.requests.messages import check_token_ids, final_sampling, parse_generate


def message(**changes: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "hello", **changes})  # type: ignore[arg-type]


def sampling(**values: object) -> pb.GenerateRequest:
    return message(sampling=pb.SamplingParams(**values))  # type: ignore[arg-type]


FORM = pb.StructuredOutput(regex="a+")


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
        (sampling(n=0), "sampling.n"),
        (sampling(n=17), "sampling.n"),
        (sampling(n=2, temperature=0), "sampling.n"),
        (sampling(n=2, seed=2**63 - 1), "sampling.seed"),
        (sampling(logprobs=21), "sampling.logprobs"),
        (sampling(structured_output=pb.StructuredOutput()), "sampling.structured_output"),
        (sampling(structured_output=pb.StructuredOutput(regex="")), "sampling.structured_output.regex"),
        (sampling(structured_output=FORM, min_tokens=1), "sampling.min_tokens"),
        (sampling(structured_output=FORM, ignore_eos=True), "sampling.ignore_eos"),
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


def test_fewer_tokens_at_most_than_at_least_are_refused() -> None:
    params = pb.SamplingParams(min_tokens=6)
    assert final_sampling(params, prompt_tokens=1, context_tokens=9, vocab_size=9).min_tokens == 6
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        final_sampling(params, prompt_tokens=5, context_tokens=9, vocab_size=9)


numbers = st.floats(width=32) | st.sampled_from([0.0, 1.0, 2.0, 0.5, -2.0])
counts = st.integers(0, 30) | st.integers(0, 2**32 - 1)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("max_tokens", "min_tokens", "n", "logprobs", "top_k"), counts),
            **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty"), numbers),
            **dict.fromkeys(("frequency_penalty", "repetition_penalty"), numbers),
            "seed": st.integers(0, 2**64 - 1) | st.integers(2**63 - 20, 2**63),
            "stop": st.lists(st.text(max_size=3), max_size=3),
            "stop_token_ids": st.lists(st.integers(0, 40), max_size=3),
            "ignore_eos": st.booleans(),
            "structured_output": st.sampled_from([FORM, pb.StructuredOutput(choice=pb.Choices(texts=["a"]))]),
        },
    )
)
def test_any_request_is_refused_by_its_field_or_inside_the_engines_ranges(values: dict[str, object]) -> None:
    """The ranges are those that vLLM's SamplingParams checks, and those it does not check and would fail at."""
    refused = ""
    try:
        call = parse_generate(sampling(**values), prompt_chars_max=100)
        final = final_sampling(
            call.sampling, prompt_tokens=3, context_tokens=40, vocab_size=30, form=call.form
        )
    except ContextTooLongError:
        return
    except InvalidRequestError as error:
        refused = error.field
    if refused:
        assert refused.removeprefix("sampling.").partition(".")[0] in values
        return
    assert 1 <= call.choices <= 16
    assert call.choices == 1 or final.temperature > 0
    assert 0 <= final.min_tokens <= final.max_tokens <= 37
    assert final.logprobs is None or 0 <= final.logprobs <= 20
    assert final.seed is None or 0 <= final.seed + call.choices - 1 < 2**63
    assert 0 <= final.temperature <= 2
    assert 0 < final.top_p <= 1
    assert 0 <= final.min_p <= 1
    assert 0 <= final.top_k <= 30
    assert -2 <= final.presence_penalty <= 2
    assert -2 <= final.frequency_penalty <= 2
    assert 0 < final.repetition_penalty <= 2
    assert all(final.stop)
    assert all(token_id < 30 for token_id in final.stop_token_ids)
    assert final.form is None or (final.min_tokens == 0 and not final.ignore_eos)
