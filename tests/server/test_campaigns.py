"""The server's campaigns in short; the long forms are in tests/reliability."""

import random

from tests.server.campaigns.crossing import crossing
from tests.server.campaigns.endings import endings
from tests.server.campaigns.hostile import hostile_messages
from tests.server.conftest import Shop


def new_seed() -> int:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return seed


async def test_no_reply_crosses_while_tenants_share_few_slots(shop: Shop) -> None:
    found = await crossing(shop, tenants=12, replies=150, seed=new_seed())
    assert (found.replies, found.crossed, dict(found.errors)) == (150, 0, {})
    assert found.loads > 12, "adapters must have been brought in again"


async def test_calls_that_end_anyhow_are_counted_once_and_leave_nothing(shop: Shop) -> None:
    found = await endings(shop, calls=200, seed=new_seed())
    assert found.outcomes["completed"] > 0
    assert sum(found.outcomes.values()) <= found.calls
    assert set(found.left_behind.values()) == {0}, found.left_behind


async def test_hostile_messages_are_refused_by_name(shop: Shop) -> None:
    statuses = await hostile_messages(shop, count=400, seed=new_seed())
    assert statuses["INTERNAL"] == statuses["UNKNOWN"] == 0, statuses
    assert statuses["INVALID_ARGUMENT"] > 0
