"""OpenSSF Model Signing v1.0 bundles: a signature over a set of file names and digests.

A bundle is what the stock `model_signing` command writes and verifies: sigstore bundle JSON v0.3, in it a DSSE
envelope, in it an in-toto statement whose predicate lists every file with its SHA-256
(https://github.com/ossf/model-signing-spec, v1.0). It says who signed in one of three ways: a key's id, a certificate
with its chain, or a short-lived certificate with a transparency log entry ("keyless").

The reader is stricter than the standard, because its leniencies have been used: exactly one signature, the exact
predicate type, method `files`, hash `sha256`, no symbolic links, the signer named. Ignored paths are accepted only
where they can hide nothing: the four git names the stock tool always writes, and names of signature files, none of
which may be a signed file's name, in upper or lower case. Whoever uses the result must read nothing but the files it
lists.

What a signature *means* is decided by the trust policy: here it is told that someone signed these names and digests.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import SignatureInvalidError
from ..format.canonical import StrictJsonError, b64decode, exact_object, parse
from .certificates import CHAIN_MAX, CertificateAuthority, certificate_key, verify_chain
from .envelopes import envelope_keyid, payload_unverified, sign_envelope, verify_envelope
from .keyless import KeylessAuthority, verify_keyless
from .keys import PublicKey, Signer, is_keyid
from .model_statement import IN_TOTO_TYPE, PREDICATE_TYPE, STATEMENT_TYPE, make_statement, read_statement

__all__ = [
    "BUNDLE_BYTES_MAX",
    "BUNDLE_TYPE",
    "IN_TOTO_TYPE",
    "PREDICATE_TYPE",
    "STATEMENT_TYPE",
    "Authority",
    "BundleIdentity",
    "CertificateIdentity",
    "KeyIdentity",
    "KeylessIdentity",
    "bundle_identity",
    "bundle_keyid",
    "read_bundle",
    "read_statement",
    "sign_files",
    "signed_files_unverified",
    "verify_bundle",
    "verify_bundle_with",
]

BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
BUNDLE_BYTES_MAX: Final = 256 << 10
"""Longest bundle read from a file, in bytes (256 KiB)."""

_RESEAL = "sign the adapter again."


@dataclass(frozen=True, slots=True)
class KeyIdentity:
    """A bundle that names a key by its id."""

    keyid: str


@dataclass(frozen=True, slots=True)
class CertificateIdentity:
    """A bundle that carries the signer's certificate and its issuers, all DER; `keyid` is the certificate's key."""

    keyid: str
    leaf: bytes
    chain: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KeylessIdentity:
    """A bundle with a short-lived certificate (DER) and a log entry; `keyid` is the certificate's key, used once."""

    keyid: str
    leaf: bytes


BundleIdentity = KeyIdentity | CertificateIdentity | KeylessIdentity
Authority = PublicKey | CertificateAuthority | KeylessAuthority


def sign_files(files: Mapping[str, str], signer: Signer, *, subject: str) -> dict[str, Any]:
    """Return a Model Signing v1.0 bundle over files, signed with a key.

    Args:
        files: file name -> lower-case hex SHA-256.
        signer: the key.
        subject: a name for people; verifiers give it no meaning.
    """
    return {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": signer.keyid}, "tlogEntries": []},
        "dsseEnvelope": sign_envelope(make_statement(files, subject=subject), IN_TOTO_TYPE, signer),
    }


def read_bundle(body: bytes) -> dict[str, Any]:
    """Return the bundle in a file written by any Model Signing tool, in the one form we store.

    The stock tool leaves the envelope's key id empty and says who signed beside it; the id is filled in, so that a
    bundle has one spelling. Nothing that is signed changes, and the result still verifies with the stock tool. The
    signature is not verified.

    Raises:
        SignatureInvalidError: not a bundle of an accepted form.
    """
    try:
        bundle = parse(body, limit_bytes=BUNDLE_BYTES_MAX)
        material = exact_object(bundle, _BUNDLE_FIELDS)["verificationMaterial"]
        if not isinstance(material, dict):
            raise StrictJsonError("verificationMaterial is not an object")
        bundle["verificationMaterial"] = {key: part for key, part in material.items() if part is not None}
        if "certificate" not in material:
            _fill_keyid(bundle)
    except StrictJsonError as error:
        raise SignatureInvalidError(f"The signature bundle is refused ({error}); {_RESEAL}") from error
    bundle_identity(bundle)
    return bundle  # type: ignore[no-any-return]


def bundle_identity(bundle: object) -> BundleIdentity:
    """Return who a bundle claims to be signed by, unverified.

    Raises:
        SignatureInvalidError: not a bundle of an accepted form.
    """
    return _read_bundle(bundle)[0]


def bundle_keyid(bundle: object) -> str:
    """Return the id of the key a bundle claims, unverified.

    Raises:
        SignatureInvalidError: not a bundle of an accepted form, or one signed with a certificate.
    """
    identity = bundle_identity(bundle)
    if not isinstance(identity, KeyIdentity):
        raise SignatureInvalidError(
            "The signature bundle carries a certificate where a key is expected; add its issuer to the policy."
        )
    return identity.keyid


def verify_bundle(bundle: object, key: PublicKey) -> dict[str, str]:
    """Return {file name: hex SHA-256} that `key` signed.

    Raises:
        SignatureInvalidError: another key, a bad signature, or any form but the ones accepted.
    """
    identity, envelope = _read_bundle(bundle)
    if not isinstance(identity, KeyIdentity) or identity.keyid != key.keyid:
        raise SignatureInvalidError(f"The bundle names key {identity.keyid[:16]}…, not {key.keyid[:16]}….")
    return read_statement(verify_envelope(envelope, IN_TOTO_TYPE, key))


def verify_bundle_with(bundle: object, authority: Authority, now: dt.datetime) -> dict[str, str]:
    """Return {file name: hex SHA-256} that an authority's holder signed.

    Args:
        bundle: the bundle, unverified.
        authority: a key, or whose certificates are believed for which name.
        now: time to judge certificates by, with a time zone; a key has no dates of its own.

    Raises:
        SignatureInvalidError: another signer, a bad signature or chain, or a form not accepted.
        ExpiredError: a certificate of the chain is outside its dates.
        SettingsError: the optional extra for keyless bundles is not installed.
    """
    if isinstance(authority, PublicKey):
        return verify_bundle(bundle, authority)
    identity, envelope = _read_bundle(bundle)
    if isinstance(authority, CertificateAuthority) and isinstance(identity, CertificateIdentity):
        key = verify_chain(identity.leaf, identity.chain, authority, now)
        return read_statement(verify_envelope(envelope, IN_TOTO_TYPE, key))
    if isinstance(authority, KeylessAuthority) and isinstance(identity, KeylessIdentity):
        return read_statement(verify_keyless(bundle, IN_TOTO_TYPE, authority))
    raise SignatureInvalidError(
        f"The bundle is signed in another way than the policy asks for ({authority.name}); {_RESEAL}"
    )


_BUNDLE_FIELDS = frozenset({"mediaType", "verificationMaterial", "dsseEnvelope"})


def _read_bundle(bundle: object) -> tuple[BundleIdentity, object]:
    try:
        fields = exact_object(bundle, _BUNDLE_FIELDS)
        if fields["mediaType"] != BUNDLE_TYPE:
            raise StrictJsonError("another media type than sigstore bundle v0.3")
        identity = _identity(fields["verificationMaterial"])
    except StrictJsonError as error:
        raise SignatureInvalidError(f"The signature bundle is refused ({error}); {_RESEAL}") from error
    envelope = fields["dsseEnvelope"]
    # The envelope of a keyless bundle is read by sigstore itself, which leaves the key id empty.
    if not isinstance(identity, KeylessIdentity) and envelope_keyid(envelope) != identity.keyid:
        raise SignatureInvalidError(f"The signature bundle names two keys; {_RESEAL}")
    return identity, envelope


def _identity(material: object) -> BundleIdentity:
    if not isinstance(material, dict):
        raise StrictJsonError("verificationMaterial is not an object")
    if "certificate" in material:
        fields = exact_object(
            material,
            frozenset({"certificate", "tlogEntries"}),
            optional=frozenset({"timestampVerificationData"}),
        )
        leaf = _certificate(fields["certificate"])
        if not isinstance(fields["tlogEntries"], list) or len(fields["tlogEntries"]) != 1:
            raise StrictJsonError("exactly one log entry is needed")
        return KeylessIdentity(certificate_key(leaf).keyid, leaf)
    if "x509CertificateChain" in material:
        fields = _without_log(exact_object(material, frozenset({"x509CertificateChain", "tlogEntries"})))
        value = exact_object(fields["x509CertificateChain"], frozenset({"certificates"}))["certificates"]
        if not isinstance(value, list) or not 0 < len(value) <= CHAIN_MAX:
            raise StrictJsonError(f"1 to {CHAIN_MAX} certificates are needed")
        leaf, *chain = [_certificate(item) for item in value]
        return CertificateIdentity(certificate_key(leaf).keyid, leaf, tuple(chain))
    fields = _without_log(exact_object(material, frozenset({"publicKey", "tlogEntries"})))
    hint = exact_object(fields["publicKey"], frozenset({"hint"}))["hint"]
    if not is_keyid(hint):
        raise StrictJsonError("the key hint is not a key id")
    return KeyIdentity(hint)


def _without_log(material: dict[str, Any]) -> dict[str, Any]:
    if material["tlogEntries"] != []:
        raise StrictJsonError("log entries where none belong")
    return material


def _certificate(value: object) -> bytes:
    return b64decode(exact_object(value, frozenset({"rawBytes"}))["rawBytes"])


def _fill_keyid(bundle: dict[str, Any]) -> None:
    """Put the signer's id where the stock tool leaves the envelope's key id empty or out."""
    envelope = exact_object(bundle["dsseEnvelope"], frozenset({"payload", "payloadType", "signatures"}))
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise StrictJsonError("exactly one signature is needed")
    signature = exact_object(signatures[0], frozenset({"sig"}), optional=frozenset({"keyid"}))
    if not signature.get("keyid"):
        signature["keyid"] = _identity(bundle["verificationMaterial"]).keyid


def signed_files_unverified(bundle: object) -> dict[str, str]:
    """Return {file name: hex SHA-256} that a bundle lists, without any check who signed.

    Raises:
        SignatureInvalidError: not a bundle of an accepted form.
    """
    identity, envelope = _read_bundle(bundle)
    if not isinstance(identity, KeylessIdentity):
        return read_statement(payload_unverified(envelope))
    try:
        return read_statement(b64decode(envelope.get("payload") if isinstance(envelope, dict) else None))
    except StrictJsonError as error:
        raise SignatureInvalidError(f"The signature bundle is refused ({error}); {_RESEAL}") from error
