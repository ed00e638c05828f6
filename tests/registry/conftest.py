"""Fixtures: one tiny base, a few keys, and every store the product has."""

import datetime as dt
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loraplex_examples import s3_server
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage.root_marker import examine
from loraplex_registry.storage.store import Store, open_store
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.base import BaseModel
from tests.registry import builders
from tests.registry.lab import Lab
from tests.registry.shell import Shell
from tests.sim import s3_proxy
from tests.sim.s3_proxy import S3Proxy

NOW = dt.datetime(2026, 6, 1, 12, 0, 0, tzinfo=dt.UTC)


@pytest.fixture(scope="session")
def s3() -> Iterator[s3_server.S3Server]:
    """A real S3 server on loopback; its environment is set for the whole session."""
    if s3_server.executable() is None:
        pytest.skip("ministack is not installed")
    with s3_server.running() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def bucket(s3: s3_server.S3Server) -> str:
    """One bucket; every store gets a prefix of its own in it."""
    return s3.make_bucket("loraplex-tests")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of key pairs: acme, globex (ECDSA P-256) and acme25519 (Ed25519)."""
    directory = tmp_path_factory.mktemp("keys")
    builders.make_signer(directory, "acme")
    builders.make_signer(directory, "globex")
    builders.make_signer(directory, "acme25519", algorithm="ed25519")
    return directory


@pytest.fixture
def signer(keys: Path) -> Signer:
    """The key of tenant acme."""
    return builders.load_signer(keys / "acme.key")


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base's checkpoint directory."""
    return builders.make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def base(base_directory: Path) -> BaseModel:
    """The tiny base."""
    return BaseModel.from_directory(base_directory)


@pytest.fixture
def policy(keys: Path) -> TrustPolicy:
    """Trusts acme's key for acme and nothing else."""
    return builders.acme_policy(keys)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A good adapter directory."""
    return builders.make_adapter(tmp_path / "orders")


_numbers = itertools.count()


def make_store(
    request: pytest.FixtureRequest, kind: str, directory: Path, *, endpoint_url: str | None = None
) -> Store:
    """Make an empty store: `memory`, `local` or `s3`."""
    number = next(_numbers)
    if kind == "memory":
        store = open_store("memory:")
    elif kind == "local":
        store = open_store((directory / f"store-{number}").as_uri())
    else:
        server, bucket = request.getfixturevalue("s3"), request.getfixturevalue("bucket")
        assert server.process.poll() is None
        store = open_store(f"{bucket}/some/prefix-{number}", endpoint_url=endpoint_url)
    store.prepare()
    return store


@pytest.fixture(params=["memory", "local", "s3"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Makes an empty store of each kind."""
    return lambda: make_store(request, request.param, tmp_path)


@pytest.fixture(scope="session")
def proxy(s3: s3_server.S3Server) -> Iterator[S3Proxy]:
    """A fault proxy in front of the S3 server, without faults until it is told."""
    with s3_proxy.running(int(s3.endpoint_url.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def store(new_store: Callable[[], Store]) -> Store:
    """One empty store of each kind."""
    return new_store()


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """One empty store in a directory."""
    store = open_store((tmp_path / "local").as_uri())
    store.prepare()
    return store


@dataclass
class Clock:
    """A clock that stands still until it is told."""

    now: dt.datetime = field(default=NOW)

    def __call__(self) -> dt.datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    """A clock at 2026-06-01 12:00 UTC."""
    return Clock()


@pytest.fixture
def registry(store: Store, clock: Clock) -> Registry:
    """A registry on each kind of store."""
    ready(store)
    return Registry(store, clock=clock)


def ready(store: Store) -> None:
    """Let a bucket be written to after a probe that is shorter than the product's."""
    if store.url.startswith("s3:"):
        examine(store, now=NOW, writers=2, rounds=1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A laboratory of this module's own, since its clock may be moved on."""
    return Lab.build(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def two(lab: Lab) -> Store:
    """Versions 1 and 2 of acme/orders; prod is at 1."""
    store, orders = open_store("memory:"), AdapterRef.parse("acme/orders")
    lab.push(store, orders, 0, tag="prod")
    lab.push(store, orders, 1)
    return store


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """The command, in a home where tenant acme has a registry."""
    return Shell.acme(tmp_path / "home")


@pytest.fixture
def local_registry(local: Store, clock: Clock) -> Registry:
    """A registry in a directory."""
    return Registry(local, clock=clock)
