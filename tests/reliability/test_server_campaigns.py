"""The server under many tenants, bad endings, hostile messages and greedy neighbours (deterministic engine)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.campaigns.crossing import crossing
from tests.server.campaigns.endings import endings
from tests.server.campaigns.hostile import hostile_messages
from tests.server.campaigns.neighbours import neighbours
from tests.server.conftest import Shop

pytestmark = pytest.mark.reliability
Figure = Callable[..., None]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """A fresh registry."""
    return Shop(tmp_path)


async def test_server_replies_never_cross(shop: Shop, figure: Figure, seed: int) -> None:
    found = await crossing(shop, tenants=200, replies=10_000, seed=seed)
    figure("replies over 200 tenants and 4 slots", found.replies, "= 10000", found.replies == 10_000)
    figure("of these, with another adapter's tokens", found.crossed, "= 0", found.crossed == 0)
    figure("adapters brought in", found.loads, ">= 5000", found.loads >= 5000)


async def test_server_endings_leave_nothing(shop: Shop, figure: Figure, seed: int) -> None:
    found = await endings(shop, calls=6_000, seed=seed)
    counts = found.outcomes
    figure("calls cancelled", int(counts["cancelled"]), ">= 500", counts["cancelled"] >= 500)
    figure("calls expired", int(counts["expired"]), ">= 200", counts["expired"] >= 200)
    figure("calls completed", int(counts["completed"]), ">= 1000", counts["completed"] >= 1000)
    left = sum(found.left_behind.values())
    figure("places, turns, leases and requests left", left, "= 0", left == 0)
    grown = found.descriptors_grown
    figure("descriptors more than before", grown, "<= 20", grown <= 20)


async def test_server_hostile_messages(shop: Shop, figure: Figure, seed: int) -> None:
    statuses = await hostile_messages(shop, count=20_000, seed=seed)
    print(dict(statuses))
    figure("hostile messages answered", sum(statuses.values()), "= 20000", sum(statuses.values()) == 20_000)
    ours = statuses["INTERNAL"] + statuses["UNKNOWN"]
    figure("of these, INTERNAL or UNKNOWN", ours, "= 0", ours == 0)


async def test_server_polite_tenants_beside_a_greedy_one(shop: Shop, figure: Figure) -> None:
    found = await neighbours(shop, calls=300, factor=50)
    ratio = round(found.beside_s / found.alone_s, 2)
    figure("calls of the greedy tenant", found.flood_calls, ">= 100", found.flood_calls >= 100)
    figure("p99 of a polite tenant, beside / alone", ratio, "<= 2", ratio <= 2)
