"""Several completions of one prompt, log-probabilities and forms of answers, over gRPC."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_client import (
    Candidate,
    ChatMessage,
    Grammar,
    InvalidRequestError,
    JsonSchema,
    OneOf,
    OverloadedError,
    Regex,
    Sampling,
    TokenIds,
    TokenLogprobs,
)
from loraplex_client._core import Collector
from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_server.engine.protocol import Form
from loraplex_server.identity.api_keys import make_key
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running, until
from tests.sim.engine import answer

PROMPT = TokenIds((1, 2))
DRAWN = Sampling(max_tokens=4, temperature=1.0, seed=7, n=3)


async def test_each_choice_draws_with_its_own_seed_and_deltas_say_whose_they_are(shop: Shop) -> None:
    published = shop.publish("acme/orders")
    name = f"acme/orders@{published.digest}"
    async with running(shop) as rig, rig.client() as client:
        rig.engine.step_s = 0.001
        stream = client.stream(PROMPT, adapter="acme/orders", sampling=DRAWN)
        deltas = [delta async for delta in stream]
        done = stream.completion
        wanted = [tuple(answer(name, (1, 2), n, 7 + index) for n in range(4)) for index in range(3)]
        assert [choice.token_ids for choice in done.choices] == wanted
        assert done.token_ids == wanted[0]
        assert [choice.finish_reason for choice in done.choices] == ["length"] * 3
        for index, choice in enumerate(done.choices):
            assert "".join(delta.text for delta in deltas if delta.index == index) == choice.text
        assert [delta.index for delta in deltas] != sorted(delta.index for delta in deltas), "side by side"
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, 12)
        assert rig.outcomes()["completed"] == 1
        alone = await client.generate(PROMPT, adapter="acme/orders", sampling=replace(DRAWN, seed=8, n=1))
        assert alone.token_ids == done.choices[1].token_ids


async def test_every_choice_counts_as_a_call_for_turns_quotas_and_tokens(shop: Shop) -> None:
    limits = {"tenant_requests_max": 3}
    async with running(shop, model={"batch_requests": 1}, limits=limits) as rig, rig.client() as client:
        with pytest.raises(OverloadedError) as caught:
            await client.generate(PROMPT, sampling=replace(DRAWN, n=4))
        assert caught.value.code == "TENANT_QUOTA"
        rig.engine.may_go_on.clear()
        call = asyncio.create_task(client.generate(PROMPT, sampling=DRAWN))
        await until(lambda: rig.engine.running == 3)  # one to decode, two more than that
        scheduler = rig.app._gate.backend.scheduler
        assert (scheduler.held, scheduler.running) == (3, 3)
        with pytest.raises(OverloadedError):
            await client.generate(PROMPT, sampling=FOUR)
        rig.engine.may_go_on.set()
        await call
        assert (scheduler.held, scheduler.running) == (0, 0)
        assert scheduler._queue._floor == 3 * (2 + 4), "prompt and answer of each"


async def test_more_choices_than_places_take_turns(shop: Shop) -> None:
    async with running(shop, model={"batch_requests": 1}) as rig, rig.client() as client:
        done = await client.generate(PROMPT, sampling=replace(DRAWN, n=16))
        assert len({choice.token_ids for choice in done.choices}) == 16
        assert len(rig.engine.requests) == 16


async def test_leaving_ends_every_choice_and_one_that_fails_ends_the_others(shop: Shop) -> None:
    async with running(shop) as rig, rig.client() as client:
        rig.engine.may_go_on.clear()
        async with client.stream(PROMPT, sampling=DRAWN):
            await until(lambda: rig.engine.running == 3)
        await until(lambda: rig.engine.running == 0 and rig.outcomes()["cancelled"] == 1)
        call = asyncio.create_task(client.generate(PROMPT, sampling=DRAWN))
        await until(lambda: rig.engine.running == 3)
        rig.engine.dead = True
        rig.engine.may_go_on.set()
        with pytest.raises(Exception, match="dead on order"):
            await call
        rig.engine.dead = False
        assert rig.engine.running == 0
        assert rig.outcomes()["failed"] == 1
        assert rig.app._gate.backend.scheduler.held == 0


async def test_log_probabilities_come_with_each_token(shop: Shop) -> None:
    async with running(shop) as rig, rig.client() as client:
        done = await client.generate(PROMPT, sampling=replace(FOUR, logprobs=2))
        choice = done.choices[0]
        assert choice.logprobs == tuple(
            TokenLogprobs(
                f"{token} ",
                -0.5,
                (
                    Candidate(token, f"{token} ", -0.5),
                    Candidate((token + 1) % 1000, f"{(token + 1) % 1000} ", -1.5),
                ),
            )
            for token in choice.token_ids
        )
        own = await client.generate(PROMPT, sampling=replace(FOUR, logprobs=0))
        assert [position.top for position in own.choices[0].logprobs] == [()] * 4
        assert (await client.generate(PROMPT, sampling=FOUR)).choices[0].logprobs == ()


async def test_forms_reach_the_engine_as_they_were_asked_for_once_they_passed_it(shop: Shop) -> None:
    key, entry = make_key("app", "acme")
    async with running(shop, keys=entry) as rig, rig.client(key) as client:
        texts = ("yes", "no", "maybe")
        sampling = Sampling(max_tokens=20, temperature=1.0, seed=1)
        said = {
            (await client.generate(PROMPT, sampling=replace(sampling, seed=seed, form=OneOf(texts)))).text
            for seed in range(12)
        }
        assert said == set(texts)
        done = await client.generate(PROMPT, sampling=replace(sampling, form=JsonSchema('{"type":"object"}')))
        assert (done.text, done.finish_reason) == ("{}", "stop")
        cut = await client.generate(PROMPT, sampling=Sampling(max_tokens=1, form=OneOf(("long",))))
        assert (cut.text, cut.finish_reason) == ("l", "length")
        for form, kind in ((Regex("a+"), "regex"), (Grammar('root ::= "a"'), "grammar")):
            with pytest.raises(InvalidRequestError) as caught:
                await client.generate(PROMPT, sampling=replace(sampling, form=form))
            assert caught.value.fields[0][0] == f"sampling.structured_output.{kind}"
        assert rig.engine.forms[-2:] == [
            ("acme", Form("regex", "a+")),
            ("acme", Form("grammar", 'root ::= "a"')),
        ]
        assert all(request.sampling.form != Form("regex", "a+") for request in rig.engine.requests)
        assert rig.engine.requests[0].sampling.form == Form("choice", choices=texts)


async def test_tokens_of_a_prompt_are_told_within_the_quotas(shop: Shop) -> None:
    async with running(shop, limits={"requests_max": 1}) as rig, rig.client() as client:
        assert (await client.tokenize("ab")).ids == (97, 98)
        tokens = await client.tokenize([ChatMessage("user", "ab")])
        assert (tokens.ids, tokens.context_tokens) == ((97, 98), 64)
        with pytest.raises(InvalidRequestError):
            await client.tokenize("")
        with rig.app._gate.backend.scheduler.hold("acme"), pytest.raises(OverloadedError):
            await client.tokenize("ab")
        assert sum(rig.outcomes().values()) == 0, "nothing was generated"


texts = st.lists(st.text(max_size=4), max_size=12)


@given(
    texts.flatmap(
        lambda parts: st.tuples(st.just(parts), st.lists(st.integers(0, 3), min_size=12, max_size=12))
    )
)
def test_concatenated_deltas_are_the_choices(drawn: tuple[list[str], list[int]]) -> None:
    """Whatever the order in which the choices' deltas arrive."""
    collector, told = Collector(), ["", "", "", ""]
    collector.read(gpb.GenerateResponse(header=gpb.GenerationHeader()))
    for number, (text, index) in enumerate(zip(*drawn, strict=False)):
        delta = gpb.GenerationDelta(text=text, token_ids=[number], index=index)
        seen = collector.read(gpb.GenerateResponse(delta=delta))
        assert seen is not None
        told[index] += seen.text
    end = gpb.GenerationEnd(finish_reason=1, finish_reasons=[1, 2, 1, 2])
    collector.read(gpb.GenerateResponse(end=end))
    choices = collector.result().choices
    assert [choice.text for choice in choices] == told
    assert [choice.finish_reason for choice in choices] == ["stop", "length"] * 2
    assert collector.result().text == told[0]


def test_the_end_of_a_server_that_knows_one_choice_is_read_too() -> None:
    collector = Collector()
    collector.read(gpb.GenerateResponse(header=gpb.GenerationHeader()))
    collector.read(gpb.GenerateResponse(delta=gpb.GenerationDelta(text="a", token_ids=[1])))
    collector.read(gpb.GenerateResponse(end=gpb.GenerationEnd(finish_reason=2)))
    assert [choice.finish_reason for choice in collector.result().choices] == ["length"]
