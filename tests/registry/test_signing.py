"""Model Signing bundles and DSSE statements: made, verified, and refused in every other form."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_registry.errors import SettingsError, SignatureInvalidError
from loraplex_registry.format.canonical import b64decode, b64encode, canonical
from loraplex_registry.signing import (
    IN_TOTO_TYPE,
    Signer,
    generate_key,
    load_public_key,
    load_signer,
    read_bundle,
    sign_envelope,
    sign_files,
    verify_bundle,
    verify_envelope,
)

FILES = {"adapter_config.json": "1" * 64, "adapter_model.safetensors": "2" * 64}


@pytest.fixture(scope="session")
def acme(keys: Path) -> Signer:
    return load_signer(keys / "acme.key")


@pytest.fixture(scope="session")
def bundle(acme: Signer) -> dict[str, Any]:
    return sign_files(FILES, acme, subject="acme/orders@1")


@pytest.mark.parametrize("algorithm", ["ecdsa-p256", "ecdsa-p384", "ecdsa-p521", "ed25519"])
def test_every_algorithm_signs_and_verifies(algorithm: str, tmp_path: Path) -> None:
    generate_key(tmp_path / "k.key", algorithm=algorithm)
    signer, public = load_signer(tmp_path / "k.key"), load_public_key(tmp_path / "k.pub")
    assert signer.public_key == public
    assert public.algorithm == algorithm
    assert verify_bundle(sign_files(FILES, signer, subject="x"), public) == FILES


def test_the_private_key_is_for_its_owner_alone_and_is_never_overwritten(tmp_path: Path) -> None:
    generate_key(tmp_path / "k.key")
    assert (tmp_path / "k.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(SettingsError, match="never overwritten"):
        generate_key(tmp_path / "k.key")


def test_a_key_with_passphrase_needs_it(tmp_path: Path) -> None:
    generate_key(tmp_path / "k.key", "correct horse")
    load_signer(tmp_path / "k.key", "correct horse")
    for wrong in (None, "battery staple"):
        with pytest.raises(SettingsError, match="passphrase") as caught:
            load_signer(tmp_path / "k.key", wrong)
        assert "horse" not in str(caught.value)
        assert "staple" not in str(caught.value)


def test_a_signer_does_not_show_its_secret(acme: Signer) -> None:
    assert repr(acme) == f"Signer({acme.keyid[:16]}…)"


def test_the_bundle_is_the_standards_form(bundle: dict[str, Any], acme: Signer) -> None:
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    assert bundle["verificationMaterial"]["publicKey"]["hint"] == acme.keyid
    statement = json.loads(b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["predicateType"] == "https://model_signing/signature/v1.0"
    assert statement["predicate"]["serialization"]["method"] == "files"
    assert [item["name"] for item in statement["predicate"]["resources"]] == sorted(FILES)


def test_another_key_does_not_verify(bundle: dict[str, Any], keys: Path) -> None:
    with pytest.raises(SignatureInvalidError, match="names key") as caught:
        verify_bundle(bundle, load_public_key(keys / "globex.pub"))
    assert caught.value.code == "SIGNATURE_INVALID"


def test_a_hint_exchanged_for_an_allowed_key_does_not_verify(bundle: dict[str, Any], keys: Path) -> None:
    other = load_public_key(keys / "globex.pub")
    forged = copy.deepcopy(bundle)
    forged["verificationMaterial"]["publicKey"]["hint"] = other.keyid
    forged["dsseEnvelope"]["signatures"][0]["keyid"] = other.keyid
    with pytest.raises(SignatureInvalidError):
        verify_bundle(forged, other)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_character_of_a_bundle_is_refused(
    data: st.DataObject, bundle: dict[str, Any], acme: Signer
) -> None:
    text = json.dumps(bundle)
    position = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(
        st.characters(min_codepoint=33, max_codepoint=126).filter(lambda c: c != text[position])
    )
    try:
        changed = json.loads(text[:position] + character + text[position + 1 :])
    except ValueError:
        return
    if changed == bundle:
        return
    with pytest.raises(SignatureInvalidError):
        verify_bundle(changed, acme.public_key)


def resigned(bundle: dict[str, Any], signer: Signer, change: Any) -> dict[str, Any]:
    """The bundle with its statement changed and signed again by the right key."""
    statement = json.loads(b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    return {**bundle, "dsseEnvelope": sign_envelope(canonical(statement), IN_TOTO_TYPE, signer)}


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"),
        lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"),
        lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
        lambda s: s["predicate"]["serialization"].update(method="shards", shard_size=1),
        lambda s: s["predicate"]["serialization"].update(hash_type="blake2b"),
        lambda s: s["predicate"]["serialization"].update(allow_symlinks=True),
        lambda s: s["predicate"]["serialization"].update(allow_symlinks=0),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=["adapter_model.bin"]),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=["adapter_config.json"]),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=["."]),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=["../model.sig"]),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=["sub/model.sig"]),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=[".git/x"]),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=[".sig"]),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=[".git"] * 9),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=".git"),
        lambda s: s["predicate"]["serialization"].update(ignore_paths=[1]),
        lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]),
        lambda s: s["predicate"]["resources"].clear(),
        lambda s: s["predicate"]["resources"][0].update(algorithm="md5"),
        lambda s: s["predicate"]["resources"][0].update(digest="3" * 64),
        lambda s: s["predicate"].update(extra=1),
        lambda s: s["subject"].append(s["subject"][0]),
        lambda s: s["subject"][0]["digest"].update(sha256="0" * 64),
    ],
)
def test_a_signed_statement_of_another_form_is_refused(
    change: Any, bundle: dict[str, Any], acme: Signer
) -> None:
    with pytest.raises(SignatureInvalidError):
        verify_bundle(resigned(bundle, acme, change), acme.public_key)


def test_an_ignored_path_may_not_be_a_signed_file_in_any_case(acme: Signer) -> None:
    signed = sign_files({**FILES, "Model.sig": "3" * 64}, acme, subject="x")
    forged = resigned(
        signed, acme, lambda s: s["predicate"]["serialization"].update(ignore_paths=["model.sig"])
    )
    with pytest.raises(SignatureInvalidError, match="ignored"):
        verify_bundle(forged, acme.public_key)


def test_what_the_stock_tool_always_ignores_is_accepted(bundle: dict[str, Any], acme: Signer) -> None:
    stock = [".gitignore", "model.sig", ".github", ".gitattributes", ".git"]
    changed = resigned(bundle, acme, lambda s: s["predicate"]["serialization"].update(ignore_paths=stock))
    assert verify_bundle(changed, acme.public_key) == FILES


def test_a_bundle_file_of_another_tool_gets_the_one_spelling(bundle: dict[str, Any], acme: Signer) -> None:
    foreign = copy.deepcopy(bundle)
    foreign["dsseEnvelope"]["signatures"][0]["keyid"] = ""
    with pytest.raises(SignatureInvalidError):
        verify_bundle(foreign, acme.public_key)
    assert read_bundle(json.dumps(foreign, indent=2).encode()) == bundle
    assert read_bundle(canonical(bundle)) == bundle


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"a":1,"a":2}', b"[" * 5000, b'"' + b"a" * (1 << 19) + b'"']
)
def test_a_file_that_is_no_bundle_is_refused(body: bytes) -> None:
    with pytest.raises(SignatureInvalidError):
        read_bundle(body)


def test_the_same_statement_signed_again_is_accepted(bundle: dict[str, Any], acme: Signer) -> None:
    assert verify_bundle(resigned(bundle, acme, lambda statement: None), acme.public_key) == FILES


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(mediaType="application/vnd.dev.sigstore.bundle+json;version=0.2"),
        lambda b: b["verificationMaterial"]["publicKey"].clear(),
        lambda b: b["verificationMaterial"]["publicKey"].update(hint=""),
        lambda b: b["verificationMaterial"]["tlogEntries"].append({}),
        lambda b: b["verificationMaterial"].update(certificate={}),
        lambda b: b["dsseEnvelope"]["signatures"].clear(),
        lambda b: b["dsseEnvelope"]["signatures"].append(b["dsseEnvelope"]["signatures"][0]),
        lambda b: b["dsseEnvelope"].update(payloadType="text/plain"),
        lambda b: b["dsseEnvelope"].update(payload=b64encode(b"{}")),
        lambda b: b.pop("dsseEnvelope"),
        lambda b: b.update(extra=1),
    ],
)
def test_a_bundle_of_another_form_is_refused(change: Any, bundle: dict[str, Any], acme: Signer) -> None:
    changed = copy.deepcopy(bundle)
    change(changed)
    with pytest.raises(SignatureInvalidError):
        verify_bundle(changed, acme.public_key)


def test_an_adapter_signature_does_not_pass_for_another_statement(
    bundle: dict[str, Any], acme: Signer
) -> None:
    with pytest.raises(SignatureInvalidError):
        verify_envelope(bundle["dsseEnvelope"], "application/vnd.loraplex.tag.v1+json", acme.public_key)


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_a_damaged_key_file_is_refused(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(body)
    for load in (load_public_key, load_signer):
        with pytest.raises(SettingsError, match="cannot be read"):
            load(tmp_path / "k")
    os.unlink(tmp_path / "k")
    with pytest.raises(SettingsError, match="keys gen"):
        load_signer(tmp_path / "k")
