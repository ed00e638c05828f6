"""Long files go up in parts that are each verified; an interrupted push is gone on with, and never with wrong parts."""

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.registry_world import base_model, make_adapter
from loraplex_examples.s3_server import S3Server
from loraplex_registry.encryption.kek_file import generate_encryption_key
from loraplex_registry.encryption.key_providers import KeyRing
from loraplex_registry.errors import ConflictError, DigestMismatchError, StoreUnavailableError
from loraplex_registry.format import layout
from loraplex_registry.format.canonical import StrictJsonError
from loraplex_registry.format.manifest import CHUNK_BYTES, FileEntry
from loraplex_registry.format.record import AbortedRecord, CommittedRecord, PendingRecord
from loraplex_registry.lifecycle.gc import collect
from loraplex_registry.lifecycle.resuming import EXPIRES_S, Interrupted, Resumables, read_interrupted
from loraplex_registry.lifecycle.versions import get_record
from loraplex_registry.refs import AdapterRef, Version
from loraplex_registry.registry import Published, Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage import s3_client, s3_uploads
from loraplex_registry.storage.s3_parts import plan_parts
from loraplex_registry.storage.s3_uploads import PARTS_AT_ONCE
from loraplex_registry.storage.store import Store, open_store
from tests.registry.blobs import read_blob
from tests.registry.conftest import NOW, make_store, ready
from tests.registry.shell import COMMAND, Shell
from tests.sim.s3_proxy import ERROR_503, LOST_REPLY, LOST_REQUEST, Chooser, Request, S3Proxy

ORDERS = AdapterRef.parse("acme/orders")
MIB = 17
PARTS = 3
"""Parts of an adapter of MIB mebibytes: 8, 8, and 1 with the header."""

BASE = base_model()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the same name and different content."""
    place = tmp_path_factory.mktemp("adapters")
    return [make_adapter(place / "a", MIB, BASE), make_adapter(place / "b", MIB + 1, BASE)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of one part, where it is about other things."""
    return make_adapter(tmp_path_factory.mktemp("small") / "a", 2, BASE)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts from one mebibyte on, and hardly a wait before a request is sent again."""
    monkeypatch.setattr(s3_uploads, "MULTIPART_ABOVE_BYTES", 1 << 20)
    monkeypatch.setattr(s3_client, "BACKOFF_S", 0.001)


class Desk:
    """One user with a state directory, pushing through a proxy that may lose requests."""

    def __init__(self, direct: Store, store: Store, proxy: S3Proxy, signer: Signer, state: Path) -> None:
        self.direct, self.store, self.proxy, self.signer = direct, store, proxy, signer
        self.state = state
        self.now = NOW
        self.found: list[tuple[int, int]] = []

    def push(self, directory: Path, *, faults: Chooser | None = None, **options: Any) -> Published:
        """Publish with an interrupted push remembered; the proxy's requests are those of this push alone."""
        self.found = []
        self.proxy.use(faults or (lambda *_: None))
        resumables = Resumables(self.state, told=lambda there, parts: self.found.append((there, parts)))
        registry = Registry(self.store, clock=lambda: self.now, keys=options.pop("keys", None))
        ref = options.pop("ref", ORDERS)
        return registry.publish(directory, ref, self.signer, BASE, resumables=resumables, **options)

    def fails(self, directory: Path, faults: Chooser, **options: Any) -> None:
        """Push while the network goes away."""
        with pytest.raises(StoreUnavailableError):
            self.push(directory, faults=faults, **options)
        self.proxy.use(lambda *_: None)

    @property
    def files(self) -> list[Path]:
        """The files in the state directory."""
        return sorted(self.state.glob("*")) if self.state.exists() else []

    def left(self) -> Interrupted:
        """What the one file says."""
        (file,) = self.files
        return read_interrupted(file.read_bytes())

    def sent(self) -> int:
        """Parts that arrived in the last push."""
        return sum(is_part(request) and request.status == 200 for request in self.proxy.requests)

    def uploads(self) -> list[str]:
        """Keys of unfinished uploads."""
        return [upload.key for upload in self.direct.uploads("t/", before_s=time.time() + 60)]

    def require_readable(self, version: Version, directory: Path) -> None:
        """The version is committed and its weights are those of the directory."""
        found = get_record(self.direct, ORDERS, version)
        assert found is not None
        assert isinstance(found[0], CommittedRecord)
        file = found[0].file("adapter_model.safetensors")
        key = f"{layout.adapter_prefix(ORDERS)}{file.blob}"
        stored = hashlib.sha256(b"".join(map(bytes, read_blob(self.direct, key, size_bytes=file.size))))
        assert stored.digest() == hashlib.sha256((directory / file.name).read_bytes()).digest()


@pytest.fixture(scope="module")
def marker(s3: S3Server, bucket: str) -> bytes:
    """What a probe leaves at the root of a store; one probe is enough for all of one server."""
    store = open_store(f"{bucket}/marker")
    ready(store)
    return store.get(layout.FORMAT_KEY, limit_bytes=1 << 20).body


@pytest.fixture
def desk(
    request: pytest.FixtureRequest, marker: bytes, proxy: S3Proxy, signer: Signer, tmp_path: Path
) -> Desk:
    direct = make_store(request, "s3", tmp_path)
    direct.create(layout.FORMAT_KEY, marker)
    proxy.use(lambda *_: None)
    return Desk(direct, open_store(direct.url, endpoint_url=proxy.url), proxy, signer, tmp_path / "uploads")


def is_part(request: Request) -> bool:
    return request.method == "PUT" and "partNumber=" in request.target


def begins(request: Request) -> bool:
    return request.method == "POST" and "uploads" in request.target


def down_after(count: int, what: Callable[[Request], bool] = is_part) -> Chooser:
    """The network goes away once so many requests of a kind went through."""
    seen = 0

    def choose(_: int, request: Request) -> str | None:
        nonlocal seen
        if seen >= count:
            return ERROR_503
        seen += what(request)
        return None

    return choose


# Parts


@given(st.integers(0, 5 * CHUNK_BYTES))
def test_parts_tile_the_file_and_carry_its_signed_digests(size: int) -> None:
    count = max(1, -(-size // CHUNK_BYTES))
    chunks = tuple(hashlib.sha256(bytes([index])).hexdigest() for index in range(count))
    file = FileEntry("f", size, "0" * 64, chunks if count > 1 else ())
    parts = plan_parts(file)
    assert [part.number for part in parts] == list(range(1, count + 1))
    assert [part.sha256 for part in parts] == list(file.chunk_digests)
    position = 0
    for part in parts:
        assert part.start == position
        assert part.length == min(CHUNK_BYTES, size - position)
        position += part.length
    assert position == size


def test_parts_go_up_a_few_at_a_time(
    desk: Desk, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, flying, most = threading.Lock(), 0, 0
    original = s3_uploads.S3Uploads._send

    def send(*args: Any) -> str:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        try:
            return original(*args)
        finally:
            with lock:
                flying -= 1

    monkeypatch.setattr(s3_uploads.S3Uploads, "_send", send)
    done = desk.push(adapters[0])
    assert 1 < most <= PARTS_AT_ONCE
    assert desk.sent() == PARTS
    assert done.requests == 2 + 1 + PARTS + 1 + 1  # list and reserve; begin, parts, complete; commit
    assert desk.files == desk.uploads() == []
    desk.require_readable(1, adapters[0])


def test_parts_go_by_the_sdk_where_the_fast_path_may_not(
    desk: Desk, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_registry.storage.s3_client.S3Connection._new_data", lambda _: None)
    told: list[int] = []
    desk.push(adapters[0], progress=lambda phase, done, _: told.append(done) if phase == "upload" else None)
    assert told == sorted(told)
    assert told[-1] == (adapters[0] / "adapter_model.safetensors").stat().st_size
    desk.require_readable(1, adapters[0])


def test_a_file_that_changes_while_it_is_uploaded_is_never_completed(
    desk: Desk, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_adapter(tmp_path / "changing", MIB, BASE)

    def progress(phase: str, _: int, __: int) -> None:
        if phase == "upload":
            with (directory / "adapter_model.safetensors").open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"?")

    monkeypatch.setattr(
        s3_uploads, "PARTS_AT_ONCE", 1
    )  # else all would be read before the first byte is told
    desk.store = open_store(desk.direct.url, endpoint_url=desk.proxy.url)
    with pytest.raises(DigestMismatchError, match="changed"):
        desk.push(directory, progress=progress)
    found = get_record(desk.direct, ORDERS, 1)
    assert found is not None
    assert isinstance(found[0], AbortedRecord)
    assert desk.uploads() == desk.files == []
    assert list(desk.direct.blobs(layout.blobs_prefix(ORDERS))) == []
    assert desk.push(small).version == 1


# Going on


@pytest.mark.parametrize("there", [0, 1, PARTS])
def test_an_interrupted_push_sends_only_what_is_missing(desk: Desk, adapters: list[Path], there: int) -> None:
    desk.fails(adapters[0], down_after(there) if there else down_after(1, begins))
    left = desk.left()
    pending = get_record(desk.direct, ORDERS, 1)
    assert pending is not None
    assert isinstance(pending[0], PendingRecord)
    assert (left.version, left.pid) == (1, pending[0].pid)
    assert desk.files[0].stat().st_mode & 0o777 == 0o600
    desk.now += dt.timedelta(minutes=5)
    done = desk.push(adapters[0], tag="prod")
    assert desk.found[0][1] == PARTS
    assert desk.sent() == PARTS - desk.found[0][0]
    assert desk.found[0][0] >= there  # parts under way together may have arrived as well
    assert (done.version, done.created, done.tag_moved) == (1, True, True)
    assert desk.files == desk.uploads() == []
    desk.require_readable(1, adapters[0])


@pytest.mark.parametrize("moment", ["begin", "complete", "commit"])
@pytest.mark.parametrize("fault", [LOST_REQUEST, LOST_REPLY])
def test_a_push_that_dies_at_one_request_is_completed_by_the_same_command(
    desk: Desk, adapters: list[Path], moment: str, fault: str
) -> None:
    kinds = {
        "begin": begins,
        "complete": lambda request: request.method == "POST" and "uploadId=" in request.target,
        "commit": lambda request: request.method == "PUT" and "/v/" in request.target,
    }
    seen = 0

    def choose(_: int, request: Request) -> str | None:
        nonlocal seen
        if seen > (moment == "commit"):  # the first write of the record is the reservation
            return ERROR_503
        seen += kinds[moment](request)
        return fault if seen > (moment == "commit") else None

    desk.fails(adapters[0], choose)
    done = desk.push(adapters[0])
    assert done.version in {1, 2} if moment == "begin" else done.version == 1
    if moment != "begin":
        assert desk.sent() == 0
    desk.require_readable(done.version, adapters[0])
    collect(desk.direct, apply=True, grace_s=0, now_s=NOW.timestamp() + 10**9)
    assert desk.files == desk.uploads() == []
    desk.require_readable(done.version, adapters[0])


def test_ctrl_c_keeps_a_long_upload_and_frees_the_version_of_a_short_one(
    desk: Desk, adapters: list[Path], tmp_path: Path
) -> None:
    def interrupt(phase: str, _: int, __: int) -> None:
        if phase == "upload":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        desk.push(adapters[0], progress=interrupt)
    found = get_record(desk.direct, ORDERS, 1)
    assert found is not None
    assert isinstance(found[0], PendingRecord)
    assert len(desk.files) == len(desk.uploads()) == 1
    assert desk.push(adapters[0]).version == 1

    s3_uploads.MULTIPART_ABOVE_BYTES = 1 << 40
    with pytest.raises(KeyboardInterrupt):
        desk.push(adapters[1], progress=interrupt)
    found = get_record(desk.direct, ORDERS, 2)
    assert found is not None
    assert isinstance(found[0], AbortedRecord)
    assert desk.files == desk.uploads() == []


def test_a_push_without_state_leaves_nothing_behind_when_it_fails(desk: Desk, small: Path) -> None:
    def interrupt(phase: str, _: int, __: int) -> None:
        if phase == "upload":
            raise KeyboardInterrupt

    registry = Registry(desk.store, clock=lambda: NOW)
    with pytest.raises(KeyboardInterrupt):
        registry.publish(small, ORDERS, desk.signer, BASE, progress=interrupt)
    found = get_record(desk.direct, ORDERS, 1)
    assert found is not None
    assert isinstance(found[0], AbortedRecord)
    assert desk.uploads() == []


def test_a_version_taken_over_meanwhile_is_not_touched(desk: Desk, adapters: list[Path]) -> None:
    ref = AdapterRef.parse("acme/orders@7")
    desk.fails(adapters[0], down_after(1), ref=ref)
    later = NOW + dt.timedelta(days=3)
    rival = Registry(desk.direct, clock=lambda: later)
    assert rival.publish(adapters[1], ref, desk.signer, BASE).version == 7
    desk.now = later
    with pytest.raises(ConflictError, match="exists with other content"):
        desk.push(adapters[0], ref=ref)
    desk.require_readable(7, adapters[1])
    assert desk.files == []
    assert desk.push(adapters[0]).version == 8
    assert desk.found == []


def test_a_push_that_was_collected_begins_anew(desk: Desk, adapters: list[Path]) -> None:
    desk.fails(adapters[0], down_after(1))
    pid = desk.left().pid
    done = collect(desk.direct, apply=True, grace_s=0, now_s=NOW.timestamp() + 30 * 86400 + 10**9)
    assert done.uploads["abandoned"].groups == 1
    assert desk.uploads() == []
    assert desk.push(adapters[0]).version == 1
    assert desk.sent() == PARTS
    found = get_record(desk.direct, ORDERS, 1)
    assert found is not None
    assert found[0].pid != pid


def test_an_upload_that_the_storage_dropped_begins_anew(desk: Desk, adapters: list[Path]) -> None:
    desk.fails(adapters[0], down_after(1))
    left = desk.left()
    for key, upload_id in left.uploads.items():
        desk.direct.abort_upload(key, upload_id)
        desk.direct.abort_upload(key, upload_id)  # what is gone is fine
    assert desk.push(adapters[0]).version == 1
    assert (desk.found, desk.sent()) == ([(0, PARTS)], PARTS)
    desk.require_readable(1, adapters[0])


def test_other_content_under_the_name_frees_the_version_at_once(desk: Desk, adapters: list[Path]) -> None:
    ref = AdapterRef.parse("acme/orders@1.2.0")
    desk.fails(adapters[0], down_after(1), ref=ref)
    assert desk.push(adapters[1], ref=ref).version == "1.2.0"
    assert desk.found == desk.uploads() == desk.files == []
    desk.require_readable("1.2.0", adapters[1])


def test_parts_that_are_not_the_signed_ones_are_sent_again(
    desk: Desk, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.fails(adapters[0], down_after(PARTS))
    ((key, upload_id),) = desk.left().uploads.items()
    connection: Any = desk.direct._connection  # type: ignore[attr-defined]
    part = {**connection.place(key), "UploadId": upload_id, "PartNumber": 2}
    connection.client().upload_part(**part, Body=b"?" * CHUNK_BYTES, ChecksumAlgorithm="SHA256")
    listed = s3_uploads.is_good
    monkeypatch.setattr(
        s3_uploads,
        "is_good",
        # A look-alike that lists the third part without its checksum.
        lambda entry, part: listed({**entry, "ChecksumSHA256": None} if part.number == 3 else entry, part),
    )
    desk.push(adapters[0])
    assert (desk.found, desk.sent()) == ([(1, PARTS)], 2)
    desk.require_readable(1, adapters[0])


def test_an_encrypted_push_is_not_remembered(desk: Desk, small: Path, tmp_path: Path) -> None:
    generate_encryption_key(tmp_path / "acme.kek", "acme")
    keys = KeyRing.parse(f"file:{tmp_path}/acme.kek")
    desk.fails(small, down_after(1))
    desk.fails(small, down_after(1), keys=keys)
    assert desk.files == []
    done = desk.push(small, keys=keys)
    assert done.encrypted
    assert (desk.found, desk.sent()) == ([], 1)


# The state file


def write(desk: Desk, body: bytes, *, mode: int = 0o600) -> Path:
    """Put a body in the place of the state file of a push of acme/orders."""
    desk.state.mkdir(mode=0o700, exist_ok=True)
    with Resumables(desk.state).claim(desk.store.url, ORDERS, None) as log:
        path = log._path
    assert path is not None
    path.write_bytes(body)
    path.chmod(mode)
    return path


def interrupted(**changes: Any) -> bytes:
    value = {"version": 1, "pid": "a" * 32, "content": "c" * 64, "uploads": {}, **changes}
    return Interrupted(**value).to_bytes()


HOSTILE = [
    b"",
    b"\0" * 5000,
    b"[" * 100_000,
    b"x" * (300 << 10),
    interrupted(pid="../../../etc/passwd"),
    interrupted(version=0),
    interrupted(version="1/../2"),
    interrupted(content="c"),
    interrupted(uploads={"k": "id with spaces"}),
    interrupted(uploads={str(number): "x" for number in range(65)}),
    interrupted().replace(b'"fmt":1', b'"fmt":2'),
    interrupted()[:-1] + b',"more":1}',
]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
def test_a_file_out_of_shape_is_refused(body: bytes) -> None:
    with pytest.raises(StrictJsonError):
        read_interrupted(body)


@given(st.binary(max_size=400) | st.from_regex(rb'\{"content":.{0,80}\}'))
def test_any_bytes_are_an_interrupted_push_or_refused(body: bytes) -> None:
    with contextlib.suppress(StrictJsonError):
        assert read_interrupted(body).to_bytes() == body


def test_a_file_that_names_other_peoples_uploads_harms_nobody(desk: Desk, small: Path) -> None:
    mails = AdapterRef.parse("acme/mails")
    with pytest.raises(StoreUnavailableError):
        desk.push(small, faults=down_after(1), ref=mails)
    left = desk.left()
    write(desk, interrupted(pid=left.pid, uploads=left.uploads))
    assert desk.push(small).version == 1
    assert desk.uploads() == list(left.uploads)
    desk.push(small, ref=mails)
    assert (desk.found, desk.sent()) == ([(1, 1)], 0)


@pytest.mark.parametrize("how", ["garbage", "link", "directory", "writable by others", "expired"])
def test_a_file_that_cannot_be_used_does_not_stop_a_push(
    desk: Desk, small: Path, how: str, tmp_path: Path
) -> None:
    path = write(desk, b"?" if how == "garbage" else interrupted())
    if how == "link":
        (tmp_path / "victim").write_bytes(b"mine")
        path.unlink()
        path.symlink_to(tmp_path / "victim")
    elif how == "directory":
        path.unlink()
        path.mkdir()
    elif how == "writable by others":
        path.chmod(0o666)
    elif how == "expired":
        os.utime(path, (time.time() - EXPIRES_S - 60,) * 2)
    assert desk.push(small).version == 1
    desk.require_readable(1, small)
    if how == "link":
        assert (tmp_path / "victim").read_bytes() == b"mine"
    if how in {"garbage", "expired"}:
        assert desk.files == []


def test_a_directory_that_cannot_be_written_costs_the_resumption_alone(desk: Desk, small: Path) -> None:
    desk.state.write_bytes(b"a file, no directory")
    desk.fails(small, down_after(1))
    assert desk.push(small).created
    assert desk.found == []


def test_two_pushes_of_one_machine_do_not_share_an_upload(desk: Desk, adapters: list[Path]) -> None:
    desk.fails(adapters[0], down_after(1))
    with desk.files[0].open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConflictError, match="is being pushed"):
            desk.push(adapters[0], ref=AdapterRef.parse("acme/orders@1"))
        assert desk.push(adapters[0]).version == 2
    assert desk.push(adapters[0]).version == 1
    assert desk.sent() < PARTS


# Collection


@pytest.fixture
def begun(desk: Desk) -> Iterator[Callable[[Version, str], str]]:
    """Begins an upload of a push, with one part of 3 bytes; returns its key."""
    connection: Any = desk.direct._connection  # type: ignore[attr-defined]

    def begin(version: Version, pid: str) -> str:
        key = layout.adapter_prefix(ORDERS) + layout.blob_name(version, pid, 0)
        place = connection.place(key)
        made = connection.client().create_multipart_upload(**place, ChecksumAlgorithm="SHA256")
        connection.client().upload_part(**place, UploadId=made["UploadId"], PartNumber=1, Body=b"abc")
        return key

    yield begin
    collect(desk.direct, apply=True, grace_s=0, now_s=NOW.timestamp() + 10**9)


def test_unfinished_uploads_go_when_nobody_can_complete_them(
    desk: Desk, begun: Callable[[Version, str], str], small: Path
) -> None:
    now_s = time.time() + 10
    store = desk.direct
    Registry(store).publish(small, ORDERS, desk.signer, BASE)
    committed = get_record(store, ORDERS, 1)
    assert committed is not None
    records = {
        2: PendingRecord("2" * 32, "dead", int(now_s) - 9 * 86400, 3600),
        3: PendingRecord("3" * 32, "alive", int(now_s), 3600),
        4: AbortedRecord("4" * 32, "x"),
        5: AbortedRecord("0" * 32, "another push's"),
    }
    for version, record in records.items():
        store.create(layout.version_key(ORDERS, version), record.to_bytes())
    store.create(layout.version_key(ORDERS, 7), b"not a record")
    for version in (2, 3, 4, 5, 6, 7):
        begun(version, str(version) * 32)
    begun(1, committed[0].pid)
    expected = {
        "completed": 1,
        "abandoned": 1,
        "pushing": 1,
        "aborted": 1,
        "replaced": 1,
        "purged": 1,
        "unreadable": 1,
    }

    def counts(apply: bool, now_s: float, grace_s: float = 0.0) -> dict[str, int]:
        done = collect(store, apply=apply, grace_s=grace_s, now_s=now_s)
        assert done.dead_uploads_total().size_bytes == 3 * len(done.dead_uploads)
        return {reason: tally.groups for reason, tally in done.uploads.items()}

    assert counts(False, now_s, grace_s=3600.0) == {}  # all are younger than the grace
    assert counts(False, now_s) == counts(False, now_s) == expected
    assert len(desk.uploads()) == 7
    assert counts(True, now_s) == expected
    assert desk.uploads() == [
        layout.adapter_prefix(ORDERS) + layout.blob_name(version, str(version) * 32, 0) for version in (3, 7)
    ]
    desk.require_readable(1, small)
    found = get_record(store, ORDERS, 2)
    assert found is not None
    assert isinstance(found[0], AbortedRecord)  # fenced before its parts went


def test_a_listing_of_uploads_goes_over_pages(
    desk: Desk, begun: Callable[[Version, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {begun(version, str(version) * 32) for version in range(1, 6)}
    connection: Any = desk.direct._connection  # type: ignore[attr-defined]
    client = connection.client()
    original = client.list_multipart_uploads
    monkeypatch.setattr(client, "list_multipart_uploads", lambda **where: original(**where, MaxUploads=2))
    assert set(desk.uploads()) == keys


def test_a_storage_that_shows_no_uploads_is_said_and_collected_all_the_same(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.proxy.use(lambda _, request: "403" if "uploads" in request.target else None)
    done = collect(desk.store, apply=False)
    assert "AccessDenied" in done.uploads_unseen
    assert done.dead_total().blobs == 0


# The command


def test_a_killed_command_is_completed_by_the_same_command(
    s3: S3Server, proxy: S3Proxy, bucket: str, tmp_path: Path
) -> None:
    shell = Shell(tmp_path, {**s3.environment, "AWS_ENDPOINT_URL": proxy.url})
    proxy.use(lambda *_: None)
    shell("init", "--tenant", "acme", "--registry", f"{bucket}/killed")
    parts = 10
    make_adapter(tmp_path / "orders", 72, BASE)
    words = ("push", "orders", "--tag", "prod")
    enough, seen = threading.Event(), 0

    def choose(_: int, request: Request) -> str | None:
        nonlocal seen
        seen += is_part(request)
        if seen < 7:
            return None
        enough.set()
        return LOST_REQUEST

    proxy.use(choose)
    process = subprocess.Popen(
        [COMMAND, *words],
        cwd=tmp_path,
        env=shell.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert enough.wait(30)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    proxy.use(lambda *_: None)
    done = shell.run(*words, "--json")
    assert done.returncode == 0, done.stderr
    resumed = re.search(rf"resuming: (\d+) of {parts} parts are there", done.stderr)
    assert resumed is not None
    assert 0 < int(resumed[1]) < 7
    assert sum(is_part(request) for request in proxy.requests) == parts - int(resumed[1])
    answer = json.loads(done.stdout)
    assert (answer["version"], answer["created"], answer["tag_moved"]) == (1, True, True)
    assert list((tmp_path / ".local/state/loraplex/uploads").iterdir()) == []
    assert shell.json("verify", "orders@prod")["version"] == 1
    require_uploads_shown(shell, f"{bucket}/killed")


def require_uploads_shown(shell: Shell, url: str) -> None:
    """`registry gc` shows an unfinished upload with its bytes and the reason, and removes it when it is told to."""
    key = layout.adapter_prefix(ORDERS) + layout.blob_name(9, "9" * 32, 0)
    connection: Any = open_store(url)._connection  # type: ignore[attr-defined]
    place = connection.place(key)
    made = connection.client().create_multipart_upload(**place)
    connection.client().upload_part(**place, UploadId=made["UploadId"], PartNumber=1, Body=b"abc")
    time.sleep(1.1)  # the storage's clock counts seconds
    said = shell("gc", "--grace", "0")
    assert "1 unfinished uploads, 3 B would be removed; run it with --apply" in said
    done = shell.json("gc", "--grace", "0", "--apply")["uploads"]
    assert (done["seen"], done["uploads"], done["size_bytes"]) == (True, 1, 3)
    assert done["dead"][0]["reason"] == "purged"
    assert shell.json("gc", "--grace", "0")["uploads"]["reasons"] == {}


def test_a_push_of_no_directory_says_so(tmp_path: Path) -> None:
    shell = Shell.acme(tmp_path / "home")
    said = shell("push", "./nope", "--base", "nowhere", code=5)
    assert said.count("\n") == 1
    assert "nope is no directory" in said
