"""Outbox and beat: nothing is lost, joined right, and a slow reader holds up nobody."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_server.calls.events import Ended, Event, Piece, Started
from loraplex_server.calls.outbox import Outbox, pass_on
from loraplex_server.engine.beat import Beat
from loraplex_server.engine.protocol import EngineChunk

STARTED = Started(
    request_id="r", base_model="b", base_digest="", adapter="", adapter_digest="", adapter_was_resident=False
)
ENDED = Ended(
    finish_reasons=("stop",),
    prompt_tokens=1,
    completion_tokens=1,
    cached_tokens=0,
    adapter_s=0,
    first_token_s=0,
    total_s=0,
)


def piece(index: int, token: int, *, last: bool = False) -> Piece:
    return Piece(index, EngineChunk(f"{token} ", (token,), 3, "stop" if last else None))


def told(events: list[Event]) -> dict[int, tuple[str, tuple[int, ...], str | None]]:
    """Per completion: its whole text, its tokens, how it ended."""
    found: dict[int, tuple[str, tuple[int, ...], str | None]] = {}
    for event in events:
        if isinstance(event, Piece):
            text, ids, _ = found.get(event.index, ("", (), None))
            chunk = event.chunk
            found[event.index] = (text + chunk.text, ids + chunk.token_ids, chunk.finish_reason)
    return found


@given(st.lists(st.one_of(st.integers(0, 3), st.just("read")), max_size=60))
def test_every_token_comes_out_once_and_in_order_whenever_it_is_read(steps: list[int | str]) -> None:
    async def scenario() -> None:
        outbox, put, taken = Outbox(), [STARTED], []
        outbox.put(STARTED)
        for number, step in enumerate(steps):
            if step == "read":
                if put:
                    taken += await outbox.take()
                    put = []
            else:
                assert isinstance(step, int)
                put.append(piece(step, number))
                outbox.put(put[-1])
                sent.append(put[-1])
        outbox.put(ENDED)
        outbox.end()
        while events := await outbox.take():
            taken += events
        assert told(list(taken)) == told(sent)
        assert taken[0] is STARTED
        assert taken[-1] is ENDED

    sent: list[Event] = []
    asyncio.run(scenario())


async def test_pieces_of_one_completion_are_joined_until_somebody_takes_them() -> None:
    outbox = Outbox()
    for number in range(5):
        outbox.put(piece(0, number, last=number == 4))
        outbox.put(piece(1, 10 + number))
    first, second = await outbox.take()
    assert isinstance(first, Piece)
    assert first.chunk == EngineChunk("0 1 2 3 4 ", (0, 1, 2, 3, 4), 3, "stop")
    assert isinstance(second, Piece)
    assert second.chunk.token_ids == (10, 11, 12, 13, 14)


async def test_the_work_ends_while_the_reader_stands_still() -> None:
    outbox, done, go_on = Outbox(), asyncio.Event(), asyncio.Event()
    sent: list[Event] = []

    async def work() -> None:
        for number in range(1000):
            outbox.put(piece(0, number))
        done.set()

    async def send(event: Event) -> None:
        sent.append(event)
        await go_on.wait()

    passing = asyncio.create_task(pass_on(outbox, work(), send))
    await asyncio.wait_for(done.wait(), 5)
    assert not passing.done()
    go_on.set()
    await passing
    assert told(sent)[0][1] == tuple(range(1000))


async def test_what_was_said_before_the_work_failed_is_sent_before_the_error() -> None:
    outbox, sent = Outbox(), []

    async def work() -> None:
        outbox.put(piece(0, 1))
        raise LookupError("the engine")

    async def send(event: Event) -> None:
        sent.append(event)

    with pytest.raises(LookupError, match="the engine"):
        await pass_on(outbox, work(), send)
    assert told(sent)[0][1] == (1,)


@pytest.mark.parametrize("how", ["send fails", "cancelled"])
async def test_work_whose_caller_is_gone_has_ended_when_it_returns(how: str) -> None:
    outbox, state = Outbox(), []

    async def work() -> None:
        outbox.put(piece(0, 1))
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            state.append("ended")

    async def send(_event: Event) -> None:
        if how == "send fails":
            raise ConnectionError

    passing = asyncio.create_task(pass_on(outbox, work(), send))
    await asyncio.sleep(0.01)
    passing.cancel()
    with pytest.raises((ConnectionError, asyncio.CancelledError)):
        await passing
    assert state == ["ended"]


async def test_a_beat_comes_for_everybody_at_once_and_survives_who_leaves() -> None:
    beat, started = Beat(0.05), time.monotonic()
    moments: list[float] = []

    async def wait() -> None:
        await beat.next()
        moments.append(time.monotonic() - started)

    tasks = [asyncio.create_task(wait()) for _ in range(20)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.wait(tasks)
    assert len(moments) == 19
    assert max(moments) - min(moments) < 0.04
    assert min(moments) >= 0.045


async def test_without_an_interval_nobody_waits() -> None:
    await asyncio.wait_for(Beat(0).next(), 1)
