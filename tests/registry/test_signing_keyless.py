"""Keyless signatures, offline: a private sigstore makes them, the real `sigstore` package verifies them.

The package is an optional extra and lives in the virtual environment of the stock Model Signing command, where these
verifications run, all in one process.
"""

import copy
import datetime as dt
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplex_registry.errors import SettingsError, SignatureInvalidError
from loraplex_registry.signing.bundles import (
    KeylessIdentity,
    bundle_identity,
    bundle_keyid,
    read_bundle,
    signed_files_unverified,
    verify_bundle_with,
)
from loraplex_registry.signing.keyless import KeylessAuthority
from tests.registry import stock
from tests.registry.keyless_world import IDENTITY, ISSUER, KeylessWorld

FILES = {"adapter_config.json": "1" * 64, "adapter_model.safetensors": "2" * 64}
NOW = dt.datetime(2026, 6, 1, 12, tzinfo=dt.UTC)

VERIFY = """
import datetime as dt, json, socket, sys
from loraplex_registry.signing.bundles import verify_bundle_with
from loraplex_registry.errors import RegistryError
from loraplex_registry.signing.keyless import KeylessAuthority

def refuse(*_, **__):
    raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse
now = dt.datetime(2026, 7, 1, tzinfo=dt.timezone.utc)
answers = {}
for name, case in json.load(open(sys.argv[1])).items():
    try:
        authority = KeylessAuthority(json.dumps(case["root"]).encode(), case["identity"], case["issuer"])
        answers[name] = verify_bundle_with(case["bundle"], authority, now)
    except RegistryError as error:
        answers[name] = f"{error.code}: {error.message}"
json.dump(answers, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="session")
def world() -> KeylessWorld:
    return KeylessWorld(NOW)


def other_root(world: KeylessWorld, **changes: Any) -> dict[str, Any]:
    other = KeylessWorld(NOW).trusted_root()
    return {**world.trusted_root(), **{key: other[key] for key in changes}}


def changed(bundle: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    copied = copy.deepcopy(bundle)
    change(copied)
    return copied


@pytest.fixture(scope="session")
def answers(world: KeylessWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real verifier says to every case."""
    good, second = world.sign(FILES), world.sign({"x": "3" * 64})
    material = "verificationMaterial"
    bundles = {
        "good": good,
        "seen by the log after the certificate ended": world.sign(FILES, late=dt.timedelta(minutes=11)),
        "no promise": changed(good, lambda b: b[material]["tlogEntries"][0].pop("inclusionPromise")),
        "no proof": changed(good, lambda b: b[material]["tlogEntries"][0].pop("inclusionProof")),
        "another time": changed(
            good, lambda b: b[material]["tlogEntries"][0].update(integratedTime="1780315300")
        ),
        "another entry": changed(
            good, lambda b: b[material].update(tlogEntries=second[material]["tlogEntries"])
        ),
        "another certificate": changed(
            good, lambda b: b[material].update(certificate=second[material]["certificate"])
        ),
        "another payload": changed(
            good, lambda b: b["dsseEnvelope"].update(payload=second["dsseEnvelope"]["payload"])
        ),
        "another signature": changed(
            good, lambda b: b["dsseEnvelope"].update(signatures=second["dsseEnvelope"]["signatures"])
        ),
        "two signatures": changed(
            good, lambda b: b["dsseEnvelope"]["signatures"].append(second["dsseEnvelope"]["signatures"][0])
        ),
        "another type": changed(good, lambda b: b["dsseEnvelope"].update(payloadType="text/plain")),
        "entries of nonsense": changed(good, lambda b: b[material].update(tlogEntries=[{"logIndex": []}])),
        "a log of another kind": changed(
            good, lambda b: b[material]["tlogEntries"][0]["kindVersion"].update(kind="hashedrekord")
        ),
    }
    usual = {"root": world.trusted_root(), "identity": IDENTITY, "issuer": ISSUER}
    cases = {name: {**usual, "bundle": bundle} for name, bundle in bundles.items()}
    for name, change in {
        "another identity": {"identity": "ci2@acme.example"},
        "another issuer": {"issuer": ISSUER + ".evil.example"},
        "a root with another authority": {"root": other_root(world, certificateAuthorities=1)},
        "a root with another certificate log": {"root": other_root(world, ctlogs=1)},
        "a root with another transparency log": {"root": other_root(world, tlogs=1)},
        "an empty root": {"root": {}},
        "a root without logs": {"root": {**world.trusted_root(), "tlogs": []}},
    }.items():
        cases[name] = {**usual, "bundle": good, **change}
    place: Path = tmp_path_factory.mktemp("keyless")
    (place / "cases.json").write_text(json.dumps(cases))
    done = stock.python(VERIFY, place / "cases.json", place / "answers.json", cwd=place)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((place / "answers.json").read_text())
    assert found.keys() == cases.keys()
    return found


def test_a_keyless_signature_verifies_offline_long_after_its_certificate_ended(
    answers: dict[str, Any],
) -> None:
    assert answers["good"] == FILES


def test_every_other_proof_identity_or_root_is_refused(answers: dict[str, Any]) -> None:
    refused = {name: answer for name, answer in answers.items() if name != "good"}
    assert len(refused) >= 18
    for name, answer in refused.items():
        assert isinstance(answer, str), (name, answer)
        assert answer.startswith("SIGNATURE_INVALID: "), (name, answer)


def test_a_keyless_bundle_names_its_certificate_and_is_no_key(world: KeylessWorld) -> None:
    bundle = world.sign(FILES)
    identity = bundle_identity(bundle)
    assert isinstance(identity, KeylessIdentity)
    assert signed_files_unverified(bundle) == FILES
    assert read_bundle(json.dumps(bundle).encode()) == bundle
    with pytest.raises(SignatureInvalidError, match="certificate"):
        bundle_keyid(bundle)


def test_a_missing_extra_is_named(world: KeylessWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sigstore", "sigstore.models"):
        monkeypatch.setitem(sys.modules, name, None)
    authority = KeylessAuthority(json.dumps(world.trusted_root()).encode(), IDENTITY, ISSUER)
    with pytest.raises(SettingsError, match=r"loraplex\[keyless\]"):
        verify_bundle_with(world.sign(FILES), authority, NOW)


@pytest.mark.parametrize(
    ("root", "identity", "issuer"),
    [
        (b"", IDENTITY, ISSUER),
        (b"[]", IDENTITY, ISSUER),
        (b"{}" + b" " * (1 << 20), IDENTITY, ISSUER),
        (b"{}", "", ISSUER),
        (b"{}", IDENTITY, "http://accounts.acme.example"),
        (b"{}", IDENTITY, ""),
    ],
)
def test_an_authority_out_of_shape_is_refused(root: bytes, identity: str, issuer: str) -> None:
    with pytest.raises(SettingsError):
        KeylessAuthority(root, identity, issuer)


def test_a_trusted_root_is_read_from_a_file_and_never_fetched(tmp_path: Path, world: KeylessWorld) -> None:
    with pytest.raises(SettingsError, match="nothing is trusted without it"):
        KeylessAuthority.load(tmp_path / "absent.json", IDENTITY, ISSUER)
    (tmp_path / "root.json").write_text(json.dumps(world.trusted_root()))
    assert KeylessAuthority.load(tmp_path / "root.json", IDENTITY, ISSUER).identity == IDENTITY
