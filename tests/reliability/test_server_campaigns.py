"""The server under many tenants, bad endings, hostile messages and greedy neighbours (deterministic engine)."""

import signal
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.campaigns.crossing import crossing
from tests.server.campaigns.drills import ADAPTERS, drill
from tests.server.campaigns.endings import endings
from tests.server.campaigns.hostile import hostile_messages
from tests.server.campaigns.leaks import leaks
from tests.server.campaigns.load import Account, held_load, overload, p99
from tests.server.campaigns.neighbours import neighbours
from tests.server.campaigns.rolls import rolls
from tests.server.campaigns.scrape import scraped
from tests.server.campaigns.stalled import stalled_readers
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
    figure("the page accounts for every call", int(found.accounted), "= 1", found.accounted)


async def test_server_endings_leave_nothing(shop: Shop, figure: Figure, seed: int) -> None:
    found = await endings(shop, calls=10_000, seed=seed)
    counts = found.outcomes
    figure("calls cancelled", int(counts["cancelled"]), ">= 1000", counts["cancelled"] >= 1000)
    figure("calls expired", int(counts["expired"]), ">= 1000", counts["expired"] >= 1000)
    figure("calls completed", int(counts["completed"]), ">= 1000", counts["completed"] >= 1000)
    left = sum(found.left_behind.values())
    figure("places, turns, leases, pins, slots, tasks left", left, "= 0", left == 0)
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


async def test_server_held_load(shop: Shop, figure: Figure) -> None:
    found = await held_load(shop, streams=64, seconds=60)
    figure("streams of a held load, 64 at once, 60 s", found.sent, ">= 6000", found.sent >= 6000)
    figure("of these, in error", sum(found.errors.values()), "= 0", not found.errors)
    growth = round(found.rss_late / found.rss_early, 3)
    figure("memory at its end / after 6 s", growth, "<= 1.05", growth <= 1.05)
    _account(figure, "held load", found)


async def test_server_overload(shop: Shop, figure: Figure) -> None:
    found = await overload(shop, seconds=20, factor=5, calls=20)
    goodput = round(found.overload_per_s / found.peak_per_s, 3)
    figure("goodput at 5 times the capacity / peak", goodput, ">= 0.9", goodput >= 0.9)
    refused = round(p99(found.refused_s), 3)
    figure("p99 of a refusal, s", refused, "<= 0.1", refused <= 0.1)
    unexplained = found.without_delay + sum(found.errors.values()) - found.errors["QUEUE_FULL"]
    figure("refusals without reason or delay", unexplained, "= 0", unexplained == 0)
    back = round(statistics.median(found.after_s) / statistics.median(found.before_s), 2)
    figure("latency in the 2 s after it / before", back, "<= 1.2", back <= 1.2)
    _account(figure, "overload", found)


def _account(figure: Figure, name: str, found: Account) -> None:
    """The page's sum: completed, failed, cancelled and expired are all that was sent, and nothing is in flight."""
    ended = sum(found.outcomes.values())
    figure(f"{name}: outcomes on the page", ended, f"= {found.sent} sent", found.closes())


async def test_server_stalled_readers(shop: Shop, figure: Figure) -> None:
    found = await stalled_readers(shop, readers=32, calls=200)
    figure("readers that stopped reading", found.held, "= 32", found.held == 32)
    figure("another tenant's calls that expired", found.expired, "= 0", found.expired == 0)
    each = round(found.bytes_each / 1024)
    figure("memory held for each, KiB", each, "<= 1024", each <= 1024)
    ratio = round(found.beside_s / found.alone_s, 2)
    figure("p99 of another tenant, beside / alone", ratio, "<= 1.5", ratio <= 1.5)
    left = int(sum(found.left.values()))
    figure("calls left when they hung up", left, "= 0", left == 0)
    figure("the page accounts for every call", int(found.accounted), "= 1", found.accounted)


async def test_server_sigterm(shop: Shop, figure: Figure, seed: int) -> None:
    found = await drill(shop, signal.SIGTERM, cycles=50, seed=seed)
    figure("SIGTERMs under load", found.cycles, "= 50", found.cycles == 50)
    figure("calls completed", found.completed, ">= 1000", found.completed >= 1000)
    unserved = abs(sum(found.served.values()) - found.completed) + found.broken + found.wrong
    figure("accepted calls that were lost", unserved, "= 0", unserved == 0 and set(found.served) == {"OK"})
    others = sum(found.refused.values()) - found.refused["UnavailableError"]
    figure("refused other than UNAVAILABLE", others, "= 0", others == 0)
    bad = sum(found.exits.values()) - found.exits[0]
    figure("exit statuses other than 0", bad, "= 0", bad == 0)
    slowest = round(max(found.end_s), 2)
    figure("longest end, s", slowest, "<= 21", slowest <= 21)


async def test_server_sigkill(shop: Shop, figure: Figure, seed: int) -> None:
    found = await drill(shop, signal.SIGKILL, cycles=50, seed=seed)
    figure("SIGKILLs under load", found.cycles, "= 50", found.cycles == 50)
    others = sum(found.refused.values()) - found.refused["UnavailableError"] + found.wrong
    figure("callers told other than UNAVAILABLE", others, "= 0", others == 0)
    slowest = round(max(found.error_s), 3)
    figure("longest time to know, s", slowest, "<= 1", slowest <= 1)
    figure(
        "adapters served right afterwards", found.right_after, f"= {ADAPTERS}", found.right_after == ADAPTERS
    )
    figure("downloads left half-done after a new start", found.left_on_disk, "= 0", found.left_on_disk == 0)


async def test_server_rolls(shop: Shop, figure: Figure, seed: int) -> None:
    found = await rolls(shop, count=100, pause_s=0.1, seed=seed)
    figure("rolls of a tag under load", found.rolls, "= 100", found.rolls == 100)
    figure("replies", found.replies, ">= 500", found.replies >= 500)
    failed = sum(found.errors.values()) + found.wrong
    figure("failed or wrong", failed, "= 0", failed == 0)
    figure("that name a version not tagged then", found.untagged, "= 0", found.untagged == 0)
    figure("the page accounts for every call", int(found.accounted), "= 1", found.accounted)


async def test_server_leaks(shop: Shop, figure: Figure) -> None:
    found = await leaks(shop, requests=10_000, loads=2_000)
    figure("loads, beside 10,000 requests", found.loads, "= 2000", found.loads == 2000)
    figure("descriptors more", found.descriptors, "<= 2", found.descriptors <= 2)
    figure("tasks and threads more", found.tasks + found.threads, "<= 0", found.tasks + found.threads <= 0)
    figure("sealed adapters more", found.sealed_files, "= 0", found.sealed_files == 0)
    growth = round(found.rss_ratio, 3)
    figure("memory afterwards / before", growth, "<= 1.05", growth <= 1.05)


def test_server_scrape_is_flat(figure: Figure) -> None:
    pages = [scraped(adapters) for adapters in (10, 100, 1000, 10_000)]
    print({page.adapters: page.size_bytes for page in pages})
    ratio = round(max(page.size_bytes for page in pages) / pages[0].size_bytes, 3)
    figure(
        "metrics page, 10 adapters, bytes", pages[0].size_bytes, "<= 200000", pages[0].size_bytes <= 200_000
    )
    figure("longest of 100 to 10,000 adapters / 10", ratio, "<= 1.1", ratio <= 1.1)
    exact = sum(page.exact for page in pages)
    figure("pages whose sums are exact", exact, f"= {len(pages)}", exact == len(pages))
