"""Endless and slow data are bounded: bytes read, memory and time."""

import time
from pathlib import Path

import pytest

from loraplex_registry.delivery.cache import Cache
from loraplex_registry.delivery.handoff import hand_off
from loraplex_registry.errors import DigestMismatchError, RegistryError, StoreUnavailableError
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage.store import Store
from loraplex_registry.trust.verdict import TrustPolicy, VerifiedManifest
from loraplex_registry.validation.base import BaseModel
from tests.registry import endless, hostile

REF = AdapterRef.parse("acme/orders")


@pytest.fixture
def verified(
    local_registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy
) -> VerifiedManifest:
    local_registry.initialise()
    local_registry.publish(adapter, REF, signer, base)
    return local_registry.verify(local_registry.resolve(REF), policy)


@pytest.mark.parametrize("how", endless.WAYS)
def test_a_store_that_lies_about_length_is_left_after_one_piece_too_many(
    how: str, local: Store, verified: VerifiedManifest, base: BaseModel, tmp_path: Path
) -> None:
    store = endless.LyingStore(local, how)
    cache = Cache(tmp_path / "cache")
    before = hostile.reset_peak()
    with pytest.raises((DigestMismatchError, StoreUnavailableError)):
        hand_off(Registry(store), verified, cache, base=base, deadline_s=1.0)
    largest = 64 * endless.PIECE_BYTES if how == "huge piece" else endless.PIECE_BYTES
    assert store.given_bytes <= store.asked_bytes + largest
    assert store.pieces < 1000
    # Only the double itself makes a piece of 64 MiB.
    assert hostile.peak_bytes() - before < hostile.GROWTH_MAX + (largest if how == "huge piece" else 0)
    assert list(cache.root.iterdir()) == []


def test_a_store_that_drips_is_left_when_time_is_up(
    local: Store, verified: VerifiedManifest, base: BaseModel, tmp_path: Path
) -> None:
    store = endless.LyingStore(local, "drip")
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match=r"0\.2 s.*too slow"):
        hand_off(Registry(store), verified, Cache(tmp_path / "cache"), base=base, deadline_s=0.2)
    assert time.monotonic() - started < 20, "not bounded by the deadline at all"
    assert store.given_bytes < 200


@pytest.mark.parametrize("how", endless.WAYS)
def test_pulling_from_a_store_that_lies_ends_too(
    how: str, local: Store, verified: VerifiedManifest, base: BaseModel, tmp_path: Path
) -> None:
    if how == "drip":  # a person who pulls sees the bar and may interrupt
        return
    store = endless.LyingStore(local, how)
    with pytest.raises(RegistryError):
        Registry(store).pull(verified, tmp_path / "pulled")
    assert store.pieces < 1000
    assert not (tmp_path / "pulled").exists()
