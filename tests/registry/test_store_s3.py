"""What is particular to S3: how its answers and silences are classified, and that secrets stay out of errors."""

import base64
import datetime as dt
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

from loraplex_examples.s3_server import S3Server
from loraplex_registry.errors import (
    DamagedError,
    DigestMismatchError,
    KeyConflictError,
    RegistryError,
    SettingsError,
    StoreRefusedError,
    StoreUnavailableError,
)
from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.storage.s3_options import S3Options
from loraplex_registry.storage.store import Store, open_store
from tests.registry.blobs import read_blob
from tests.registry.s3_script import fault, found, scripted

SECRET = "wJalrXUtnFEMI-CANARY"


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIACANARY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def at(url: str) -> Store:
    return open_store(
        "s3://bucket/prefix", endpoint_url=url, region="us-east-1", options=S3Options(timeout_s=2)
    )


def put(store: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    store.put_blob("t/b", tmp_path / "f", FileEntry("f", 1, hashlib.sha256(b"x").hexdigest()))


OPERATIONS = {
    "get": lambda store, tmp: store.get("t/a", limit_bytes=10),
    "create": lambda store, tmp: store.create("t/a", b"x"),
    "swap": lambda store, tmp: store.swap("t/a", b"x", etag='"e"'),
    "blob": lambda store, tmp: list(read_blob(store, "t/b", size_bytes=1)),
    "put": put,
    "list": lambda store, tmp: list(store.children("t/")),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_server_that_is_down_is_an_outage_that_may_pass(operation: str, tmp_path: Path) -> None:
    with scripted(fault(500, "x")) as script:
        url = script.url
    with pytest.raises(StoreUnavailableError) as caught:
        OPERATIONS[operation](at(url), tmp_path)
    assert caught.value.retryable
    assert not caught.value.ambiguous
    assert SECRET not in str(caught.value)


def test_opening_a_store_contacts_nobody_and_imports_no_sdk() -> None:
    code = (
        "import sys; from loraplex_registry.storage.store import open_store; "
        "open_store('s3://bucket/x', endpoint_url='http://127.0.0.1:9'); sys.exit('botocore' in sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (502, "BadGateway")])
@pytest.mark.parametrize("operation", ["create", "swap"])
def test_a_fault_during_a_conditional_write_is_ambiguous_and_is_not_retried(
    operation: str, status: int, code: str, tmp_path: Path
) -> None:
    with scripted(fault(status, code)) as script, pytest.raises(StoreUnavailableError) as caught:
        OPERATIONS[operation](at(script.url), tmp_path)
    assert caught.value.ambiguous
    assert len(script.requests) == 1


@pytest.mark.parametrize("operation", ["create", "swap"])
def test_a_connection_that_breaks_during_a_conditional_write_is_ambiguous(
    operation: str, tmp_path: Path
) -> None:
    with scripted(None) as script, pytest.raises(StoreUnavailableError) as caught:
        OPERATIONS[operation](at(script.url), tmp_path)
    assert caught.value.ambiguous
    assert len(script.requests) == 1


def test_a_write_that_a_rival_delayed_is_tried_again() -> None:
    busy = fault(409, "ConditionalRequestConflict")
    with scripted(busy, busy, (200, {"ETag": '"new"'}, b"")) as script:
        assert at(script.url).create("t/a", b"x") == '"new"'
    assert len(script.requests) == 3


def test_a_write_that_rivals_delay_for_ever_ends_in_an_outage() -> None:
    with scripted(fault(409, "ConditionalRequestConflict")) as script, pytest.raises(StoreUnavailableError):
        at(script.url).create("t/a", b"x")
    assert len(script.requests) == 5


@pytest.mark.parametrize("operation", ["create", "swap"])
def test_a_condition_that_fails_is_a_conflict(operation: str, tmp_path: Path) -> None:
    with scripted(fault(412, "PreconditionFailed")) as script, pytest.raises(KeyConflictError):
        OPERATIONS[operation](at(script.url), tmp_path)


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (403, "InvalidAccessKeyId"), (404, "NoSuchBucket")]
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refusal_is_for_the_operator_and_holds_no_secret(
    operation: str, status: int, code: str, tmp_path: Path
) -> None:
    with scripted(fault(status, code)) as script, pytest.raises(StoreRefusedError) as caught:
        OPERATIONS[operation](at(script.url), tmp_path)
    assert not caught.value.retryable
    assert caught.value.code == "STORE_UNAVAILABLE"
    assert "CANARY" not in str(caught.value)


def test_a_read_that_breaks_off_is_tried_again() -> None:
    broken = (200, {"ETag": '"e"', "Content-Length": "10"}, b"half")
    with scripted(broken, found(b"whole")) as script:
        assert at(script.url).get("t/a", limit_bytes=10).body == b"whole"
    with scripted(broken) as script, pytest.raises(StoreUnavailableError):
        at(script.url).get("t/a", limit_bytes=10)
    assert len(script.requests) == 5  # the first by the fast path, the others by the SDK's


def test_a_body_without_end_is_read_to_the_limit_only() -> None:
    with scripted(found(b"x" * 5_000_000)) as script, pytest.raises(DamagedError):
        at(script.url).get("t/a", limit_bytes=100)


@pytest.mark.parametrize("total", [99, 101, 10**12])
def test_a_blob_of_another_size_is_refused_by_its_first_answer(total: int) -> None:
    with scripted(found(b"x" * 100, total=total)) as script, pytest.raises(DigestMismatchError):
        list(read_blob(at(script.url), "t/b", size_bytes=100))
    assert len(script.requests) == 1


def test_a_blob_that_is_replaced_while_it_is_read_is_refused() -> None:
    size = (8 << 20) + 1
    with (
        scripted(found(b"x" * (8 << 20), total=size), fault(412, "PreconditionFailed")) as script,
        pytest.raises(DigestMismatchError),
    ):
        list(read_blob(at(script.url), "t/b", size_bytes=size))


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with scripted(found(b"x")) as script, pytest.raises(StoreRefusedError, match="AWS_PROFILE"):
        at(script.url).get("t/a", limit_bytes=10)


def test_a_bucket_that_does_not_exist_is_named(s3: S3Server) -> None:
    with pytest.raises(StoreRefusedError, match="no such bucket"):
        list(open_store("s3://never-made/x").children("t/"))


def test_a_file_above_the_part_limit_goes_up_in_parts(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_registry.storage.s3_uploads.MULTIPART_ABOVE_BYTES", 6 << 20)
    body = os.urandom((17 << 20) + 5)
    (tmp_path / "f").write_bytes(body)
    file = FileEntry("f", len(body), hashlib.sha256(body).hexdigest())
    store = open_store(s3.make_bucket("parts"))
    assert store.put_blob("t/b", tmp_path / "f", file) == 3 + 2
    assert b"".join(map(bytes, read_blob(store, "t/b", size_bytes=len(body)))) == body
    (tmp_path / "f").write_bytes(body[:-1] + b"?")
    with pytest.raises(RegistryError, match="changed"):
        store.put_blob("t/c", tmp_path / "f", file)
    assert list(store.children("t/")) == ["b"]


# Options


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"checksums": "sometimes"}, "checksums"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": 601}, "timeout_s"),
        ({"sse": "rot13"}, "sse"),
        ({"sse_kms_key_id": "k"}, "sse_kms_key_id"),
        ({"sse": "AES256", "sse_kms_key_id": "k"}, "sse_kms_key_id"),
        ({"lock_mode": "GOVERNANCE"}, "lock_days"),
        ({"lock_days": 1}, "lock_mode"),
        ({"lock_mode": "FOREVER", "lock_days": 1}, "lock_mode"),
        ({"lock_mode": "COMPLIANCE", "lock_days": 0}, "lock_days"),
        ({"lock_mode": "COMPLIANCE", "lock_days": 36_501}, "lock_days"),
    ],
)
def test_options_that_do_not_fit_together_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        S3Options(**values)


@pytest.mark.parametrize("operation", ["create", "swap", "put"])
def test_encryption_and_lock_are_asked_for_with_every_write(operation: str, tmp_path: Path) -> None:
    options = S3Options(sse="aws:kms", sse_kms_key_id="key-1", lock_mode="COMPLIANCE", lock_days=30)
    with scripted((200, {"ETag": '"e"'}, b"")) as script:
        store = open_store("s3://bucket/prefix", endpoint_url=script.url, region="us-east-1", options=options)
        OPERATIONS[operation](store, tmp_path)
    sent = script.headers[-1]
    assert sent["x-amz-server-side-encryption"] == "aws:kms"
    assert sent["x-amz-server-side-encryption-aws-kms-key-id"] == "key-1"
    assert sent["x-amz-object-lock-mode"] == "COMPLIANCE"
    until = dt.datetime.fromisoformat(sent["x-amz-object-lock-retain-until-date"].replace("Z", "+00:00"))
    assert dt.timedelta(days=29) < until - dt.datetime.now(dt.UTC) <= dt.timedelta(days=30, minutes=1)


@pytest.mark.parametrize("operation", ["create", "swap", "put"])
def test_every_write_carries_the_sha256_of_its_bytes(operation: str, tmp_path: Path) -> None:
    with scripted((200, {"ETag": '"e"'}, b"")) as script:
        OPERATIONS[operation](at(script.url), tmp_path)
    digest = base64.b64encode(hashlib.sha256(b"x").digest()).decode()
    assert script.headers[-1]["x-amz-checksum-sha256"] == digest


def test_a_locked_version_cannot_be_removed_and_tags_still_move(s3: S3Server) -> None:
    client = boto3.client("s3", endpoint_url=s3.endpoint_url, region_name="us-east-1")
    client.create_bucket(Bucket="locked-bucket", ObjectLockEnabledForBucket=True)
    options = S3Options(lock_mode="COMPLIANCE", lock_days=1)
    store = open_store("s3://locked-bucket/r", endpoint_url=s3.endpoint_url, options=options)
    etag = store.create("t/a.json", b"one")
    first = client.list_object_versions(Bucket="locked-bucket")["Versions"][0]["VersionId"]
    store.swap("t/a.json", b"two", etag=etag)
    assert store.get("t/a.json", limit_bytes=10).body == b"two"
    with pytest.raises(client.exceptions.ClientError):
        client.delete_object(Bucket="locked-bucket", Key="r/t/a.json", VersionId=first)
    old = client.get_object(Bucket="locked-bucket", Key="r/t/a.json", VersionId=first)
    assert old["Body"].read() == b"one"


# Deleting


def test_blobs_that_a_delete_left_are_not_taken_for_deleted() -> None:
    refused = b"<DeleteResult><Error><Key>prefix/t/b/1</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    with scripted((200, {}, refused)) as script, pytest.raises(StoreRefusedError, match="AccessDenied"):
        at(script.url).delete_blobs(["t/b/0", "t/b/1"])
    assert len(script.requests) == 1


def test_a_delete_that_failed_for_some_is_tried_again() -> None:
    some = b"<DeleteResult><Error><Key>prefix/t/b/1</Key><Code>InternalError</Code></Error></DeleteResult>"
    with scripted((200, {}, some), (200, {}, b"<DeleteResult/>")) as script:
        assert at(script.url).delete_blobs(["t/b/0", "t/b/1"]) == 1
    assert len(script.requests) == 2


# Attempts


@pytest.mark.parametrize("status", [403, 412])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_plain_no_is_never_asked_twice(operation: str, status: int, tmp_path: Path) -> None:
    answer = fault(status, "AccessDenied" if status == 403 else "PreconditionFailed")
    with scripted(answer) as script, pytest.raises(RegistryError) as caught:
        OPERATIONS[operation](at(script.url), tmp_path)
    assert not caught.value.retryable
    assert len(script.requests) == 1


@pytest.mark.parametrize("operation", ["get", "blob", "put", "list"])
def test_an_outage_is_tried_five_times_in_all(operation: str, tmp_path: Path) -> None:
    with scripted(fault(503, "SlowDown")) as script, pytest.raises(StoreUnavailableError):
        OPERATIONS[operation](at(script.url), tmp_path)
    assert len(script.requests) == 5
