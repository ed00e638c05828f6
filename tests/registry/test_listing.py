"""Listing: names as they come, flat in cost, and what is known about each of them."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.format import layout
from loraplex_registry.lifecycle.listing import (
    in_parallel,
    list_adapters,
    list_tags,
    list_tenants,
    list_versions,
    version_names,
)
from loraplex_registry.refs import AdapterRef, version_order
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage.store import CountingStore, Store, open_store
from loraplex_registry.validation.base import BaseModel
from tests.registry import builders
from tests.registry.shell import Shell, failing

NAMES = ["a", "a-b", "a.b", "a0", "offers", "or", "order", "orders", "orders-eu", "ordinary", "z"]


def filled(store: Store, names: list[str]) -> Store:
    store.prepare()
    for name in names:
        store.create(layout.version_key(AdapterRef("acme", name), 1), b"{}")
    return store


def test_every_store_lists_the_names_that_match(store: Store) -> None:
    filled(store, NAMES)
    assert list(list_tenants(store)) == ["acme"]
    assert sorted(list_adapters(store, "acme")) == sorted(NAMES)
    for pattern, matching in {
        "or*": {"or", "order", "orders", "orders-eu", "ordinary"},
        "order?": {"orders"},
        "*s": {"offers", "orders"},
        "a[-.]b": {"a-b", "a.b"},
        "orders": {"orders"},
        "x*": set(),
    }.items():
        assert set(list_adapters(store, "acme", pattern=pattern)) == matching


def test_a_listing_can_be_taken_up_behind_any_name(store: Store) -> None:
    filled(store, NAMES)
    whole = list(list_adapters(store, "acme"))
    for number, name in enumerate(whole):
        assert list(list_adapters(store, "acme", after=name)) == whole[number + 1 :]
        assert list(list_adapters(store, "acme", pattern="or*", after=name)) == [
            other for other in whole[number + 1 :] if other.startswith("or")
        ]


def test_a_pattern_reads_no_names_before_its_beginning_and_few_behind() -> None:
    store = filled(
        open_store("memory:"), [f"{letter}{number}" for letter in "abcxyz" for number in range(50)]
    )
    seen: list[str] = []

    class Watched(CountingStore):
        def children(self, prefix: str, *, after: str = "") -> Iterator[str]:
            for name in super().children(prefix, after=after):
                seen.append(name)
                yield name

    assert len(list(list_adapters(Watched(store), "acme", pattern="c1*"))) == 11
    assert len(seen) <= 13


names = st.from_regex(r"[a-c](?:[a-c0.-]{0,3}[a-c0])?", fullmatch=True).filter(lambda name: ".." not in name)


@given(
    present=st.sets(names, max_size=20), pattern=st.from_regex(r"[a-c0.-]{0,2}[*?]?[a-c0]?", fullmatch=True)
)
def test_patterns_mean_what_the_shell_means(present: set[str], pattern: str) -> None:
    import fnmatch

    store = filled(open_store("memory:"), sorted(present))
    assert sorted(list_adapters(store, "acme", pattern=pattern)) == sorted(
        name for name in present if fnmatch.fnmatchcase(name, pattern)
    )


def test_versions_are_known_in_their_order_with_their_state(
    registry: Registry, store: Store, adapter: Path, signer: Signer, base: BaseModel
) -> None:
    versions = [3, "1.2.0", "1.2.0-rc.1", "10.0.0", 2]
    for version in versions:
        registry.publish(
            adapter,
            AdapterRef("acme", "orders", version=version),
            signer,
            base,
            tag=f"v{version}".replace("v1.2.0", "w"),
        )
    ref = AdapterRef("acme", "orders")
    store.create(layout.version_key(ref, 7), b"damaged")
    found = version_names(store, ref)
    assert found == sorted([*versions, 7], key=version_order, reverse=True)
    listed = list(list_versions(store, ref, found))
    assert [entry.version for entry in listed] == found
    assert {entry.version: entry.state for entry in listed}[7] == "damaged"
    assert all(entry.digest and entry.size_bytes for entry in listed if entry.version != 7)
    tags = {tag.tag: tag for tag in list_tags(store, ref)}
    assert tags["v3"].version == 3
    assert tags["v3"].digest == registry.resolve(AdapterRef("acme", "orders", version=3)).digest


def test_work_in_parallel_keeps_the_order_and_does_not_run_ahead() -> None:
    begun = itertools.count()
    source = iter(range(10_000))
    results = in_parallel(lambda item: (next(begun), item)[1], source, threads=4)
    assert [next(results) for _ in range(10)] == list(range(10))
    results.close()
    assert next(source) < 40


def test_an_error_comes_at_its_place() -> None:
    def work(item: int) -> int:
        if item == 5:
            raise ValueError(item)
        return item

    results = in_parallel(work, range(100), threads=4)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="5"):
        next(results)


# --- the command


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A registry with two versions and a tag, and empty adapters besides."""
    shell = Shell(tmp_path_factory.mktemp("home"), {})
    builders.make_base(shell.home / "base")
    shell("init", "--tenant", "acme")
    for seed in (1, 2):
        builders.make_adapter(shell.home / "orders", seed=seed)
        shell("push", "orders", "--base", "base", "--tag", "prod")
    filled(open_store(str(shell.home / ".local/share/loraplex/registry")), ["a", "b", "order"])
    return shell


def test_one_object_or_one_per_line(shell: Shell) -> None:
    assert shell("ls", "acme") == "acme/a\nacme/b\nacme/order\nacme/orders\n"
    assert shell.json("ls", "acme/or*") == {"tenant": "acme", "adapters": ["order", "orders"], "next": None}
    lines = shell("ls", "acme", "--jsonl").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"adapter": f"acme/{name}"} for name in ("a", "b", "order", "orders")
    ]
    assert shell("ls", "acme", "--quiet") == ""


def test_pages_follow_each_other(shell: Shell) -> None:
    first = shell.json("ls", "acme", "--limit", "2")
    assert (first["adapters"], first["next"]) == (["a", "b"], "b")
    second = shell.json("ls", "acme", "--limit", "2", "--after", first["next"])
    assert (second["adapters"], second["next"]) == (["order", "orders"], None)


def test_an_adapter_shows_its_versions_newest_first_with_their_tags(shell: Shell) -> None:
    heading, newest, oldest = shell("ls", "acme/orders").splitlines()
    assert heading.split() == ["VERSION", "STATE", "CREATED", "SIZE", "TAGS", "DIGEST"]
    assert newest.split()[0] == "2"
    assert "prod(2)" in newest
    assert "prod" not in oldest
    listed = shell.json("ls", "acme/orders", "--limit", "1")
    assert [entry["version"] for entry in listed["versions"]] == [2]
    assert listed["next"] == "2"
    assert [entry["version"] for entry in shell.json("ls", "acme/orders", "--after", "2")["versions"]] == [1]


def test_long_form_tells_the_newest_version_of_every_adapter(shell: Shell) -> None:
    listed = {entry["adapter"]: entry for entry in shell.json("ls", "acme", "--long")["adapters"]}
    assert listed["acme/orders"]["newest"]["version"] == 2
    assert listed["acme/a"]["newest"] is None
    assert "acme/orders" in shell("ls", "acme", "-l")


def test_what_is_not_there_is_said(shell: Shell) -> None:
    done = shell.run("ls", "nobody")
    assert (done.returncode, done.stdout) == (0, "")
    assert "`registry ls` lists tenants" in done.stderr
    assert shell.json("ls", "nobody")["adapters"] == []
    failing(shell, 3, "ADAPTER_NOT_FOUND", "ls", "acme/none")
    failing(shell, 2, "INVALID_ARGUMENT", "ls", "acme/orders@1")
    failing(shell, 2, "INVALID_ARGUMENT", "ls", "a*/b")
    failing(shell, 2, "INVALID_ARGUMENT", "ls", "--limit", "0")
