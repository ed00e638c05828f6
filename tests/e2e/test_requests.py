"""What callers ask of a request, on the real engine: choices, log-probabilities, forms of answers, request ids."""

import json
import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

from loraplex_client import (
    ChatMessage,
    Client,
    Form,
    Grammar,
    InvalidRequestError,
    JsonSchema,
    OneOf,
    Regex,
    Sampling,
    UnsupportedByBaseError,
)
from tests.e2e.conftest import PROMPT, SIXTEEN, Stage, generate

pytestmark = pytest.mark.engine

SCHEMA = {
    "type": "object",
    "properties": {"done": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["done", "size"],
    "additionalProperties": False,
}
DRAWN = Sampling(max_tokens=16, temperature=1.0, seed=5, ignore_eos=True)


def formed(client: Client, form: Form, **sampling: object) -> str:
    """What an adapter answers in a form, to its end."""
    asked = Sampling(**{"max_tokens": 100, "temperature": 1.0, "seed": 1, "form": form, **sampling})  # type: ignore[arg-type]
    done = client.generate(PROMPT, adapter="acme/good", sampling=asked)
    assert done.finish_reason == "stop"
    return done.text


def test_answers_have_the_form_that_was_asked_for(client: Client) -> None:
    found = json.loads(formed(client, JsonSchema(SCHEMA)))
    assert found.keys() == {"done", "size"}
    assert type(found["done"]) is bool
    assert found["size"] in ("small", "large")
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", formed(client, Regex(r"[0-9]{3}-[a-f]{2}")))
    assert formed(client, Grammar('root ::= "(" inner ")"\ninner ::= "yes" | "no"')) in ("(yes)", "(no)")
    texts = ("copy", 'a "quoted" \\ one', "two\nlines", "ünïcode 😀")
    assert formed(client, OneOf(texts)) in texts
    assert {formed(client, OneOf((text,))) for text in texts} == set(texts)


HOSTILE: list[tuple[str, Form]] = [
    ("json_schema", JsonSchema('{"type": "wat"}')),
    ("json_schema", JsonSchema({"type": "array", "uniqueItems": True})),
    ("json_schema", JsonSchema('{"type": "array", "items": ' * 40 + "{}" + "}" * 40)),
    ("json_schema", JsonSchema({"$ref": "https://schemas.example/secret.json"})),
    ("json_schema", JsonSchema({"$ref": "#"})),
    ("regex", Regex("((")),
    ("regex", Regex("(" * 20_000 + "a" + ")" * 20_000)),
    ("regex", Regex("(((a|b){1,60}){1,60}){1,60}")),
    ("grammar", Grammar('root ::= "a')),
    ("grammar", Grammar('root ::= s\ns ::= s s s s | "a" | ""')),
    ("grammar", Grammar("\n".join(f"r{n} ::= r{n + 1} r{n + 1} r{n + 1}" for n in range(3000)))),
    ("choice", OneOf(())),
]


def test_hostile_and_malformed_forms_are_refused_by_name_and_the_engine_lives(client: Client) -> None:
    """That it lives is asserted by the fixture."""
    for kind, form in HOSTILE:
        with pytest.raises(InvalidRequestError) as caught:
            client.generate(PROMPT, sampling=Sampling(max_tokens=100, form=form))
        assert [field for field, _ in caught.value.fields] == [f"sampling.structured_output.{kind}"], form


def test_a_form_that_turns_costly_while_it_is_followed_ends_its_own_request_only(client: Client) -> None:
    """It is costly after one digit only, which the trial does not take and the model does."""
    greedy = Sampling(max_tokens=100, temperature=0.0)
    digit = client.generate(PROMPT, sampling=replace(greedy, form=Regex("[0-9]"))).text
    others = "0123456789".replace(digit, "")
    costly = Regex(f"{digit}((([a-z]){{1,60}}){{1,60}}){{1,60}};|[{others}][a-z]*")
    other = threading.Thread(target=generate, args=(client, "acme/good"))
    other.start()
    for _ in range(4):  # the last one without the engine
        with pytest.raises(InvalidRequestError, match="takes too long"):
            client.generate(PROMPT, sampling=replace(greedy, form=costly))
    other.join(30)
    assert not other.is_alive()


def test_each_choice_is_what_a_call_of_its_own_seed_gives(client: Client) -> None:
    several = client.generate(PROMPT, adapter="acme/good", sampling=replace(DRAWN, n=4))
    alone = [
        client.generate(PROMPT, adapter="acme/good", sampling=replace(DRAWN, seed=5 + index)).token_ids
        for index in range(4)
    ]
    assert [choice.token_ids for choice in several.choices] == alone
    assert len(set(alone)) == 4
    assert several.usage.completion_tokens == 64


def test_log_probabilities_agree_with_the_tokens_that_were_taken(client: Client) -> None:
    sampling = replace(SIXTEEN, logprobs=5)
    greedy = client.generate(PROMPT, adapter="acme/good", sampling=sampling).choices[0]
    assert greedy.token_ids == generate(client, "acme/good").token_ids
    for token_id, position in zip(greedy.token_ids, greedy.logprobs, strict=True):
        assert len(position.top) == 5
        values = [candidate.logprob for candidate in position.top]
        assert values == sorted(values, reverse=True)
        assert position.top[0].token_id == token_id, "a greedy token is the likeliest"
        assert position.logprob == values[0] <= 0
    drawn = client.generate(PROMPT, adapter="acme/good", sampling=replace(DRAWN, logprobs=0)).choices[0]
    assert len(drawn.logprobs) == 16
    assert all(position.logprob <= 0 and position.top == () for position in drawn.logprobs)


def test_log_probabilities_are_those_of_the_model_itself(server: Stage, client: Client) -> None:
    """The base's, recomputed by transformers; as exact as a base quantized to NF4 lets them be."""
    import torch
    from transformers import AutoModelForCausalLM

    asked = replace(SIXTEEN, max_tokens=4, logprobs=1)
    told = client.generate(PROMPT, sampling=asked).choices[0]
    model = AutoModelForCausalLM.from_pretrained(server.base_dir, dtype=torch.float32)
    ids = torch.tensor([PROMPT.ids + told.token_ids])
    with torch.inference_mode():
        wanted = model(ids).logits.log_softmax(-1)[0]
    for place, (token_id, position) in enumerate(zip(told.token_ids, told.logprobs, strict=True)):
        assert position.logprob == pytest.approx(
            float(wanted[len(PROMPT.ids) - 1 + place, token_id]), abs=0.1
        )


def test_two_calls_with_one_request_id_are_one_generation(server: Stage, client: Client) -> None:
    def call(_: int) -> tuple[tuple[int, ...], str]:
        done = client.generate(
            PROMPT, adapter="acme/good", sampling=Sampling(max_tokens=60, ignore_eos=True), request_id="once"
        )
        return done.token_ids, done.header.request_id

    before = completed(server)
    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(call, range(3))
    assert others == [first, first]
    assert call(0) == first  # without a seed: nothing but a replay could say the same
    assert completed(server) - before == 1
    with pytest.raises(InvalidRequestError, match="another call") as caught:
        client.generate("other", request_id="once")
    assert caught.value.code == "REQUEST_ID_REUSED"


def completed(server: Stage) -> float:
    """Generations that ended well, as the metrics page has it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as reply:
        page = reply.read().decode()
    rows = re.findall(r'^loraplex_requests_total\{outcome="completed",.*\} (\S+)$', page, re.MULTILINE)
    return sum(map(float, rows))


def test_tokens_are_those_that_generate_sees_and_vectors_are_refused(client: Client) -> None:
    chat = [ChatMessage("user", "copy: cat")]
    tokens = client.tokenize(chat)
    assert tokens.context_tokens == 128
    usage = client.generate(chat, sampling=Sampling(max_tokens=1)).usage
    assert len(tokens.ids) == usage.prompt_tokens
    with pytest.raises(UnsupportedByBaseError) as caught:
        client.embed("x")
    assert caught.value.code == "UNSUPPORTED_BY_BASE"


def test_the_openai_client_gets_choices_schemas_and_log_probabilities(server: Stage) -> None:
    http = openai.OpenAI(base_url=f"http://127.0.0.1:{server.http_port}/v1", api_key="none", timeout=60)
    said = [{"role": "user", "content": "order 3 lamps"}]
    described = {"type": "json_schema", "json_schema": {"name": "state", "strict": True, "schema": SCHEMA}}
    done = http.chat.completions.create(  # type: ignore[call-overload]
        model="acme/good", messages=said, max_tokens=90, seed=1, n=2, response_format=described,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert [choice.index for choice in done.choices] == [0, 1]
    for choice in done.choices:
        assert json.loads(choice.message.content).keys() == {"done", "size"}
        assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in choice.logprobs.content)
    stream = http.chat.completions.create(  # type: ignore[call-overload]
        model="acme/good", messages=said, max_tokens=90, seed=1, n=2, response_format=described, stream=True
    )
    texts = {0: "", 1: ""}
    for piece in stream:
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in done.choices]
