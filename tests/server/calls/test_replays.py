"""Two calls with one request id are one generation."""

import asyncio
import sys
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_client import (
    AsyncClient,
    Completion,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    RequestIdReusedError,
    Sampling,
    UnavailableError,
)
from loraplex_server.calls import replays
from loraplex_server.calls.events import Event, Piece
from loraplex_server.calls.replays import _bytes, _Telling
from loraplex_server.engine.protocol import Candidate, EngineChunk, TokenLogprobs
from loraplex_server.identity.api_keys import make_key
from tests.server.conftest import Shop
from tests.server.ports.test_http_api import HTTP, asking
from tests.server.rig import Rig, running, until

TEN = Sampling(max_tokens=10)


def repeated(rig: Rig) -> dict[str, float]:
    """Calls that came with the id of another, by what became of them."""
    return {
        sample.labels["result"]: sample.value
        for metric in rig.counts.collect()
        for sample in metric.samples
        if sample.name == "loraplex_requests_repeated_total"
    }


async def once(client: AsyncClient, **changes: Any) -> Completion:
    return await client.generate("x", **{"sampling": TEN, "request_id": "one", **changes})


async def test_a_second_call_joins_the_first_and_a_third_is_told_again(shop: Shop) -> None:
    async with running(shop) as rig, rig.client() as client:
        rig.engine.step_s = 0.005
        first = asyncio.create_task(once(client))
        await until(lambda: rig.engine.running == 1)
        stream = client.stream("x", sampling=TEN, request_id="one")
        deltas = [delta async for delta in stream]
        assert len(deltas) == 10, "from the beginning"
        again = await once(client)
        assert await first == stream.completion == again
        assert again.header.request_id == "one"
        assert len(rig.engine.requests) == 1
        assert rig.outcomes()["completed"] == 1
        assert repeated(rig) == {"joined": 1, "replayed": 1}


async def test_the_generation_goes_on_while_anybody_listens_and_ends_with_the_last(shop: Shop) -> None:
    async with running(shop) as rig, rig.client() as client, rig.client() as other:
        rig.engine.may_go_on.clear()
        calls = [asyncio.create_task(once(client))]
        await until(lambda: rig.engine.running == 1)  # it began the generation, not one of the others
        calls += [asyncio.create_task(once(other)) for _ in range(2)]
        await until(lambda: repeated(rig).get("joined") == 2)
        calls[0].cancel()
        calls[1].cancel()
        await until(lambda: rig.app._gate.backend.scheduler.held == 2)  # the generation, and who joined it
        assert rig.engine.running == 1
        rig.engine.may_go_on.set()
        assert (await calls[2]).usage.completion_tokens == 10
        rig.engine.may_go_on.clear()
        calls = [asyncio.create_task(once(each, request_id="two")) for each in (client, other)]
        await until(lambda: repeated(rig).get("joined") == 3)
        for call in calls:
            call.cancel()
        await until(lambda: rig.engine.running == 0 and rig.app._gate.backend.scheduler.held == 0)
        assert rig.outcomes() == {"completed": 1, "failed": 0, "cancelled": 1, "expired": 0}
        rig.engine.may_go_on.set()
        assert (await once(client, request_id="two")).usage.completion_tokens == 10, (
            "what was cancelled is forgotten"
        )


async def test_one_id_for_other_content_is_refused_and_ids_are_each_callers_own(shop: Shop) -> None:
    acme, acme_entry = make_key("app", "acme")
    batch, batch_entry = make_key("batch", "acme")
    async with (
        running(shop, keys=acme_entry + batch_entry) as rig,
        rig.client(acme) as client,
        rig.client(batch) as other,
    ):
        await once(client)
        for changes in ({"sampling": Sampling(max_tokens=9)}, {"priority": 1}):
            with pytest.raises(RequestIdReusedError, match="another call") as caught:
                await once(client, **changes)
            assert caught.value.code == "REQUEST_ID_REUSED"
        await once(other, sampling=Sampling(max_tokens=9))
        assert len(rig.engine.requests) == 2
        assert repeated(rig) == {"refused": 2}
        with pytest.raises(InvalidRequestError) as wrong:
            await once(client, request_id="a b")
        assert wrong.value.fields[0][0] == "request_id"


async def test_what_failed_is_not_remembered(shop: Shop) -> None:
    async with running(shop) as rig, rig.client() as client:
        rig.engine.may_go_on.clear()
        calls = [asyncio.create_task(once(client)) for _ in range(2)]
        await until(lambda: repeated(rig).get("joined") == 1)
        rig.engine.dead = True
        rig.engine.may_go_on.set()
        for call in calls:
            with pytest.raises(UnavailableError, match="dead on order"):
                await call
        rig.engine.dead = False
        assert (await once(client)).usage.completion_tokens == 10
        assert rig.outcomes() == {"completed": 1, "failed": 1, "cancelled": 0, "expired": 0}


async def test_answers_are_told_again_for_their_time_only(shop: Shop) -> None:
    async with running(shop, server={"replay_s": 0.2}) as rig, rig.client() as client:
        first = await once(client)
        assert await once(client) == first
        known = rig.app._ports._replays
        await until(lambda: not known._complete)
        assert known._complete_bytes == 0
        await once(client)
        assert len(rig.engine.requests) == 2
    async with running(shop, server={"replay_s": 0}) as rig, rig.client() as client:
        await once(client)
        await once(client)
        assert len(rig.engine.requests) == 2


async def test_kept_answers_have_a_bound_and_the_oldest_goes_first(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "ANSWERS_MAX", 3)
    async with running(shop) as rig, rig.client() as client:
        for number in range(5):
            await once(client, request_id=f"r{number}")
        assert [key[1] for key in rig.app._ports._replays._complete] == ["r2", "r3", "r4"]
        monkeypatch.setattr(replays, "KEPT_BYTES_MAX", 1)
        await once(client, request_id="r5")
        assert not rig.app._ports._replays._complete
        assert rig.app._ports._replays._complete_bytes == 0


async def test_who_joins_is_held_by_the_quotas_and_has_its_own_deadline(shop: Shop) -> None:
    async with running(shop, limits={"tenant_requests_max": 2}) as rig, rig.client() as client:
        rig.engine.may_go_on.clear()
        first = asyncio.create_task(once(client))
        await until(lambda: rig.engine.running == 1)
        with pytest.raises(DeadlineExceededError):
            await once(client, timeout_s=0.1)
        second = asyncio.create_task(once(client))
        await until(lambda: repeated(rig)["joined"] == 2)
        with pytest.raises(OverloadedError):
            await once(client)
        rig.engine.may_go_on.set()
        assert await first == await second


async def test_an_answer_too_long_to_keep_is_told_to_its_first_caller_and_to_nobody_else(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "ANSWER_BYTES_MAX", 2000)
    async with running(shop) as rig, rig.client() as client:
        rig.engine.step_s = 0.01
        async with client.stream("x", sampling=Sampling(max_tokens=40), request_id="one") as stream:
            count = 0
            async for _ in stream:
                count += 1
                if count == 10:
                    with pytest.raises(RequestIdReusedError, match="too long"):
                        await once(client, sampling=Sampling(max_tokens=40))
        assert count == 40
        assert not rig.app._ports._replays._complete


async def test_over_http_a_header_makes_calls_one_and_both_ports_know_the_same_ids(shop: Shop) -> None:
    async with running(shop, **HTTP) as rig, asking(rig) as http, rig.client() as client:

        async def call(key: str, **changes: Any) -> Any:
            headers = {"Idempotency-Key": key}
            return await http.completions.create(
                **{"model": "sim", "prompt": "x", "max_tokens": 10, "extra_headers": headers, **changes}
            )

        first, again = await call('"one"'), await call("one")
        assert (first.id, first.choices) == (again.id, again.choices)
        assert first.id == "cmpl-one"
        streamed = [piece async for piece in await call("one", stream=True)]
        assert "".join(piece.choices[0].text for piece in streamed) == first.choices[0].text
        assert (await once(client)).text == first.choices[0].text
        assert len(rig.engine.requests) == 1
        with pytest.raises(openai.UnprocessableEntityError) as reused:
            await call("one", max_tokens=9)
        assert reused.value.code == "REQUEST_ID_REUSED"
        with pytest.raises(openai.BadRequestError):
            await call("not an id")


def piece(text: str, logprobs: int) -> Piece:
    top = tuple(Candidate(1, text, -1.0) for _ in range(logprobs))
    return Piece(0, EngineChunk(text, (1,), 0, None, (TokenLogprobs(text, -1.0, top),) if logprobs else ()))


@given(
    sizes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3)), max_size=40),
    slowness=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    bound=st.integers(600, 20_000),
)
@settings(deadline=None, max_examples=60)
def test_every_reader_is_told_everything_in_order_and_memory_stays_bounded(
    sizes: list[tuple[int, int]], slowness: list[int], bound: int
) -> None:
    """Readers that take several turns of the loop for each event, and a generation that would rather be quick."""
    events: list[Event] = [piece("x" * size, logprobs) for size, logprobs in sizes]
    largest = max(map(_bytes, events), default=0)

    async def scenario() -> None:
        telling, told = _Telling(b""), [list[Event]() for _ in slowness]

        async def read(number: int) -> None:
            async def send(event: Event) -> None:
                for _ in range(slowness[number]):
                    await asyncio.sleep(0)
                told[number].append(event)
                assert telling.kept_bytes <= bound + largest

            await telling.listen(send)

        readers = [asyncio.create_task(read(number)) for number in range(len(slowness))]
        await asyncio.sleep(0)
        for event in events:
            await telling.tell(event)
        telling.end(None)
        await asyncio.gather(*readers)
        assert told == [events] * len(slowness)
        assert telling.whole == (sum(map(_bytes, events)) <= bound)
        assert telling.kept_bytes == sum(map(_bytes, telling._events))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replays, "ANSWER_BYTES_MAX", bound)
        asyncio.run(scenario())


@given(st.text(max_size=50), st.integers(0, 20))
def test_the_estimate_of_an_events_memory_is_not_below_what_python_needs(text: str, logprobs: int) -> None:
    event = piece(text, logprobs)
    parts: list[object] = [event, event.chunk, text, event.chunk.token_ids, event.chunk.logprobs, 70_000]
    for position in event.chunk.logprobs:
        parts += [position, text, position.logprob, position.top]
        for candidate in position.top:
            parts += [candidate, text, candidate.logprob, 70_000]
    assert sum(map(sys.getsizeof, parts)) <= _bytes(event)
