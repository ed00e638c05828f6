"""What is particular to the local directory: no way out of it, no links, no damage from a crash."""

import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from loraplex_registry.errors import InvalidReferenceError, StoreRefusedError, StoreUnavailableError
from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.storage.store import Store, open_store
from tests.registry.blobs import read_blob


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "t/../../x", "t//x", "t/.hidden", "t/x\0", "t/x/", "t\\x"]
)
def test_a_key_that_could_leave_the_root_is_refused(key: str, local: Store) -> None:
    with pytest.raises(InvalidReferenceError):
        local.get(key, limit_bytes=10)
    with pytest.raises(InvalidReferenceError):
        local.create(key, b"x")


def test_a_link_in_the_place_of_an_object_is_not_followed(local: Store, tmp_path: Path) -> None:
    local.create("t/a.json", b"one")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "local/t/b.json").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreRefusedError):
        local.get("t/b.json", limit_bytes=10)


def test_a_missing_root_is_an_outage_and_not_an_empty_registry(tmp_path: Path) -> None:
    store = open_store((tmp_path / "unmounted").as_uri())
    with pytest.raises(StoreUnavailableError) as caught:
        store.get("t/a.json", limit_bytes=10)
    assert caught.value.code == "STORE_UNAVAILABLE"
    with pytest.raises(StoreUnavailableError):
        list(store.children("t/"))


def test_left_overs_of_a_crash_are_not_listed_and_do_not_disturb(local: Store, tmp_path: Path) -> None:
    local.create("t/a.json", b"one")
    (tmp_path / "local/t/.tmp-0123").write_bytes(b"half")
    (tmp_path / "local/.tmp/0123").write_bytes(b"half")
    assert list(local.children("t/")) == ["a.json"]
    local.create("t/b.json", b"two")


def test_writes_leave_no_temporary_file(local: Store, tmp_path: Path) -> None:
    local.swap("t/a.json", b"two", etag=local.create("t/a.json", b"one"))
    assert os.listdir(tmp_path / "local/.tmp") == []
    assert sorted(os.listdir(tmp_path / "local/t")) == [".a.json.lock", "a.json"]


def test_a_plain_path_and_spaces_work_as_an_address(tmp_path: Path) -> None:
    place = tmp_path / "with space"
    one, two = open_store(str(place)), open_store(place.as_uri())
    assert one.url == two.url == place.as_uri()
    one.prepare()
    one.create("t/a.json", b"x")
    assert two.get("t/a.json", limit_bytes=1).body == b"x"


def test_uploads_survive_a_collector_that_tidies_directories_away(local: Store, tmp_path: Path) -> None:
    """`delete_blobs` removes empty directories; an upload into one at that moment makes it again."""
    body, done = b"x" * 100, threading.Event()
    (tmp_path / "f").write_bytes(body)
    entry = FileEntry("f", 100, hashlib.sha256(body).hexdigest())

    def collect() -> None:
        while not done.is_set():
            local.delete_blobs(["t/b/1/0"])

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for _ in range(150):
            local.put_blob("t/b/1/1", tmp_path / "f", entry)
            assert b"".join(map(bytes, read_blob(local, "t/b/1/1", size_bytes=100))) == body
            local.delete_blobs(["t/b/1/1"])
    finally:
        done.set()
        collector.join()
    assert list(local.blobs("")) == []


def test_deleting_the_last_blob_removes_its_directory_and_no_other(local: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    entry = FileEntry("f", 1, hashlib.sha256(b"x").hexdigest())
    for key in ("t/b/1/0", "t/b/1/1", "t/b/2/0"):
        local.put_blob(key, tmp_path / "f", entry)
    local.delete_blobs(["t/b/1/0", "t/b/2/0"])
    assert sorted(path.name for path in (tmp_path / "local/t/b").iterdir()) == ["1"]


def test_blobs_are_read_only_and_objects_are_not(local: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    local.put_blob("t/b/0", tmp_path / "f", FileEntry("f", 1, hashlib.sha256(b"x").hexdigest()))
    local.create("t/a.json", b"x")
    assert stat.S_IMODE((tmp_path / "local/t/b/0").stat().st_mode) == 0o444 & ~_umask()
    assert stat.S_IMODE((tmp_path / "local/t/a.json").stat().st_mode) == 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_foreign_files_in_the_directory_are_passed_over(local: Store, tmp_path: Path) -> None:
    local.create("t/a.json", b"one")
    place = tmp_path / "local/t"
    for name in (".hidden", "with space", "ünïcode", "-dash", "dot.", ".a.json.lock"):
        (place / name).write_bytes(b"x")
    (place / "link.json").symlink_to(place / "a.json")
    os.mkfifo(place / "pipe")
    assert [blob.key for blob in local.blobs("")] == ["t/a.json"]
    with pytest.raises(StoreRefusedError):
        local.get("t/pipe", limit_bytes=1)


def test_writing_into_a_root_that_vanished_does_not_make_another(tmp_path: Path) -> None:
    """An unmounted disk: what was written there would be hidden when it is mounted again."""
    store = open_store((tmp_path / "unmounted").as_uri())
    (tmp_path / "f").write_bytes(b"x")
    for write in (
        lambda: store.create("t/a.json", b"x"),
        lambda: store.swap("t/a.json", b"x", etag="e"),
        lambda: store.put_blob("t/b/0", tmp_path / "f", FileEntry("f", 1, hashlib.sha256(b"x").hexdigest())),
        lambda: store.delete_blobs(["t/b/0"]),
    ):
        with pytest.raises(StoreUnavailableError, match="does not exist"):
            write()
    assert not (tmp_path / "unmounted").exists()
