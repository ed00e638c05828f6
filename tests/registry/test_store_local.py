"""What is particular to the local directory: no way out of it, no links, no damage from a crash."""

import os
from pathlib import Path

import pytest

from loraplex_registry.errors import (
    InvalidReferenceError,
    StoreRefusedError,
    StoreUnavailableError,
)
from loraplex_registry.store import Store, open_store


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
    assert list(local.children("t/")) == ["a.json"]
    local.create("t/b.json", b"two")


def test_writes_leave_no_temporary_file(local: Store, tmp_path: Path) -> None:
    local.swap("t/a.json", b"two", etag=local.create("t/a.json", b"one"))
    assert not [name for name in os.listdir(tmp_path / "local/t") if name.startswith(".tmp-")]


def test_a_plain_path_and_spaces_work_as_an_address(tmp_path: Path) -> None:
    place = tmp_path / "with space"
    one, two = open_store(str(place)), open_store(place.as_uri())
    assert one.url == two.url == place.as_uri()
    one.prepare()
    one.create("t/a.json", b"x")
    assert two.get("t/a.json", limit_bytes=1).body == b"x"
