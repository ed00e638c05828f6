"""Asking again what a name means: what it costs, and that it says what a first question would."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_registry.errors import RegistryError
from loraplex_registry.format import layout
from loraplex_registry.lifecycle.delete import delete_version
from loraplex_registry.lifecycle.tagging import untag
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry, Resolved
from loraplex_registry.signing.keys import PublicKey
from loraplex_registry.storage.store import Item, open_store
from loraplex_registry.trust.marks import MemoryMarks
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.trust.verifier import Verifier
from tests.server.adapters.test_reconsider import WITH_REVOKERS, revoke
from tests.server.adapters.test_versions import Clock, make_versions
from tests.server.conftest import Shop

TAG = AdapterRef.parse("acme/orders@prod")


class Asked:
    """A store that notes each request, and whether its answer had a body."""

    def __init__(self, url: str) -> None:
        self._store = open_store(url)
        self.requests: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, key: str, *, limit_bytes: int) -> Item:
        self.requests.append("body")
        return self._store.get(key, limit_bytes=limit_bytes)

    def changed(self, key: str, *, etag: str, limit_bytes: int) -> Item | None:
        found = self._store.changed(key, etag=etag, limit_bytes=limit_bytes)
        self.requests.append("unchanged" if found is None else "body")
        return found

    def children(self, prefix: str, *, after: str = "") -> Any:
        self.requests.append("listing")
        return self._store.children(prefix, after=after)

    def since(self) -> list[str]:
        """The requests since this was asked last."""
        found, self.requests = self.requests, []
        return found


@pytest.mark.parametrize(
    ("name", "first", "again"),
    [
        ("acme/orders@prod", ["body"], ["unchanged"]),
        ("acme/orders@1", ["body"], ["unchanged"]),
        ("acme/orders@{digest}", ["listing", "body", "body"], ["unchanged"]),
        ("acme/orders", ["listing", "body"], ["listing", "unchanged"]),
    ],
)
async def test_a_name_that_means_what_it_meant_costs_one_request_without_a_body(
    shop: Shop, name: str, first: list[str], again: list[str]
) -> None:
    published = shop.publish("acme/orders", seed=1, tag="prod")
    shop.publish("acme/orders", seed=2)
    store: Any = Asked(shop.url)
    clock = Clock()
    versions = make_versions(shop, registry=Registry(store), clock=clock)
    ref = AdapterRef.parse(name.format(digest=published.digest))
    known = await versions.resolve(ref)
    assert store.since() == first
    assert await versions.resolve(ref) is known
    assert store.since() == []
    clock.now += 6
    assert (await versions.resolve(ref)).digest == known.digest
    assert store.since() == again


async def test_a_name_that_means_something_else_costs_one_request_too(shop: Shop) -> None:
    shop.publish("acme/orders", seed=1, tag="prod")
    store: Any = Asked(shop.url)
    clock = Clock()
    versions = make_versions(shop, registry=Registry(store), clock=clock)
    await versions.resolve(TAG)
    moved = shop.publish("acme/orders", seed=2, tag="prod")
    clock.now += 6
    store.since()
    assert (await versions.resolve(TAG)).digest == moved.digest
    assert store.since() == ["body"]


async def test_no_signature_is_computed_for_a_tag_that_has_not_moved(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex_registry.signing import keys

    shop.publish("acme/orders", tag="prod")
    clock = Clock()
    versions = make_versions(shop, clock=clock)
    await versions.resolve(TAG)
    computed = []
    made = keys._verifier

    def counted(pem: str) -> Callable[[bytes, bytes], None]:
        computed.append(pem)
        return made(pem)

    monkeypatch.setattr(keys, "_verifier", counted)
    clock.now += 6
    await versions.resolve(TAG)
    assert computed == []
    shop.publish("acme/orders", seed=2, tag="prod")
    clock.now += 6
    await versions.resolve(TAG)
    assert len(computed) == 2  # the version's and the tag's


def test_a_signature_known_to_be_good_says_nothing_about_another_message_key_or_signature(
    shop: Shop,
) -> None:
    acme, globex = shop.signers["acme"], shop.signers["globex"]
    good = acme.sign(b"one")
    for _ in range(2):
        acme.public_key.check(good, b"one")
        wrong: list[tuple[PublicKey, bytes, bytes]] = [
            (acme.public_key, good, b"two"),
            (globex.public_key, good, b"one"),
            (acme.public_key, globex.sign(b"one"), b"one"),
        ]
        for key, signature, message in wrong:
            with pytest.raises(RegistryError):
                key.check(signature, message)


NAMES = ("acme/orders@prod", "acme/orders@1", "acme/orders")
STEPS = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, 3)),
    st.tuples(st.just("tag"), st.integers(0, 3)),
    st.tuples(st.just("expiring"), st.integers(0, 3)),
    st.tuples(st.just("untag"), st.just(0)),
    st.tuples(st.just("put back"), st.integers(0, 5)),
    st.tuples(st.just("damage"), st.just(0)),
    st.tuples(st.just("revoke"), st.integers(0, 3)),
    st.tuples(st.just("delete"), st.integers(1, 2)),
    st.tuples(st.just("time"), st.sampled_from([1, 3600, 40 * 86_400])),
)


class World:
    """A registry, and two readers of it: one that remembers what it read, one that asks afresh every time."""

    def __init__(self, root: Path) -> None:
        self.shop = Shop(root)
        revokers = 'revokers = [{ path = "acme.pub" }]'
        dated = WITH_REVOKERS.replace(revokers, f'{revokers}\ntags = {{ prod = {{ max_age = "30d" }} }}')
        self.shop.policy.write_text(dated)
        self.now = dt.datetime.now(dt.UTC)
        self.digests: list[str] = []
        self.bodies: list[bytes] = []
        self.known: dict[str, Resolved | None] = {}
        self.polling, self.fresh = (
            Verifier(
                Registry(open_store(self.shop.url)),
                TrustPolicy.load(self.shop.policy),
                marks=MemoryMarks(),
                refresh_s=0,
                now=lambda: self.now,
            )
            for _ in range(2)
        )

    @property
    def tag_file(self) -> Path:
        return self.shop.root / "registry" / layout.tag_key(TAG, "prod")

    def do(self, step: str, number: int) -> None:
        """Change the registry; what is not possible now changes nothing."""
        shop = self.shop
        try:
            if step in ("publish", "tag", "expiring"):
                expires = f"{self.now + dt.timedelta(minutes=30):%Y-%m-%dT%H:%M:%SZ}"
                self.digests.append(
                    shop.publish(
                        "acme/orders",
                        seed=number,
                        tag=None if step == "publish" else "prod",
                        expires=expires if step == "expiring" else "",
                    ).digest
                )
            elif step == "untag":
                untag(shop.registry.store, TAG, "prod", [shop.signers["acme"]], now=self.now)
            elif step == "put back" and self.bodies:
                self.tag_file.write_bytes(self.bodies[number % len(self.bodies)])
            elif step == "damage" and self.bodies:
                self.tag_file.write_bytes(b"{}")
            elif step == "revoke" and self.digests:
                revoke(shop, self.digests[number % len(self.digests)])
            elif step == "delete":
                ref = AdapterRef.parse(f"acme/orders@{number}")
                delete_version(shop.registry.store, ref, by="test", now=self.now, force=True)
            elif step == "time":
                self.now += dt.timedelta(seconds=number)
        except (RegistryError, ValueError):
            pass
        if step in ("tag", "expiring"):
            self.bodies.append(self.tag_file.read_bytes())

    def verdict(
        self, verifier: Verifier, name: str, previous: Resolved | None
    ) -> tuple[str, Resolved | None]:
        """The digest, or why not."""
        resolved = None
        try:
            resolved = verifier.resolve(AdapterRef.parse(name), previous)
            return verifier.decide(resolved).digest, resolved
        except RegistryError as error:
            return f"{error.code}: {error.message}", None


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEPS, min_size=1, max_size=12))
def test_asking_again_says_what_asking_for_the_first_time_would(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    """Law: whatever happened since, a reader that remembers and one that does not come to the same verdict."""
    world = World(tmp_path_factory.mktemp("world"))
    for step, number in steps:
        world.do(step, number)
        for name in NAMES:
            expected, _ = world.verdict(world.fresh, name, None)
            found, world.known[name] = world.verdict(world.polling, name, world.known.get(name))
            assert found == expected, (step, name)
