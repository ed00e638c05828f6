"""Statements about a version: made, verified for that version alone, and refused in every other form."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_registry.errors import SettingsError, SignatureInvalidError
from loraplex_registry.format.canonical import b64decode, canonical
from loraplex_registry.refs import AdapterRef
from loraplex_registry.signing import Signer, cosign_envelope, load_signer, sign_envelope
from loraplex_registry.signing.attestations import (
    SLSA_PROVENANCE,
    make_attestation,
    read_predicate,
    subject_name,
    verify_attestations,
)
from loraplex_registry.signing.bundles import IN_TOTO_TYPE, PREDICATE_TYPE, sign_files, verify_bundle

REF = AdapterRef("acme", "orders")
DIGEST = "sha256:" + "7" * 64
SUBJECT = "acme/orders@3"
EVALUATION = "https://acme.example/evaluation/v1"
PROVENANCE = {
    "buildDefinition": {"buildType": "https://acme.example/train/v1", "externalParameters": {"epochs": 3}},
    "runDetails": {"builder": {"id": "https://acme.example/trainer"}},
}


@pytest.fixture(scope="session")
def acme(keys: Path) -> Signer:
    return load_signer(keys / "acme.key")


@pytest.fixture(scope="session")
def globex(keys: Path) -> Signer:
    return load_signer(keys / "globex.key")


def attest(signer: Signer, **changes: Any) -> dict[str, Any]:
    good = {
        "ref": REF,
        "version": 3,
        "digest": DIGEST,
        "predicate_type": SLSA_PROVENANCE,
        "predicate": PROVENANCE,
    }
    return make_attestation(**{**good, **changes}, signer=signer)


def test_provenance_verifies_for_its_version_and_says_who_built_it(acme: Signer) -> None:
    envelope = attest(acme)
    (found,) = verify_attestations([envelope], SUBJECT, DIGEST, [acme.public_key])
    assert found.predicate == PROVENANCE
    assert found.builder_id == "https://acme.example/trainer"
    assert found.keyids == (acme.keyid,)
    statement = json.loads(b64decode(envelope["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": SUBJECT, "digest": {"sha256": "7" * 64}}]
    assert envelope["payloadType"] == "application/vnd.in-toto+json"


@settings(max_examples=40, deadline=None)
@given(
    predicate=st.dictionaries(
        st.text(max_size=10),
        st.none() | st.booleans() | st.integers(1 - 2**53, 2**53 - 1) | st.text(max_size=20),
    )
)
def test_any_predicate_comes_back_as_it_was_stated(predicate: dict[str, Any], acme: Signer) -> None:
    envelope = attest(acme, predicate_type=EVALUATION, predicate=predicate)
    (found,) = verify_attestations([envelope], SUBJECT, DIGEST, [acme.public_key])
    assert (found.predicate, found.predicate_type, found.builder_id) == (predicate, EVALUATION, None)


@pytest.mark.parametrize(
    ("subject", "digest"),
    [
        ("acme/orders@4", DIGEST),
        ("globex/orders@3", DIGEST),
        ("acme/orders2@3", DIGEST),
        (SUBJECT, "sha256:" + "8" * 64),
    ],
)
def test_a_statement_counts_for_no_other_version(subject: str, digest: str, acme: Signer) -> None:
    with pytest.raises(SignatureInvalidError, match="was signed for"):
        verify_attestations([attest(acme)], subject, digest, [acme.public_key])


def test_statements_of_unknown_keys_are_left_out(acme: Signer, globex: Signer) -> None:
    kept = [attest(globex), attest(acme, predicate_type=EVALUATION, predicate={"score": 0.5}), attest(globex)]
    found = verify_attestations(kept, SUBJECT, DIGEST, [acme.public_key])
    assert [item.predicate_type for item in found] == [EVALUATION]
    assert verify_attestations(kept, SUBJECT, DIGEST, []) == []


def test_several_keys_may_sign_one_statement(acme: Signer, globex: Signer) -> None:
    envelope = cosign_envelope(attest(acme), globex)
    (found,) = verify_attestations([envelope], SUBJECT, DIGEST, [globex.public_key, acme.public_key])
    assert found.keyids == tuple(sorted([acme.keyid, globex.keyid]))
    (found,) = verify_attestations([envelope], SUBJECT, DIGEST, [globex.public_key])
    assert found.keyids == (globex.keyid,)


def test_a_changed_statement_of_a_known_key_is_an_error_not_an_omission(acme: Signer) -> None:
    envelope = attest(acme)
    other = attest(acme, predicate_type=EVALUATION, predicate={})
    with pytest.raises(SignatureInvalidError, match="does not verify"):
        verify_attestations([{**envelope, "payload": other["payload"]}], SUBJECT, DIGEST, [acme.public_key])


def test_model_signatures_and_attestations_do_not_pass_for_each_other(acme: Signer) -> None:
    bundle = sign_files({"a": "7" * 64}, acme, subject=SUBJECT)
    with pytest.raises(SignatureInvalidError, match="model signature"):
        verify_attestations([bundle["dsseEnvelope"]], SUBJECT, DIGEST, [acme.public_key])
    with pytest.raises(SettingsError, match="model signature"):
        attest(acme, predicate_type=PREDICATE_TYPE, predicate={})
    with pytest.raises(SignatureInvalidError, match="predicate type"):
        verify_bundle({**bundle, "dsseEnvelope": attest(acme)}, acme.public_key)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
        lambda s: s.update(predicateType="http://acme.example/x"),
        lambda s: s.update(predicateType="https://a b"),
        lambda s: s.update(predicateType="https://" + "x" * 300),
        lambda s: s.update(predicateType=None),
        lambda s: s.update(predicate=[]),
        lambda s: s.update(predicate=None),
        lambda s: s.update(more=1),
        lambda s: s["subject"].append(s["subject"][0]),
        lambda s: s["subject"].clear(),
        lambda s: s["subject"][0].update(uri="x"),
        lambda s: s["subject"][0].update(name=1),
        lambda s: s["subject"][0]["digest"].update(sha512="0"),
        lambda s: s["subject"][0].update(digest={}),
        lambda s: s["subject"][0]["digest"].update(sha256="7" * 63 + "A"),
        lambda s: s["predicate"].pop("runDetails"),
        lambda s: s["predicate"].update(buildDefinition=1),
    ],
)
def test_a_signed_statement_of_another_form_is_refused(change: Any, acme: Signer) -> None:
    statement = json.loads(b64decode(attest(acme)["payload"]))
    change(statement)
    envelope = sign_envelope(canonical(statement), IN_TOTO_TYPE, acme)
    with pytest.raises(SignatureInvalidError):
        verify_attestations([envelope], SUBJECT, DIGEST, [acme.public_key])


@pytest.mark.parametrize(
    "changes",
    [
        {"predicate_type": "slsa"},
        {"predicate_type": "http://acme.example/x"},
        {"predicate": {}},
        {"predicate": {"buildDefinition": {}, "runDetails": {}}},
        {"predicate_type": EVALUATION, "predicate": {"x": 2**60}},
        {"predicate_type": EVALUATION, "predicate": {"x": float("nan")}},
        {"predicate_type": EVALUATION, "predicate": {"x": "y" * 50_000}},
    ],
)
def test_what_would_not_be_accepted_is_not_made(changes: dict[str, Any], acme: Signer) -> None:
    with pytest.raises(SettingsError):
        attest(acme, **changes)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":"' + b"x" * (1 << 17) + b'"}']
)
def test_a_predicate_file_is_read_strictly(body: bytes) -> None:
    with pytest.raises(SettingsError):
        read_predicate(body)
    assert read_predicate(b' {"a": 1} ') == {"a": 1}


def test_the_subject_is_the_versions_name() -> None:
    assert subject_name(REF, 3) == SUBJECT
    assert subject_name(REF, "1.2.0-rc.1") == "acme/orders@1.2.0-rc.1"
