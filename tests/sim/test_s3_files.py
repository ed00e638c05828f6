"""The benchmark's server answers as S3 does, as far as the tools it serves look."""

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.s3_files import Server
from loraplex_registry.errors import DigestMismatchError, KeyAbsentError, KeyConflictError
from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.storage.store import Store, open_store


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "objects/bucket").mkdir(parents=True)
    server = Server(tmp_path / "objects")
    threading.Thread(target=server.run, daemon=True).start()
    yield server
    server.close()


@pytest.fixture
def store(server: Server, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    return open_store("s3://bucket/root", endpoint_url=f"http://127.0.0.1:{server.port}")


def test_conditional_writes_have_one_winner(store: Store) -> None:
    etag = store.create("a/b", b"1")
    with pytest.raises(KeyConflictError):
        store.create("a/b", b"2")
    second = store.swap("a/b", b"2", etag=etag)
    with pytest.raises(KeyConflictError):
        store.swap("a/b", b"3", etag=etag)
    with pytest.raises(KeyConflictError):
        store.swap("a/c", b"3", etag=etag)
    assert store.get("a/b", limit_bytes=9).body == b"2"
    assert store.changed("a/b", etag=second, limit_bytes=9) is None
    with pytest.raises(KeyAbsentError):
        store.get("a/c", limit_bytes=9)


def test_ranges_and_sizes(store: Store, tmp_path: Path) -> None:
    body = os.urandom(3_000_000)
    (tmp_path / "f").write_bytes(body)
    file = FileEntry("f", len(body), hashlib.sha256(body).hexdigest())
    assert store.put_blob("t/b/0", tmp_path / "f", file) == 1
    for start, length in ((0, len(body)), (7, 1), (1_000_000, 2_000_000)):
        found = b"".join(
            map(bytes, store.read_range("t/b/0", start=start, length=length, size_bytes=len(body)))
        )
        assert found == body[start : start + length]
    with pytest.raises(DigestMismatchError):
        list(store.read_range("t/b/0", start=0, length=9, size_bytes=len(body) + 1))


def test_uploads_in_parts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex_registry.storage.s3_uploads.MULTIPART_ABOVE_BYTES", 1 << 20)
    body = os.urandom((16 << 20) + 9)
    (tmp_path / "f").write_bytes(body)
    file = FileEntry("f", len(body), hashlib.sha256(body).hexdigest())
    store.put_blob("t/b/0", tmp_path / "f", file)
    found = store.read_range("t/b/0", start=0, length=len(body), size_bytes=len(body))
    assert b"".join(map(bytes, found)) == body


def test_listing_is_in_order_by_levels_and_over_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.s3_files.PAGE_KEYS", 7)
    names = [f"n{index:03}" for index in range(30)]
    for name in names:
        store.create(f"t/{name}/x", b"")
        store.create(f"t/{name}/y", b"")
    store.create("t/m", b"")
    assert list(store.children("t/")) == ["m", *(f"{name}/" for name in names)]
    assert list(store.children("t/", after="n010/")) == [f"{name}/" for name in names[11:]]
    assert [blob.key for blob in store.blobs("t/n001/")] == ["x", "y"]
