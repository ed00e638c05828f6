"""The probe passes storages that keep their promises, and names the promise of those that do not."""

import argparse
import datetime as dt
import io
import random
import re
from pathlib import Path

import pytest

from loraplex_registry.commands import doctor
from loraplex_registry.commands.session import Session
from loraplex_registry.errors import (
    DamagedError,
    InvalidReferenceError,
    StoreRefusedError,
    StoreUnavailableError,
)
from loraplex_registry.format import layout
from loraplex_registry.settings import Settings
from loraplex_registry.storage.disk import file_system, is_network_file_system
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.probe import CREATE, SWAP, probe
from loraplex_registry.storage.root_marker import examine, read_marker, require_writable
from loraplex_registry.storage.store import Store, open_store
from tests.registry import odd_stores
from tests.registry.s3_script import fault, scripted
from tests.sim import s3_proxy
from tests.sim.s3_proxy import S3Proxy

NOW = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC)
SEEDS = range(2)


def short(store: Store, seed: int = 1) -> object:
    return examine(store, now=NOW, rng=random.Random(seed), writers=32, rounds=2)


def test_a_good_storage_passes_and_nothing_stays_behind(store: Store) -> None:
    report = probe(store, rounds=2, rng=random.Random(1))
    assert report.passed, report.failures
    assert all(check.ok for check in report.checks), report.checks
    assert list(store.blobs("")) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kind", "failed", "named"),
    [
        (odd_stores.IgnoresCreate, {"create-race", "create-existing"}, CREATE),
        (odd_stores.IgnoresSwap, {"swap-race", "swap-stale", "swap-missing"}, SWAP),
        (
            odd_stores.IgnoresBoth,
            {"create-race", "create-existing", "swap-race", "swap-stale", "swap-missing"},
            CREATE,
        ),
        (odd_stores.SwapMakes, {"swap-missing"}, SWAP),
        (odd_stores.TwoCreate, {"create-race"}, CREATE),
        (odd_stores.TwoSwap, {"swap-race"}, SWAP),
        (odd_stores.StaleReads, {"read-after-write"}, "a read sees every earlier write"),
        (odd_stores.StaleLists, {"list-after-write"}, "a listing shows every earlier write"),
        (odd_stores.AlwaysChanged, {"conditional-read"}, "304"),
        (odd_stores.NeverChanged, {"conditional-read"}, "304"),
    ],
)
def test_a_storage_that_breaks_a_promise_is_refused_with_its_name(
    kind: type[MemoryStore], failed: set[str], named: str, seed: int
) -> None:
    store = kind()
    short(store, seed)
    marker = read_marker(store)
    assert marker is not None
    assert marker.report is not None
    assert failed <= {check.name for check in marker.report.failures}
    if kind is not odd_stores.StaleReads:
        assert {check.name for check in marker.report.failures} == failed
    with pytest.raises(StoreRefusedError) as caught:
        require_writable(store)
    assert named in caught.value.message or kind is odd_stores.StaleReads
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("kind", "name"), [(odd_stores.WrongClock, "clock"), (odd_stores.CannotDelete, "delete")]
)
def test_what_only_garbage_collection_needs_is_a_warning(kind: type[MemoryStore], name: str) -> None:
    store = kind()
    report = probe(store, writers=2, rounds=1)
    assert report.passed
    assert [check.name for check in report.checks if not check.ok] == [name]


def test_lost_replies_do_not_fail_a_good_storage(proxy: S3Proxy, bucket: str) -> None:
    kinds = tuple(kind for kind in s3_proxy.TRANSIENT if kind != s3_proxy.ERROR_409)
    proxy.use(s3_proxy.seeded(5, 0.03, kinds))
    try:
        store = open_store(f"{bucket}/probe/through-faults", endpoint_url=proxy.url)
        assert probe(store, rounds=2, rng=random.Random(1)).passed
    finally:
        proxy.use(s3_proxy.script())
    assert list(store.blobs("")) == []


def test_a_storage_that_is_down_is_not_called_bad() -> None:
    with scripted(fault(503, "SlowDown")) as script, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "x")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        with pytest.raises(StoreUnavailableError):
            probe(open_store("s3://b/x", endpoint_url=script.url, region="us-east-1"), writers=2, rounds=1)


def test_two_winners_of_many_are_counted() -> None:
    """One winner too many is enough, whichever of the two wrote last."""
    details = {check.name: check.detail for check in probe(odd_stores.TwoSwap(), rounds=8).checks}
    found = re.search(r"(\d+) of 32 writers won", details["swap-race"])
    assert found is not None
    assert 2 <= int(found[1]) < 32


# The marker


def test_a_bucket_must_have_been_probed_and_a_directory_need_not(store: Store) -> None:
    if store.url.startswith("s3:"):
        with pytest.raises(StoreRefusedError, match="never probed"):
            require_writable(store)
    else:
        require_writable(store)
    short(store)
    require_writable(store)


def test_the_marker_says_when_and_what(local: Store) -> None:
    assert read_marker(local) is None
    examination = examine(local, now=NOW, rng=random.Random(1), writers=4, rounds=1)
    assert examination.written
    marker = read_marker(local)
    assert marker is not None
    assert marker.report == examination.report
    assert marker.at == "2026-06-01T12:00:00Z"


def test_the_marker_is_left_alone_while_the_verdicts_stand(local: Store) -> None:
    first = examine(local, now=NOW, writers=4, rounds=1)
    again = examine(local, now=NOW + dt.timedelta(days=1), writers=8, rounds=1)
    assert (first.written, again.written) == (True, False)
    assert again.before is not None
    assert again.before.at == "2026-06-01T12:00:00Z"


def test_a_storage_that_was_mended_may_be_written_to_again() -> None:
    bad = odd_stores.IgnoresBoth()
    short(bad)
    good = MemoryStore()
    good._objects, good._keys = bad._objects, bad._keys
    with pytest.raises(StoreRefusedError):
        require_writable(good)
    assert examine(good, now=NOW, writers=4, rounds=1).written
    require_writable(good)


def test_a_plain_marker_gets_its_probe(local: Store) -> None:
    local.create(layout.FORMAT_KEY, b'{"fmt":1}')
    require_writable(local)
    examine(local, now=NOW, writers=4, rounds=1)
    marker = read_marker(local)
    assert marker is not None
    assert marker.report is not None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"fmt":2}',
        b'{"fmt":true}',
        b'{"fmt":1,"more":1}',
        b'{"fmt":1,"probe":{}}',
        b'{"fmt":1,"probe":{"passed":true,"at":"x","checks":[{"name":"a","ok":false,"required":true,"detail":"d"}]}}',
        b'{"fmt":1,"probe":{"passed":true,"at":"x","checks":[{"name":"a","ok":1,"required":true,"detail":"d"}]}}',
        b'{"fmt":1,"probe":{"passed":true,"at":1,"checks":[]}}',
    ],
)
def test_a_damaged_marker_is_not_taken_for_a_good_one(body: bytes, local: Store) -> None:
    local.create(layout.FORMAT_KEY, body)
    with pytest.raises(DamagedError):
        require_writable(local)


# The command


def session(store_url: str, **options: int) -> Session:
    arguments = argparse.Namespace(**{"command": "doctor", "writers": 8, "rounds": 1, **options})
    return Session(
        arguments=arguments, settings=Settings(registry=store_url), environment={}, stderr=io.StringIO()
    )


def test_the_command_reports_every_check(local: Store) -> None:
    result, lines = doctor.run(session(local.url))
    assert result["passed"] is True
    assert {check["name"] for check in result["checks"]} >= {
        "create-race",
        "swap-race",
        "delete",
        "file-system",
    }
    assert len(lines) == len(result["checks"]) + 1
    assert all(line.startswith("ok") for line in lines[:-1])
    assert doctor.run(session(local.url))[0]["changed"] is False


def test_the_command_fails_where_a_condition_is_ignored() -> None:
    store = odd_stores.IgnoresCreate("ignores-create")
    MemoryStore._named["ignores-create"] = store
    run = session("memory:ignores-create")
    with pytest.raises(StoreRefusedError, match="If-None-Match"):
        doctor.run(run)
    assert "FAIL  create-race" in run.stderr.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{"writers": 1}, {"writers": 257}, {"rounds": 0}, {"rounds": 1001}])
def test_the_command_refuses_impossible_sizes(options: dict[str, int], local: Store) -> None:
    with pytest.raises(InvalidReferenceError):
        doctor.run(session(local.url, **options))


# File systems


def test_network_file_systems_are_known_by_name() -> None:
    for kind in ("nfs", "nfs4", "cifs", "fuse", "fuse.sshfs", "9p", "ceph"):
        assert is_network_file_system(kind)
    for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "unknown"):
        assert not is_network_file_system(kind)


def test_the_file_system_of_a_path_is_that_of_its_nearest_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"23 22 0:40 / {tmp_path}/with\\040space rw shared:1 - fuse.sshfs host: rw\n"
        f"24 22 0:41 / {tmp_path}/n rw - nfs4 host:/ rw\n"
        "garbage\n"
    )
    monkeypatch.setattr("loraplex_registry.storage.disk._MOUNTINFO", table)
    assert file_system(tmp_path / "with space/x") == "fuse.sshfs"
    assert file_system(tmp_path / "n") == "nfs4"
    assert file_system(tmp_path / "nn") == "ext4"
    monkeypatch.setattr("loraplex_registry.storage.disk._MOUNTINFO", tmp_path / "none")
    assert file_system(tmp_path) == "unknown"
