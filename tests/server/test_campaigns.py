"""The server's campaigns in short; the long forms are in tests/reliability."""

import random
import signal

from tests.server.campaigns.crossing import crossing
from tests.server.campaigns.drills import ADAPTERS, drill
from tests.server.campaigns.endings import endings
from tests.server.campaigns.hostile import hostile_messages
from tests.server.campaigns.leaks import leaks
from tests.server.campaigns.load import held_load, overload
from tests.server.campaigns.rolls import rolls
from tests.server.campaigns.stalled import stalled_readers
from tests.server.conftest import Shop


def new_seed() -> int:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return seed


async def test_no_reply_crosses_while_tenants_share_few_slots(shop: Shop) -> None:
    found = await crossing(shop, tenants=12, replies=150, seed=new_seed())
    assert (found.replies, found.crossed, dict(found.errors)) == (150, 0, {})
    assert found.loads > 12, "adapters must have been brought in again"
    assert found.accounted


async def test_calls_that_end_anyhow_are_counted_once_and_leave_nothing(shop: Shop) -> None:
    found = await endings(shop, calls=200, seed=new_seed())
    assert found.outcomes["completed"] > 0
    assert sum(found.outcomes.values()) <= found.calls
    assert set(found.left_behind.values()) == {0}, found.left_behind


async def test_hostile_messages_are_refused_by_name(shop: Shop) -> None:
    statuses = await hostile_messages(shop, count=400, seed=new_seed())
    assert statuses["INTERNAL"] == statuses["UNKNOWN"] == 0, statuses
    assert statuses["INVALID_ARGUMENT"] > 0


async def test_a_held_load_is_answered_and_accounted_for(shop: Shop) -> None:
    found = await held_load(shop, streams=16, seconds=0.5)
    assert found.closes(), found
    assert found.completed == found.sent > 16
    assert not found.errors


async def test_an_overload_is_refused_by_name_and_passes(shop: Shop) -> None:
    found = await overload(shop, seconds=0.3, factor=5, calls=2)
    assert found.closes(), found
    assert set(found.errors) == {"QUEUE_FULL"}
    assert found.without_delay == 0, "a refusal says when to come again"
    assert len(found.after_s) == 2


async def test_sigterm_under_load_loses_nothing_that_was_accepted(shop: Shop) -> None:
    found = await drill(shop, signal.SIGTERM, cycles=1, seed=new_seed())
    assert (found.broken, found.wrong, dict(found.exits)) == (0, 0, {0: 1})
    assert found.served == {"OK": found.completed}
    assert set(found.refused) <= {"UnavailableError"}


async def test_sigkill_under_load_is_told_at_once_and_survived(shop: Shop) -> None:
    found = await drill(shop, signal.SIGKILL, cycles=1, seed=new_seed())
    assert (found.wrong, dict(found.exits)) == (0, {-9: 1})
    assert set(found.refused) <= {"UnavailableError"}
    assert (found.right_after, found.left_on_disk) == (ADAPTERS, 0)


async def test_a_moving_tag_fails_nobody_and_names_what_was_tagged(shop: Shop) -> None:
    found = await rolls(shop, count=8, pause_s=0.03, seed=new_seed())
    assert (found.untagged, found.wrong, dict(found.errors)) == (0, 0, {})
    assert len(found.seen) > 2, "the callers must have seen the tag move"
    assert found.accounted


async def test_readers_that_stop_reading_are_held_and_let_go(shop: Shop) -> None:
    found = await stalled_readers(shop, readers=24, calls=5)
    assert found.held == 24, "more than have a turn at the same time"
    assert found.expired == 0, "the neighbour is answered all the same"
    assert not any(found.left.values()), found.left
    assert found.accounted


async def test_nothing_grows_with_requests_and_loads(shop: Shop) -> None:
    found = await leaks(shop, requests=200, loads=30)
    assert found.loads == 30
    assert found.descriptors <= 2
    assert (found.tasks, found.threads, found.sealed_files) == (0, 0, 0)
