"""Signatures made with certificates: explicit roots, the right name, the right use, and valid now."""

import copy
import datetime as dt
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from loraplex_registry.errors import ExpiredError, RegistryError, SettingsError, SignatureInvalidError
from loraplex_registry.signing.bundles import (
    CertificateIdentity,
    bundle_identity,
    bundle_keyid,
    verify_bundle,
    verify_bundle_with,
)
from loraplex_registry.signing.certificates import CHAIN_MAX, CertificateAuthority, verify_chain
from tests.registry.pki import DAY, SAN, Authority, Issued, issue, sign_with_certificate

NOW = dt.datetime(2026, 6, 1, 12, 0, 0, tzinfo=dt.UTC)
FILES = {"adapter_config.json": "1" * 64, "adapter_model.safetensors": "2" * 64}


@pytest.fixture(scope="session")
def acme() -> Authority:
    return Authority.make(NOW)


@pytest.fixture(scope="session")
def trust(acme: Authority) -> CertificateAuthority:
    return CertificateAuthority((acme.root.der,), SAN)


def verify(
    acme: Authority, leaf: Issued, trust: CertificateAuthority, now: dt.datetime = NOW
) -> dict[str, str]:
    return verify_bundle_with(sign_with_certificate(FILES, leaf, acme.intermediate), trust, now)


# The matrix of eight: one row passes.


def test_matrix_a_valid_certificate_verifies(acme: Authority, trust: CertificateAuthority) -> None:
    assert verify(acme, acme.leaf(), trust) == FILES


def test_matrix_an_expired_certificate_is_refused(acme: Authority, trust: CertificateAuthority) -> None:
    with pytest.raises(ExpiredError, match="current certificate"):
        verify(acme, acme.leaf(start=NOW - 400 * DAY, end=NOW - DAY), trust)


def test_matrix_a_certificate_not_yet_valid_is_refused(acme: Authority, trust: CertificateAuthority) -> None:
    with pytest.raises(ExpiredError):
        verify(acme, acme.leaf(start=NOW + DAY), trust)


def test_matrix_an_expired_intermediate_is_refused(acme: Authority) -> None:
    old = Authority.make(NOW, intermediate_end=NOW - DAY)
    leaf = old.leaf(start=NOW - 10 * DAY)
    bundle = sign_with_certificate(FILES, leaf, old.intermediate)
    trust = CertificateAuthority((old.root.der,), SAN)
    assert verify_bundle_with(bundle, trust, NOW - 2 * DAY) == FILES
    with pytest.raises(ExpiredError, match="Acme Issuing"):
        verify_bundle_with(bundle, trust, NOW)


def test_matrix_a_certificate_of_another_root_is_refused(acme: Authority) -> None:
    other = Authority.make(NOW, name="Globex")
    with pytest.raises(SignatureInvalidError, match="roots"):
        verify(acme, acme.leaf(), CertificateAuthority((other.root.der,), SAN))


def test_matrix_a_certificate_for_another_name_is_refused(
    acme: Authority, trust: CertificateAuthority
) -> None:
    leaf = acme.leaf(san=(x509.UniformResourceIdentifier(SAN + "2"),))
    with pytest.raises(SignatureInvalidError, match="the policy asks for"):
        verify(acme, leaf, trust)


@pytest.mark.parametrize(
    "usage",
    [
        (ExtendedKeyUsageOID.CLIENT_AUTH,),
        (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.EMAIL_PROTECTION),
        (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,),
        None,
    ],
)
def test_matrix_a_certificate_that_is_not_for_code_signing_is_refused(
    usage: Any, acme: Authority, trust: CertificateAuthority
) -> None:
    with pytest.raises(SignatureInvalidError):
        verify(acme, acme.leaf(usage=usage), trust)


def test_matrix_a_self_signed_certificate_is_refused_even_as_a_root(acme: Authority) -> None:
    alone = issue("release", None, start=NOW - DAY, end=NOW + DAY, san=(x509.UniformResourceIdentifier(SAN),))
    bundle = sign_with_certificate(FILES, alone)
    for root in (acme.root.der, alone.der):
        with pytest.raises(SignatureInvalidError):
            verify_bundle_with(bundle, CertificateAuthority((root,), SAN), NOW)


# What else must not pass.


def test_a_certificate_whose_key_usage_lacks_signing_is_refused(
    acme: Authority, trust: CertificateAuthority
) -> None:
    with pytest.raises(SignatureInvalidError):
        verify(acme, acme.leaf(digital_signature=False), trust)


def test_an_authority_itself_may_not_sign_adapters(acme: Authority, trust: CertificateAuthority) -> None:
    with pytest.raises(SignatureInvalidError):
        verify_bundle_with(sign_with_certificate(FILES, acme.intermediate), trust, NOW)


def test_a_leaf_cannot_issue_certificates(acme: Authority, trust: CertificateAuthority) -> None:
    good = acme.leaf()
    forged = issue("x", good, start=NOW - DAY, end=NOW + DAY, san=(x509.UniformResourceIdentifier(SAN),))
    with pytest.raises(SignatureInvalidError):
        verify_bundle_with(sign_with_certificate(FILES, forged, good, acme.intermediate), trust, NOW)


def test_a_root_in_the_bundle_is_not_trusted_for_being_there(
    acme: Authority, trust: CertificateAuthority
) -> None:
    other = Authority.make(NOW, name="Globex")
    bundle = sign_with_certificate(FILES, other.leaf(), other.intermediate, other.root)
    with pytest.raises(SignatureInvalidError):
        verify_bundle_with(bundle, trust, NOW)


def test_the_bundle_must_bring_its_intermediates(acme: Authority, trust: CertificateAuthority) -> None:
    with pytest.raises(SignatureInvalidError):
        verify_bundle_with(sign_with_certificate(FILES, acme.leaf()), trust, NOW)


def test_a_certificate_put_before_anothers_signature_is_refused(
    acme: Authority, trust: CertificateAuthority
) -> None:
    bundle = sign_with_certificate(FILES, acme.leaf(), acme.intermediate)
    other = sign_with_certificate(FILES, acme.leaf(), acme.intermediate)
    mixed = {**bundle, "verificationMaterial": other["verificationMaterial"]}
    with pytest.raises(SignatureInvalidError, match="two keys"):
        verify_bundle_with(mixed, trust, NOW)
    mixed = copy.deepcopy(mixed)
    mixed["dsseEnvelope"]["signatures"][0]["keyid"] = other["dsseEnvelope"]["signatures"][0]["keyid"]
    with pytest.raises(SignatureInvalidError, match="does not verify"):
        verify_bundle_with(mixed, trust, NOW)


def test_the_machines_own_certificates_are_never_used(
    monkeypatch: pytest.MonkeyPatch, acme: Authority
) -> None:
    for name in ("get_default_verify_paths", "create_default_context"):
        monkeypatch.setattr(ssl, name, lambda *_, **__: pytest.fail("the system's store was asked for"))
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    with pytest.raises(SettingsError, match="at least one"):
        CertificateAuthority((), SAN)
    other = Authority.make(NOW, name="Globex")
    with pytest.raises(SignatureInvalidError):
        verify(acme, acme.leaf(), CertificateAuthority((other.root.der,), SAN))


def test_keys_and_certificates_do_not_stand_for_each_other(
    acme: Authority, trust: CertificateAuthority
) -> None:
    leaf = acme.leaf()
    bundle = sign_with_certificate(FILES, leaf, acme.intermediate)
    identity = bundle_identity(bundle)
    assert identity == CertificateIdentity(leaf.signer.keyid, leaf.der, (acme.intermediate.der,))
    for use in (bundle_keyid, lambda b: verify_bundle(b, leaf.signer.public_key)):
        with pytest.raises(SignatureInvalidError):
            use(bundle)
    from loraplex_registry.signing import sign_files

    with pytest.raises(SignatureInvalidError, match="another way"):
        verify_bundle_with(sign_files(FILES, leaf.signer, subject="x"), trust, NOW)


@pytest.mark.parametrize(
    ("name", "wanted", "good"),
    [
        (x509.UniformResourceIdentifier("spiffe://acme/ci/a"), "spiffe://acme/ci/a", True),
        (x509.UniformResourceIdentifier("spiffe://acme/ci/a"), "spiffe://acme/ci/*", True),
        (x509.UniformResourceIdentifier("spiffe://acme/ci/a/b"), "spiffe://acme/ci/*", True),
        (x509.UniformResourceIdentifier("spiffe://acme/ci/"), "spiffe://acme/ci/*", False),
        (x509.UniformResourceIdentifier("spiffe://acme/ci"), "spiffe://acme/ci/*", False),
        (x509.UniformResourceIdentifier("spiffe://acme/cix/a"), "spiffe://acme/ci/*", False),
        (x509.UniformResourceIdentifier("spiffe://acme/ci/../x"), "spiffe://acme/ci/*", False),
        (x509.UniformResourceIdentifier("spiffe://acme/ci/%2e%2e/x"), "spiffe://acme/ci/*", False),
        (x509.UniformResourceIdentifier("spiffe://ACME/ci/a"), "spiffe://acme/ci/a", False),
        (x509.RFC822Name("ci@acme.example"), "ci@acme.example", True),
        (x509.RFC822Name("ci@acme.example"), "CI@acme.example", False),
        (x509.DNSName("CI.acme.example"), "ci.acme.example", True),
        (x509.DNSName("x.ci.acme.example"), "ci.acme.example", False),
        (x509.UniformResourceIdentifier("ci@acme.example"), "ci@acme.example", False),
        (x509.DNSName("ci.acme.example"), "https://ci.acme.example", False),
    ],
)
def test_names_are_compared_by_kind(name: x509.GeneralName, wanted: str, good: bool, acme: Authority) -> None:
    leaf = acme.leaf(san=(name,))
    authority = CertificateAuthority((acme.root.der,), wanted)
    if good:
        assert verify_chain(leaf.der, [acme.intermediate.der], authority, NOW).keyid == leaf.signer.keyid
    else:
        with pytest.raises(SignatureInvalidError, match="the policy asks for"):
            verify_chain(leaf.der, [acme.intermediate.der], authority, NOW)


def test_a_certificate_without_a_name_is_refused(acme: Authority, trust: CertificateAuthority) -> None:
    with pytest.raises(SignatureInvalidError):
        verify(acme, acme.leaf(san=()), trust)


@pytest.mark.parametrize(
    "wanted",
    ["", "*", "spiffe://*", "*.acme.example", "*@acme.example", "a b", "s://a/b*", "x" * 300, "ü.example"],
)
def test_a_name_out_of_shape_is_refused(wanted: str, acme: Authority) -> None:
    with pytest.raises(SettingsError, match="name"):
        CertificateAuthority((acme.root.der,), wanted)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_larger_curves_verify(curve: ec.EllipticCurve, acme: Authority, trust: CertificateAuthority) -> None:
    assert verify(acme, acme.leaf(curve=curve), trust) == FILES


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c.extend([c[-1]] * CHAIN_MAX),
        lambda c: c[0].update(rawBytes="AAAA"),
        lambda c: c[0].update(rawBytes=""),
        lambda c: c[0].pop("rawBytes"),
        lambda c: c[0].update(more=1),
        lambda c: c[1].update(rawBytes="AAAA"),
        lambda c: c.reverse(),
        lambda c: c.append("x"),
    ],
)
def test_a_chain_of_another_form_is_refused(
    change: Any, acme: Authority, trust: CertificateAuthority
) -> None:
    bundle = sign_with_certificate(FILES, acme.leaf(), acme.intermediate)
    change(bundle["verificationMaterial"]["x509CertificateChain"]["certificates"])
    with pytest.raises(RegistryError) as caught:
        verify_bundle_with(bundle, trust, NOW)
    assert caught.value.code == "SIGNATURE_INVALID"


def test_roots_are_read_from_files_that_may_hold_several(acme: Authority, tmp_path: Path) -> None:
    other = Authority.make(NOW, name="Globex")
    both = tmp_path / "roots.pem"
    both.write_bytes(b"".join(a.root.certificate.public_bytes(Encoding.PEM) for a in (other, acme)))
    assert CertificateAuthority.load([both], SAN).roots == (other.root.der, acme.root.der)
    assert verify(acme, acme.leaf(), CertificateAuthority.load([both], SAN)) == FILES
    for body in (b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        both.write_bytes(body)
        with pytest.raises(SettingsError, match="PEM"):
            CertificateAuthority.load([both], SAN)
    with pytest.raises(SettingsError):
        CertificateAuthority.load([tmp_path / "absent.pem"], SAN)
