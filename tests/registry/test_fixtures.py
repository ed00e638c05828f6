"""Registries written by earlier releases are read and verified for ever."""

import datetime as dt
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from loraplex_registry.encryption.key_providers import KeyRing
from loraplex_registry.errors import RegistryError
from loraplex_registry.lifecycle.audit import AuditLog
from loraplex_registry.lifecycle.fsck import check
from loraplex_registry.lifecycle.fsck_adapter import Depth, opener_of
from loraplex_registry.lifecycle.history import tag_history
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import load_public_key
from loraplex_registry.storage.store import open_store
from loraplex_registry.trust.policy import TrustPolicy
from loraplex_registry.trust.verifier import Verifier
from loraplex_registry.validation.weights import WEIGHTS_NAME

FMT1 = Path(__file__).parent / "fixtures" / "fmt1"
EXPECTED = json.loads((FMT1 / "expected.json").read_text())
NOW = dt.datetime(2027, 1, 1, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policy, public keys and the encryption key; a key file must be for its owner alone, which git does not keep."""
    place = tmp_path_factory.mktemp("trust")
    shutil.copytree(FMT1 / "trust", place, dirs_exist_ok=True)
    (place / "acme.kek").chmod(0o600)
    return place


@pytest.fixture
def old(trust: Path) -> tuple[Registry, Verifier]:
    """The registry and what decides about it."""
    keys = KeyRing([f"file:{trust / 'acme.kek'}"])
    registry = Registry(open_store((FMT1 / "registry").as_uri()), clock=lambda: NOW, keys=keys)
    policy = TrustPolicy.load(trust / "policy.toml")
    return registry, Verifier(registry, policy, refresh_s=0, now=lambda: NOW)


@pytest.mark.parametrize("text", EXPECTED["refs"])
def test_every_reference_means_what_it_meant(
    text: str, old: tuple[Registry, Verifier], tmp_path: Path
) -> None:
    registry, verifier = old
    expected = EXPECTED["refs"][text]
    if "refused" in expected:
        with pytest.raises(RegistryError) as caught:
            verifier.verify(AdapterRef.parse(text))
        assert caught.value.code == expected["refused"]
        return
    verified = verifier.verify(AdapterRef.parse(text))
    assert verified.digest == expected["digest"]
    registry.pull(verified, tmp_path / "pulled")
    weights = (tmp_path / "pulled" / WEIGHTS_NAME).read_bytes()
    assert hashlib.sha256(weights).hexdigest() == expected["weights"]


def test_a_digest_still_names_its_version(old: tuple[Registry, Verifier]) -> None:
    for text, expected in EXPECTED["refs"].items():
        if "refused" not in expected:
            ref = AdapterRef.parse(text)
            by_digest = AdapterRef(ref.tenant, ref.adapter, digest=expected["digest"])
            assert old[1].verify(by_digest).digest == expected["digest"]


def test_the_history_of_every_tag_is_whole(old: tuple[Registry, Verifier]) -> None:
    orders = AdapterRef("acme", "orders")
    moves = {tag: len(list(tag_history(old[0].store, orders, tag))) for tag in ("canary", "old", "prod")}
    assert moves == {"canary": 2, "old": 2, "prod": 1}


def test_the_audit_log_is_whole(old: tuple[Registry, Verifier], trust: Path) -> None:
    keys = [load_public_key(path) for path in trust.glob("*.pub")]
    report = AuditLog(old[0].store, "acme").verify({key.keyid: key for key in keys}.get)
    assert [report.entries, report.head] == EXPECTED["audit"]
    assert (report.findings, report.unknown) == ((), ())


def test_a_check_of_everything_finds_no_damage(old: tuple[Registry, Verifier], trust: Path) -> None:
    keys = KeyRing([f"file:{trust / 'acme.kek'}"])
    report = check(old[0].store, Depth(now=NOW, deep=True, judge=None, opener=opener_of(keys)))
    assert [finding for finding in report.findings if finding.severity == "damage"] == []
