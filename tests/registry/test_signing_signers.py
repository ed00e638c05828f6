"""Signers outside this process: a real KMS, what a broken keeper returns, and URIs that are refused early."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import CryptoSigner, Signature, SSlibKey

from loraplex_examples import s3_server
from loraplex_registry.errors import SettingsError, SignatureInvalidError
from loraplex_registry.signing import Signer, sign_envelope, sign_files, verify_bundle, verify_envelope
from loraplex_registry.signing.envelopes import pae
from loraplex_registry.signing.keys import ALGORITHMS, generate_key, load_public_key
from loraplex_registry.signing.signers import EXTRAS, RemoteSigner, is_signer_uri, load_signer

FILES = {"adapter_config.json": "1" * 64, "adapter_model.safetensors": "2" * 64}
GCP_KEY = "projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"


@pytest.fixture(scope="session")
def kms(s3: s3_server.S3Server) -> Any:
    """A client of the KMS of the same server that answers for S3."""
    import boto3

    return boto3.client("kms")


def new_kms_key(kms: Any, spec: str) -> str:
    return str(kms.create_key(KeySpec=spec, KeyUsage="SIGN_VERIFY")["KeyMetadata"]["KeyId"])


@pytest.mark.parametrize(
    ("spec", "algorithm"), [("ECC_NIST_P256", "ecdsa-p256"), ("ECC_NIST_P384", "ecdsa-p384")]
)
def test_a_key_in_aws_kms_signs_bundles_and_statements(spec: str, algorithm: str, kms: Any) -> None:
    keyid = new_kms_key(kms, spec)
    kms.create_alias(AliasName=f"alias/{algorithm}", TargetKeyId=keyid)
    signer = load_signer(f"awskms:alias/{algorithm}")
    assert signer.public_key == load_signer(f"awskms:{keyid}").public_key
    assert signer.public_key.algorithm == algorithm
    assert verify_bundle(sign_files(FILES, signer, subject="x"), signer.public_key) == FILES
    assert verify_envelope(sign_envelope(b"p", "t", signer), "t", signer.public_key) == b"p"


def test_a_kms_key_of_a_kind_we_do_not_verify_with_is_refused(kms: Any) -> None:
    with pytest.raises(SettingsError, match="unknown kind"):
        load_signer(f"awskms:{new_kms_key(kms, 'RSA_2048')}")


def test_a_kms_key_that_does_not_exist_is_named(kms: Any) -> None:
    with pytest.raises(SettingsError, match=r"awskms:alias/absent cannot be used \(NotFoundException\)"):
        load_signer("awskms:alias/absent")


def test_a_kms_key_that_was_disabled_says_so_when_signing(kms: Any) -> None:
    keyid = new_kms_key(kms, "ECC_NIST_P256")
    signer = load_signer(f"awskms:{keyid}")
    kms.disable_key(KeyId=keyid)
    with pytest.raises(SettingsError, match=r"could not sign .*Disabled"):
        signer.sign(b"x")


@pytest.mark.parametrize(
    ("uri", "flag"),
    [
        (f"gcpkms:{GCP_KEY}", "_gcp_signer.GCP_IMPORT_ERROR"),
        ("azurekms://acme-vault.vault.azure.net/keys/adapters", "_azure_signer.AZURE_IMPORT_ERROR"),
        ("hsm:", "_hsm_signer.PKCS11_IMPORT_ERROR"),
        ("hsm:2?label=Token+1", "_hsm_signer.PKCS11_IMPORT_ERROR"),
        ("hv:adapters", "_vault_signer.VAULT_IMPORT_ERROR"),
        ("hv:adapters/3", "_vault_signer.VAULT_IMPORT_ERROR"),
    ],
)
def test_a_missing_extra_is_named(uri: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"securesystemslib.signer.{flag}", "not installed")  # whatever is installed here
    with pytest.raises(SettingsError, match=rf"loraplex\[{EXTRAS[uri.partition(':')[0]]}\]"):
        load_signer(uri, "1234")


@pytest.mark.parametrize(
    "uri",
    [
        "awskms:",
        "awskms:a b",
        "gcpkms:projects/p",
        f"gcpkms:{GCP_KEY}/..",
        "azurekms:keys/a",
        "azurekms://evil.example/keys/a",
        "azurekms://a.vault.azure.net.evil.example/keys/a",
        "azurekms://abc.vault.azure.net/secrets/a",
        "azurekms://abc.vault.azure.net/keys/a?x=1",
        "azurekms://user@abc.vault.azure.net/keys/a",
        "hsm:abc",
        "hsm:-1",
        "hsm:1?pin=1234",
        "hsm:1?label=a&pin=1",
        "hsm:1?label",
        "hv:",
        "hv:a/b/c",
        "hv:../a",
        "hv:a/x",
        "hv:a\n",
        "awskms:" + "a" * 600,
    ],
)
def test_a_uri_out_of_shape_never_reaches_a_library(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(SettingsError, match="not written like"):
        load_signer(uri)


def test_paths_are_no_uris(tmp_path: Path) -> None:
    assert not any(map(is_signer_uri, ["keys/acme.key", "/a/b:c", "./hsm:1", "hsmx:1", "", "C:/k"]))
    assert all(map(is_signer_uri, ["awskms:x", "hsm:", "hv:a", "gcpkms:p", "azurekms://v"]))


class FakeSigner:
    """What a signer class of securesystemslib offers, around a key file."""

    def __init__(self, inner: Any, ask: Callable[[str], str] | None = None) -> None:
        self._inner, self._ask = inner, ask

    def sign(self, message: bytes) -> Any:
        if self._ask is not None:
            self._ask("pin")
        return Signature(self._inner.keyid, self._inner.sign(message).hex())


def reported(signer: Signer) -> SSlibKey:
    """The public key as a service reports it."""
    return SSlibKey.from_crypto(load_pem_public_key(signer.public_key.pem.encode()), signer.keyid)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_signatures_are_those_of_the_reference_library(algorithm: str, tmp_path: Path) -> None:
    """securesystemslib, which other DSSE tools use, verifies what we sign, and we verify what it signs."""
    public = generate_key(tmp_path / "k.key", algorithm=algorithm)
    ours = load_signer(tmp_path / "k.key")
    theirs = CryptoSigner(load_pem_private_key((tmp_path / "k.key").read_bytes(), None), reported(ours))
    message = pae(b"payload", "application/x")
    assert message == Envelope(b"payload", "application/x", {}).pae()
    reported(ours).verify_signature(Signature(ours.keyid, ours.sign(message).hex()), message)
    public.check(bytes.fromhex(theirs.sign(message).signature), message)
    with pytest.raises(UnverifiedSignatureError):
        reported(ours).verify_signature(Signature(ours.keyid, ours.sign(b"x").hex()), message)
    for wrong in (ours.sign(b"x"), b"", b"\x30\x00", bytes(64), bytes(200)):
        with pytest.raises(SignatureInvalidError):
            public.check(wrong, message)


@pytest.mark.parametrize("name", ["acme", "acme25519"])
def test_any_signer_of_the_library_works_end_to_end(
    name: str, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import securesystemslib.signer

    local = load_signer(keys / f"{name}.key")
    asked = []

    class Token:
        @classmethod
        def import_(cls, number: int | None, label: str | None, secrets_handler: Any) -> tuple[str, Any]:
            assert (number, label) == (7, "Token 1")
            return "hsm:7?label=Token+1", reported(local)

        @classmethod
        def from_priv_key_uri(cls, uri: str, key: Any, handler: Any) -> FakeSigner:
            return FakeSigner(local, lambda question: asked.append(handler(question)) or "")

    monkeypatch.setattr(securesystemslib.signer, "HSMSigner", Token)
    signer = load_signer("hsm:7?label=Token+1", "123456")
    assert signer.public_key == load_public_key(keys / f"{name}.pub")
    assert verify_bundle(sign_files(FILES, signer, subject="x"), signer.public_key) == FILES
    assert asked == ["123456"]
    with pytest.raises(SettingsError, match="needs its PIN") as caught:
        load_signer("hsm:7?label=Token+1").sign(b"x")
    assert "123456" not in str(caught.value)


def test_an_old_version_of_a_vault_key_is_refused(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import securesystemslib.signer

    local = load_signer(keys / "acme25519.key")

    class Vault:
        @classmethod
        def import_(cls, name: str) -> tuple[str, Any]:
            return f"hv:{name}/12", reported(local)

        @classmethod
        def from_priv_key_uri(cls, uri: str, key: Any, handler: Any) -> FakeSigner:
            return FakeSigner(local)

    monkeypatch.setattr(securesystemslib.signer, "VaultSigner", Vault)
    assert load_signer("hv:adapters/12").sign(b"x") == load_signer("hv:adapters").sign(b"x")
    for old in ("hv:adapters/2", "hv:adapters/11"):
        with pytest.raises(SettingsError, match="newest"):
            load_signer(old)


def test_a_keeper_that_signs_with_another_key_is_found_out_before_anything_is_published(keys: Path) -> None:
    acme, globex = load_signer(keys / "acme.key"), load_signer(keys / "globex.key")
    with pytest.raises(SettingsError, match="does not verify with its public key"):
        RemoteSigner(globex.sign, acme.public_key).sign(b"x")


def test_a_keepers_error_text_is_not_passed_on(keys: Path) -> None:
    def broken(message: bytes) -> bytes:
        raise OSError("token=s3cr3t")

    signer = RemoteSigner(broken, load_public_key(keys / "acme.pub"))
    with pytest.raises(SettingsError, match="OSError") as caught:
        signer.sign(b"x")
    assert "s3cr3t" not in str(caught.value)
