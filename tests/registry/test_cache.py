"""The cache on disk: what many processes may rely on."""

import errno
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_registry.cli import main
from loraplex_registry.delivery import cache as cache_module
from loraplex_registry.delivery.cache import Cache, Lease, default_cache_root
from loraplex_registry.errors import (
    DigestMismatchError,
    InvalidReferenceError,
    SettingsError,
    StoreUnavailableError,
)
from tests.registry.cache_campaigns import ROOT, body_of, digest_of, kill_campaign, maker, user

SIZE = 1000


def obtain(cache: Cache, number: int, size: int = SIZE) -> Lease:
    return cache.obtain(digest_of(number), size_bytes=size, make=maker(number, size))


def held(cache: Cache) -> list[int]:
    return [int(entry.digest[7:], 16) for entry in cache.entries()]


def forbidden(place: Path) -> Path:
    raise AssertionError("it is there already")


def test_an_entry_is_made_once_and_private(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "cache")
    with obtain(cache, 1) as lease:
        assert lease.fresh
        assert lease.path == cache.root / f"sha256-{1:064x}"
        assert lease.names() == ["data"]
    with cache.obtain(digest_of(1), size_bytes=SIZE, make=forbidden) as again:
        assert not again.fresh
        with again.open("data") as file:
            assert file.read() == body_of(1, SIZE)
    assert cache.root.stat().st_mode & 0o777 == 0o700
    assert again.path.stat().st_mode & 0o777 == 0o555
    assert [path.name for path in cache.root.iterdir()] == [again.path.name]


def test_the_least_recently_used_entries_go_first_and_leased_ones_never(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=3 * SIZE)
    for number in (1, 2, 3):
        obtain(cache, number).close()
    obtain(cache, 1).close()
    kept = obtain(cache, 2)
    obtain(cache, 4).close()
    assert sorted(held(cache)) == [1, 2, 4]
    assert [entry.digest for entry in cache.entries() if entry.leased] == [digest_of(2)]
    assert [entry.digest for entry in cache.prune(0)] == [digest_of(1), digest_of(4)]
    kept.close()
    kept.close()
    assert [entry.digest for entry in cache.prune(0)] == [digest_of(2)]
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(
    cap=st.integers(0, 6),
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.booleans()), max_size=25),
)
def test_after_every_step_the_total_is_within_the_cap_or_all_that_is_left_is_leased(
    cap: int, steps: list[tuple[int, int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law of the module, against a model of leases; each entry has one size."""
    cache = Cache(tmp_path_factory.mktemp("cache"), max_bytes=cap * 100)
    leases: dict[int, Lease] = {}
    sizes: dict[int, int] = {}
    for number, size, hold in steps:
        if number in leases:
            leases.pop(number).close()
        else:
            lease = obtain(cache, number, 100 * sizes.setdefault(number, size))
            if hold:
                leases[number] = lease
            else:
                lease.close()
        entries = cache.entries()
        there = {int(entry.digest[7:], 16) for entry in entries}
        assert set(leases) <= there
        total = sum(entry.size_bytes for entry in entries)
        assert total <= cap * 100 or there == set(leases)
    for lease in leases.values():
        lease.close()


def test_many_threads_that_want_one_digest_make_it_once(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    cache = Cache(tmp_path / "cache")
    bodies: list[bytes] = []

    def want() -> None:
        make = maker(7, SIZE, pause_s=0.05, made=tmp_path / "made")
        with cache.obtain(digest_of(7), size_bytes=SIZE, make=make) as lease, lease.open("data") as file:
            bodies.append(file.read())

    threads = [threading.Thread(target=want) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bodies == [body_of(7, SIZE)] * 12
    assert len(list((tmp_path / "made").iterdir())) == 1


def test_processes_share_a_cache_under_eviction(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(
            target=user,
            args=(str(tmp_path / "cache"), str(tmp_path / "made")),
            kwargs={"seed": seed, "numbers": 5, "size": SIZE, "rounds": 60, "cap": 3 * SIZE},
        )
        for seed in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    cache = Cache(tmp_path / "cache", max_bytes=3 * SIZE)
    assert sum(entry.size_bytes for entry in cache.entries()) <= 3 * SIZE


def test_a_lease_of_another_process_holds_until_that_process_dies(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    obtain(cache, 1).close()
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from loraplex_registry.delivery.cache import Cache\n"
        f"lease = Cache({str(tmp_path / 'cache')!r}).lease({digest_of(1)!r})\n"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert cache.prune(0) == []
        other.kill()
    assert [entry.digest for entry in cache.prune(0)] == [digest_of(1)]


def test_processes_killed_at_any_moment_leave_a_cache_that_works(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    found = kill_campaign(tmp_path, kills=8, seed=seed)
    assert found["temporaries left"] == 0
    assert found["bytes over the cap"] == 0
    assert found["entries checked"] > 0


def test_what_a_dead_process_left_in_a_download_is_not_taken_over(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    left = tmp_path / f".tmp-{1:064x}-{SIZE}" / "work"
    left.mkdir(parents=True)
    (left / "data").write_bytes(b"half")
    with obtain(cache, 1) as lease, lease.open("data") as file:
        assert file.read() == body_of(1, SIZE)
    stray = tmp_path / ".tmp-stray"
    stray.mkdir()
    assert cache.sweep() == 1
    assert not stray.exists()


def test_a_failed_download_leaves_nothing_and_its_error_is_passed_on(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def broken(place: Path) -> Path:
        (place / "half").write_bytes(b"x")
        raise DigestMismatchError("flipped")

    with pytest.raises(DigestMismatchError, match="flipped"):
        cache.obtain(digest_of(1), size_bytes=SIZE, make=broken)
    assert list(tmp_path.iterdir()) == []
    obtain(cache, 1).close()


def test_a_full_disk_evicts_what_is_idle_then_is_a_declared_error(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    room = {"errors": 1}

    def full(place: Path) -> Path:
        if room["errors"]:
            room["errors"] -= 1
            (place / "half").write_bytes(b"x")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return maker(2, SIZE)(place)

    obtain(cache, 1).close()
    cache.obtain(digest_of(2), size_bytes=SIZE, make=full).close()
    assert held(cache) == [2]
    room["errors"] = 2
    with pytest.raises(StoreUnavailableError, match="make room"):
        cache.obtain(digest_of(3), size_bytes=SIZE, make=full)
    assert [path.name for path in tmp_path.iterdir()] == []
    obtain(cache, 4).close()
    assert held(cache) == [4]


def test_waiting_for_somebody_elses_download_ends(tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(place: Path) -> Path:
        started.set()
        go_on.wait(10)
        return maker(1, SIZE)(place)

    worker = threading.Thread(
        target=lambda: Cache(tmp_path).obtain(digest_of(1), size_bytes=SIZE, make=slow).close()
    )
    worker.start()
    assert started.wait(10)
    with pytest.raises(StoreUnavailableError, match=r"Another process.*0\.1 s"):
        Cache(tmp_path, wait_s=0.1).obtain(digest_of(1), size_bytes=SIZE, make=forbidden)
    go_on.set()
    worker.join()
    assert held(Cache(tmp_path)) == [1]


def test_a_root_that_others_may_enter_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o750)
    with pytest.raises(SettingsError, match="chmod 700"):
        Cache(tmp_path / "open")
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises((SettingsError, StoreUnavailableError)):
            Cache(tmp_path / name)


def test_an_entry_that_is_no_longer_private_is_removed_never_leased(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    elsewhere = tmp_path / "elsewhere"
    for spoil in (
        lambda path: path.chmod(0o775),
        lambda path: (path.chmod(0o700), path.rename(elsewhere), path.symlink_to(elsewhere)),
        lambda path: (cache.prune(0), path.write_bytes(b"x")),
    ):
        with obtain(cache, 1) as lease:
            path = lease.path
        spoil(path)
        assert cache.lease(digest_of(1)) is None
        assert not os.path.lexists(path)
        with obtain(cache, 1) as again:
            assert again.fresh
        cache.prune(0)


def test_a_file_that_is_linked_or_writable_by_others_is_not_opened(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    with obtain(cache, 1) as lease:
        (lease.path / "data").chmod(0o664)
        with pytest.raises(DigestMismatchError):
            lease.open("data")
        (lease.path / "data").chmod(0o444)
        os.link(lease.path / "data", tmp_path / "twin")
        with pytest.raises(DigestMismatchError):
            lease.open("data")
        for name in ("absent", "../" + lease.path.name, ".."):
            with pytest.raises(DigestMismatchError):
                lease.open(name)


def test_an_entry_evicted_between_open_and_lock_is_not_leased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    obtain(cache, 1).close()

    def evicted_now(_: os.stat_result) -> bool:
        assert len(cache.prune(0)) == 1
        return True

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "is_private", evicted_now)
        assert cache.lease(digest_of(1)) is None
    with obtain(cache, 1) as lease:
        assert lease.fresh


def test_discarding_a_wrong_entry_spares_a_right_one_that_took_its_place(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first, second = obtain(cache, 1), cache.lease(digest_of(1))
    assert second is not None
    cache.discard(first)
    assert held(cache) == []
    obtain(cache, 1).close()
    cache.discard(second)
    assert held(cache) == [1]


@pytest.mark.parametrize("digest", ["sha256:" + "g" * 64, "sha256:../x", "", "sha256:" + "A" * 64])
def test_only_digests_become_paths(digest: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(InvalidReferenceError):
        cache.lease(digest)
    with pytest.raises(InvalidReferenceError):
        cache.obtain(digest, size_bytes=1, make=forbidden)


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=2 * SIZE)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        obtain(cache, number).close()
    cache.entries()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_default_place_follows_xdg(tmp_path: Path) -> None:
    assert default_cache_root({"XDG_CACHE_HOME": "/x"}) == Path("/x/loraplex/adapters")
    assert default_cache_root({"XDG_CACHE_HOME": "rel", "HOME": "/h"}) == Path("/h/.cache/loraplex/adapters")


def test_a_use_makes_an_entry_the_newest_even_if_the_clock_is_coarse(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for number in (1, 2):
        obtain(cache, number).close()
        time.sleep(0.002)
    obtain(cache, 1).close()
    assert held(cache) == [2, 1]


def cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["cache", *words])
    return code, capsys.readouterr().out


def test_the_command_lists_and_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path / "cache")
    place = ("--cache-dir", str(cache.root))
    obtain(cache, 1).close()
    kept = obtain(cache, 2)
    (cache.root / ".tmp-crashed").mkdir()
    code, out = cli(capsys, "ls", *place, "--json")
    listed = json.loads(out)
    assert code == 0
    assert listed["size_bytes"] == 2 * SIZE
    assert [(entry["digest"], entry["in_use"]) for entry in listed["entries"]] == [
        (digest_of(1), False),
        (digest_of(2), True),
    ]
    assert "in use" in cli(capsys, "ls", *place)[1]
    code, out = cli(capsys, "prune", *place, "--json")
    assert (code, json.loads(out)["freed_bytes"], json.loads(out)["swept"]) == (0, SIZE, 1)
    kept.close()
    assert "2,000" not in cli(capsys, "prune", "--max-bytes", "5000", *place)[1]
    assert held(cache) == [2]
    assert cli(capsys, "prune", "--max-bytes", "-1", *place)[0] == 2
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    assert cli(capsys, "ls", "--cache-dir", str(tmp_path / "open"))[0] == 2
