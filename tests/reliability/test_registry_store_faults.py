"""Storages that fail, at length: 20,000 operations on S3 through the fault proxy, and 2,000 disks after a power cut."""

from pathlib import Path

import pytest

from loraplex_examples.s3_server import S3Server
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.probe import probe
from tests.registry import faults, odd_stores, power_cuts, races
from tests.registry.conftest import make_store
from tests.registry.sure_store import SureStore
from tests.sim import s3_proxy
from tests.sim.s3_proxy import S3Proxy

pytestmark = pytest.mark.reliability

BAD_STORES = (
    odd_stores.IgnoresCreate, odd_stores.IgnoresSwap, odd_stores.IgnoresBoth, odd_stores.SwapMakes,
    odd_stores.TwoCreate, odd_stores.TwoSwap,
)  # fmt: skip


def test_registry_answers_under_faults(s3: S3Server, bucket: str, tmp_path: Path, seed: int, figure) -> None:  # type: ignore[no-untyped-def]
    port = int(s3.endpoint_url.rpartition(":")[2])
    tally = faults.campaign(
        f"{bucket}/faults-{seed}", port, tmp_path, operations=20_000, rate=0.05, seed=seed, workers=4
    )
    print(dict(tally.faults), dict(tally.kinds), tally.wrong[:10])
    figure(
        "S3 operations at 5% faults, right answers",
        tally.right,
        "= 20000",
        tally.right == tally.operations == 20_000,
    )
    figure("of these, wrong", len(tally.wrong), "= 0", not tally.wrong)
    figure("of these, an honest unknown (reading back refused)", tally.unknown, "<= 60", tally.unknown <= 60)
    figure("faults injected", sum(tally.faults.values()), ">= 900", sum(tally.faults.values()) >= 900)
    figure(
        "kinds of faults", len(tally.faults), f"= {len(s3_proxy.ALL)}", set(tally.faults) == set(s3_proxy.ALL)
    )
    figure(
        "most attempts of one request", tally.attempts_max, "<= 5", tally.attempts_max <= faults.ATTEMPTS_MAX
    )


@pytest.mark.parametrize("kind", races.KINDS)
def test_registry_races_under_faults(  # type: ignore[no-untyped-def]
    kind: str, request: pytest.FixtureRequest, proxy: S3Proxy, tmp_path: Path, seed: int, figure
) -> None:
    """Racers whose replies are lost: never two winners, and the object is always one that was written."""
    kinds = tuple(one for one in s3_proxy.ALL if one != s3_proxy.ERROR_403)
    store = SureStore(make_store(request, "s3", tmp_path, endpoint_url=proxy.url))
    proxy.use(s3_proxy.seeded(seed, 0.05, kinds))
    try:
        tally = races.in_threads(store.store, writers=16, rounds=100, kind=kind, surely=True)
    finally:
        proxy.use(s3_proxy.script())
    two = sum(count for winners, count in tally.winners.items() if winners > 1)
    print(tally.winners, tally.wrong[:5])
    figure(f"{kind} races at 5% faults, rounds with two winners", two, "= 0", two == 0)
    figure(f"{kind} races at 5% faults, rounds with one", tally.winners[1], "= 100", tally.winners[1] == 100)


def test_registry_probe_refuses(seed: int, figure) -> None:  # type: ignore[no-untyped-def]
    runs = [kind for kind in BAD_STORES for _ in range(10)]
    refused = sum(not probe(kind()).passed for kind in runs)
    figure("storages that ignore a condition, refused", refused, f"= {len(runs)}", refused == len(runs))
    passed = sum(probe(MemoryStore()).passed for _ in range(20))
    figure("storages that keep them, passed", passed, "= 20", passed == 20)


def test_registry_power_cuts(tmp_path: Path, seed: int, figure) -> None:  # type: ignore[no-untyped-def]
    tally = power_cuts.campaign(tmp_path, states=2_000, seed=seed)
    print(tally.wrong[:10])
    figure("disks after a power cut", tally.states, ">= 2000", tally.states >= 2_000)
    figure("of these, with a loss or half a write", len(tally.wrong), "= 0", not tally.wrong)
