"""S3 that loses, repeats and breaks: every answer is still the right one. Disks that are full: nothing half is seen.

The long forms, 20,000 operations, are in tests/reliability/test_registry_store_faults.py.
"""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_examples.s3_server import S3Server
from loraplex_registry.errors import StoreError, StoreRefusedError, StoreUnavailableError
from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.storage.local import LocalStore
from loraplex_registry.storage.store import open_store, write_conditionally
from tests.registry import faults, full_disk
from tests.registry.blobs import read_blob
from tests.registry.full_disk import FailingDisk
from tests.sim import s3_proxy
from tests.sim.s3_proxy import Request, S3Proxy


@pytest.mark.parametrize("seed", [11, 12])
def test_every_answer_is_right_though_every_tenth_request_fails(
    seed: int, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    port = int(s3.endpoint_url.rpartition(":")[2])
    tally = faults.campaign(
        f"{bucket}/faults-{seed}", port, tmp_path, operations=300, rate=0.1, seed=seed, workers=2
    )
    assert tally.wrong == []
    assert (tally.operations, tally.right) == (300, 300)
    assert tally.attempts_max <= faults.ATTEMPTS_MAX
    assert len(tally.faults) >= 9, tally.faults
    assert sum(tally.faults.values()) >= 20


def test_the_campaign_repeats_itself_by_its_seed(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    port = int(s3.endpoint_url.rpartition(":")[2])
    runs = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        place = f"{bucket}/repeat-{number}"
        runs.append(
            faults.campaign(place, port, tmp_path / str(number), operations=60, rate=0.2, seed=3, workers=1)
        )
    assert runs[0].faults == runs[1].faults
    assert runs[0].kinds == runs[1].kinds
    assert set(runs[0].faults) <= set(s3_proxy.ALL)


def _write_through(
    proxy: S3Proxy, root: str, *faults_in_turn: str | None
) -> tuple[StoreError, list[Request]]:
    """Write an object while the first requests get these faults; return the error and every request."""
    store = open_store(root, endpoint_url=proxy.url)
    proxy.use(s3_proxy.script(*faults_in_turn))
    try:
        with pytest.raises(StoreError) as caught:
            write_conditionally(store, "t/v/1.json", b"mine", etag=None)
        return caught.value, list(proxy.requests)
    finally:
        proxy.use(s3_proxy.script())


@pytest.mark.parametrize("fault", [s3_proxy.LOST_REQUEST, s3_proxy.ERROR_500, s3_proxy.ERROR_503])
def test_a_write_refused_while_an_earlier_one_is_in_doubt_is_read_back_and_not_sent_again(
    fault: str, proxy: S3Proxy, bucket: str
) -> None:
    root = f"{bucket}/in-doubt-{fault.replace(' ', '-')}"
    error, requests = _write_through(proxy, root, fault, None, s3_proxy.ERROR_403)
    assert isinstance(error, StoreUnavailableError)
    assert error.ambiguous
    assert [(one.method, one.status) for one in requests[1:]] == [("GET", 404), ("PUT", 403), ("GET", 404)]
    assert faults.wrong_repetitions(requests) == []


def test_nothing_follows_a_refusal_without_doubt_nor_a_refused_read_back(proxy: S3Proxy, bucket: str) -> None:
    error, requests = _write_through(proxy, f"{bucket}/refused-at-once", s3_proxy.ERROR_403)
    assert isinstance(error, StoreRefusedError)
    assert [(one.method, one.status) for one in requests] == [("PUT", 403)]
    error, requests = _write_through(
        proxy, f"{bucket}/unreadable", s3_proxy.LOST_REPLY, s3_proxy.ERROR_403, s3_proxy.ERROR_403
    )
    assert isinstance(error, StoreUnavailableError)
    assert error.ambiguous
    assert [(one.method, one.status) for one in requests] == [("PUT", 0), ("GET", 403)]


def _sent(method: str, *, status: int = 0, fault: str | None = None, key: str = "a") -> Request:
    return Request(method, f"/bucket/{key}", method == "PUT", fault=fault, status=status)


def test_the_judge_of_the_campaign_sees_what_was_sent_again() -> None:
    lost, absent = _sent("PUT", fault=s3_proxy.LOST_REQUEST), _sent("GET", status=404)
    refused = _sent("PUT", status=403, fault=s3_proxy.ERROR_403)
    wrong = faults.wrong_repetitions
    assert wrong([lost, absent, refused, absent]) == []
    assert wrong([lost, absent, refused, _sent("PUT", status=200)]) != []  # the write itself, once more
    assert (
        wrong([lost, absent, refused, absent, _sent("PUT", status=200)]) != []
    )  # the same after reading back
    assert wrong([refused, absent]) != []  # no doubt, so nothing to read back
    assert wrong([lost, refused, _sent("GET", status=200, key="b")]) != []  # another object
    assert wrong([_sent("GET", status=403), absent]) != []
    assert (
        wrong([lost, absent, refused, _sent("GET", status=403), absent]) != []
    )  # refused to look, looked again
    assert wrong([_sent("PUT", status=412), _sent("GET", status=200), lost]) != []


# Disks


def _prepared(root: Path) -> tuple[str, bytes]:
    """Make a store with one object and one blob; return the object's etag and the blob's bytes."""
    store = LocalStore(root)
    store.prepare()
    etag = store.create("t/old.json", b"old")
    (root.parent / "old").write_bytes(b"blob")
    store.put_blob("t/b/0/0", root.parent / "old", FileEntry("old", 4, hashlib.sha256(b"blob").hexdigest()))
    return etag, b"blob"


OPERATIONS = {
    "create": lambda store, path, etag: store.create("t/new/deep/x.json", path.read_bytes()),
    "swap": lambda store, path, etag: store.swap("t/old.json", path.read_bytes(), etag=etag),
    "put": lambda store, path, etag: store.put_blob(
        "t/b/1/0", path, FileEntry("f", 3000, hashlib.sha256(path.read_bytes()).hexdigest())
    ),
}
PLACES = {"create": "t/new/deep/x.json", "swap": "t/old.json", "put": "t/b/1/0"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_disk_that_fails_at_any_call_shows_nothing_half_written(
    operation: str, code: int, tmp_path: Path
) -> None:
    new = os.urandom(3000)
    calls, at = [""], -1
    while at < len(calls):  # the first run counts the calls; then one run for each of them
        root = tmp_path / str(at) / "root"
        root.parent.mkdir()
        etag, blob = _prepared(root)
        path = root.parent / "f"
        path.write_bytes(new)
        disk = FailingDisk(at=at, code=code)
        store = LocalStore(root, disk=disk)
        if at < 0:
            OPERATIONS[operation](store, path, etag)
            calls, at = disk.calls, 0
            continue
        with pytest.raises(StoreError) as caught:
            OPERATIONS[operation](store, path, etag)
        settled = bool({"link", "rename"} & set(calls[:at]))
        after = LocalStore(root)
        found = {item.key: item.size for item in after.blobs("")}
        before = {"t/old.json": 3, "t/b/0/0": 4}
        # Only after the link or rename may the new object be there, and then it is whole.
        assert found == before or (settled and found == {**before, PLACES[operation]: 3000}), calls[at]
        assert after.get("t/old.json", limit_bytes=9000).body in ({b"old", new} if settled else {b"old"})
        assert b"".join(map(bytes, read_blob(after, "t/b/0/0", size_bytes=4))) == blob
        # Never told that the end is unknown when the store can know it.
        if code != errno.EIO:
            assert not getattr(caught.value, "ambiguous", False)
        if settled:
            assert isinstance(caught.value, StoreRefusedError)
        elif operation != "swap" or after.get("t/old.json", limit_bytes=9000).body == b"old":
            OPERATIONS[operation](after, path, etag)  # repeated with room on the disk
        assert list((root / ".tmp").iterdir()) == []
        at += 1
    assert {"create", "write", "sync", "sync_directory"} <= set(calls)


def test_a_process_that_may_not_write_more_leaves_nothing_half(tmp_path: Path) -> None:
    """The kernel's own short writes: a child with RLIMIT_FSIZE."""
    root = tmp_path / "root"
    _prepared(root)
    (tmp_path / "source").write_bytes(os.urandom(100_000))
    done = subprocess.run(
        [sys.executable, full_disk.__file__, str(root), "65536"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split("\n")[:4] == ["STORE_UNAVAILABLE False"] * 3 + ["done"]
    store = LocalStore(root)
    assert {item.key: item.size for item in store.blobs("")} == {
        "t/old.json": 3,
        "t/b/0/0": 4,
        "t/small.json": 4,
    }
    assert list((root / ".tmp").iterdir()) == []


def test_left_overs_of_writers_that_died_are_swept_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _prepared(root)
    (root / ".tmp" / "dead").write_bytes(b"half")
    with (root / ".tmp" / "alive").open("wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        LocalStore(root).prepare()
        assert [path.name for path in (root / ".tmp").iterdir()] == ["alive"]
    LocalStore(root).prepare()
    assert list((root / ".tmp").iterdir()) == []
