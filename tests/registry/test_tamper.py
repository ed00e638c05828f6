"""Whoever can write to the store, and holds no key, cannot make one wrong byte be used."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_registry.errors import DamagedError, DigestMismatchError, RegistryError, SignatureInvalidError
from loraplex_registry.format.canonical import b64decode, b64encode, canonical
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.storage.store import open_store
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.base import BaseModel
from tests.registry import builders, tampering

REASONS = {"SIGNATURE_INVALID", "DIGEST_MISMATCH", "POLICY_REFUSED", "ADAPTER_NOT_FOUND"}


class World:
    """A registry with acme/orders@1 tagged prod, its files at hand to be changed, and a policy that trusts it."""

    def __init__(self, place: Path, keys: Path, base: BaseModel) -> None:
        self.root = place / "registry"
        self.cache = place / "cache"
        self.base = base
        self.registry = Registry(open_store(self.root.as_uri()))
        self.registry.initialise()
        signer = builders.load_signer(keys / "acme.key")
        self.registry.publish(
            builders.make_adapter(place / "orders"), AdapterRef.parse("acme/orders@prod"), signer, base
        )
        self.record = self.root / "t/acme/a/orders/v/1.json"
        self.tag = self.root / "t/acme/a/orders/tags/prod.json"
        (self.blob,) = (self.root / "t/acme/a/orders/b").glob("*/0")
        self.blob.chmod(0o644)

    def load(self, text: str, policy: TrustPolicy) -> str:
        """Resolve, verify and fetch; return the digest."""
        verified = self.registry.verify(self.registry.resolve(AdapterRef.parse(text)), policy)
        return self.registry.fetch(verified, self.cache, base=self.base).digest


@pytest.fixture
def world(tmp_path: Path, keys: Path, base: BaseModel) -> World:
    return World(tmp_path, keys, base)


def test_the_untouched_world_loads(world: World, policy: TrustPolicy) -> None:
    assert world.load("acme/orders@1", policy) == world.load("acme/orders@prod", policy)


@pytest.mark.parametrize("target", ["record", "tag", "blob"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_byte_anywhere_is_refused(
    target: str, world: World, policy: TrustPolicy, data: st.DataObject
) -> None:
    path: Path = getattr(world, target)
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(changed))
    shutil.rmtree(world.cache, ignore_errors=True)
    try:
        with pytest.raises(RegistryError) as caught:
            world.load("acme/orders@prod" if target == "tag" else "acme/orders@1", policy)
    finally:
        path.write_bytes(original)
    assert caught.value.code in REASONS
    if target == "blob":
        assert caught.value.code == "DIGEST_MISMATCH"
    assert list(world.cache.glob("*")) == []


@pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: body + b"x", lambda body: b""])
@pytest.mark.parametrize("target", ["record", "tag", "blob"])
def test_a_shorter_or_longer_object_is_refused(
    target: str, change: Callable[[bytes], bytes], world: World, policy: TrustPolicy
) -> None:
    path: Path = getattr(world, target)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RegistryError) as caught:
        world.load("acme/orders@prod" if target == "tag" else "acme/orders@1", policy)
    assert caught.value.code == "DIGEST_MISMATCH"


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(canonical(value))


def stored_config(record: dict[str, Any]) -> dict[str, Any]:
    return next(file for file in record["storage"]["files"] if file["name"] == "adapter_config.json")


def exchange_config(record: dict[str, Any]) -> None:
    body = b64decode(stored_config(record)["inline"]).replace(b'"r": 4', b'"r": 5')
    stored_config(record).update(inline=b64encode(body))


def exchange_config_with_digest(record: dict[str, Any]) -> None:
    import hashlib

    exchange_config(record)
    body = b64decode(stored_config(record)["inline"])
    stored_config(record).update(sha256=hashlib.sha256(body).hexdigest(), size=len(body))


def exchange_manifest(record: dict[str, Any]) -> None:
    manifest = json.loads(b64decode(record["manifest"]))
    manifest["lora"]["alpha"] = 16
    record["manifest"] = b64encode(canonical(manifest))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (exchange_config, DamagedError),
        (exchange_config_with_digest, DigestMismatchError),
        (exchange_manifest, DigestMismatchError),
        (lambda record: record["storage"]["files"].pop(), DigestMismatchError),
        (lambda record: record["storage"]["files"].reverse(), DigestMismatchError),
        (lambda record: record["bundle"].clear(), SignatureInvalidError),
        (lambda record: record.update(state="pending"), DamagedError),
        (lambda record: record.update(fmt=2), DamagedError),
        (lambda record: record.update(fmt=True), DamagedError),
        (lambda record: record.update(pid="0" * 32), DamagedError),
        (lambda record: record.update(attest=[1]), DamagedError),
    ],
)
def test_a_wellformed_record_that_was_changed_is_refused(
    change: Callable[[dict[str, Any]], object], error: type[RegistryError], world: World, policy: TrustPolicy
) -> None:
    edited(world.record, change)
    with pytest.raises(error):
        world.load("acme/orders@1", policy)


def transplant(world: World, to: str) -> None:
    """Copy everything of acme/orders to another name, as somebody with write access to the bucket could."""
    tenant, adapter = to.split("/")
    target = world.root / "t" / tenant / "a" / adapter
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(world.root / "t/acme/a/orders", target)


@pytest.mark.parametrize("name", ["globex/orders", "acme/billing", "globex/billing"])
@pytest.mark.parametrize("selector", ["@1", "@prod", ""])
def test_an_adapter_copied_to_another_name_is_refused(
    name: str, selector: str, world: World, keys: Path
) -> None:
    transplant(world, name)
    policy = builders.make_policy(
        keys,
        'version = 1\ndefault = "deny"\n'
        '[[rules]]\nscope = "acme/**"\nkeys = [{ path = "acme.pub" }]\n'
        '[[rules]]\nscope = "globex/**"\nkeys = [{ path = "globex.pub" }, { path = "acme.pub" }]\n',
    )
    with pytest.raises(SignatureInvalidError, match="signed as acme/orders@1"):
        world.load(name + selector, policy)


def test_another_tenants_key_does_not_count(world: World, keys: Path) -> None:
    with pytest.raises(SignatureInvalidError) as caught:
        world.load("acme/orders@1", builders.acme_policy(keys, key="globex"))
    assert caught.value.code == "SIGNATURE_INVALID"


def test_a_version_copied_to_another_number_is_refused(world: World, policy: TrustPolicy) -> None:
    record = json.loads(world.record.read_bytes())
    for file in record["storage"]["files"]:
        if "key" in file:
            source = world.root / "t/acme/a/orders" / file["key"]
            file["key"] = file["key"].replace("b/1~", "b/2~")
            target = world.root / "t/acme/a/orders" / file["key"]
            target.parent.mkdir()
            shutil.copy(source, target)
    (world.record.parent / "2.json").write_bytes(canonical(record))
    with pytest.raises(SignatureInvalidError, match="signed as acme/orders@1"):
        world.load("acme/orders@2", policy)
    with pytest.raises(SignatureInvalidError):
        world.load("acme/orders", policy)


def test_a_tag_copied_to_another_tag_is_refused(world: World, policy: TrustPolicy) -> None:
    shutil.copy(world.tag, world.tag.with_name("canary.json"))
    with pytest.raises(SignatureInvalidError, match="signed for acme/orders@prod"):
        world.load("acme/orders@canary", policy)


def test_a_tag_that_carries_another_version_than_was_signed_is_refused(
    world: World, policy: TrustPolicy, keys: Path, base: BaseModel, tmp_path: Path
) -> None:
    other = builders.make_adapter(tmp_path / "other", seed=5)
    world.registry.publish(
        other, AdapterRef.parse("acme/orders"), builders.load_signer(keys / "acme.key"), base
    )
    second = json.loads((world.record.parent / "2.json").read_bytes())
    edited(world.tag, lambda tag: tag.update(record=second))
    with pytest.raises(RegistryError) as caught:
        world.load("acme/orders@prod", policy)
    assert caught.value.code in REASONS


def test_an_adapter_signature_is_not_a_tag_statement(world: World, policy: TrustPolicy) -> None:
    edited(world.tag, lambda tag: tag.update(tag=copy.deepcopy(tag["record"]["bundle"]["dsseEnvelope"])))
    with pytest.raises(DamagedError):
        world.load("acme/orders@prod", policy)


def test_a_tag_signed_by_a_key_the_rule_does_not_list_is_refused(
    world: World, keys: Path, policy: TrustPolicy
) -> None:
    from loraplex_registry.format.tags import make_tag, read_tag

    tag = read_tag(world.tag.read_bytes(), where="x")
    world.tag.write_bytes(
        make_tag(tag.statement, tag.record, builders.load_signer(keys / "globex.key")).to_bytes()
    )
    with pytest.raises(SignatureInvalidError, match="The tag acme/orders@prod"):
        world.load("acme/orders@prod", policy)
    world.load("acme/orders@1", policy)


@pytest.fixture(scope="module")
def untouched() -> tampering.World:
    return tampering.new_world()


@pytest.mark.parametrize("what", tampering.TARGETS)
def test_a_share_of_all_bits_flipped_is_refused(what: str, untouched: tampering.World) -> None:
    tally = tampering.every_bit(untouched, what, share=0.01)
    tally.check()
    if what not in {"record", "tag"}:  # these two carry an attestation that nobody asks for
        assert tally.harmless == 0


def test_random_bits_of_the_weights_are_refused(untouched: tampering.World) -> None:
    tally = tampering.blob_bits(untouched, rounds=200)
    tally.check()
    assert tally.refused["DIGEST_MISMATCH"] == 200


def test_changed_fields_are_refused(untouched: tampering.World) -> None:
    tally = tampering.field_mutants(untouched, rounds=400)
    tally.check()
    assert tally.refused["ROLLBACK"] > 0, "no replay was tried"


def test_everything_under_another_name_is_refused(untouched: tampering.World) -> None:
    tally = tampering.Tally()
    tampering.transplants(untouched, tally)
    tally.check()
    assert tally.harmless == 0


def test_the_campaign_can_fail(untouched: tampering.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that takes any bytes for a manifest would be caught."""
    from loraplex_registry.signing.keys import PublicKey

    monkeypatch.setattr(PublicKey, "check", lambda *_: None)
    tally = tampering.every_bit(untouched, "signature", share=1.0)
    assert tally.accepted or tally.harmless
