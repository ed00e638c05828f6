"""Certificates: who may sign, said by a private certificate authority and a name.

A signature made with a certificate counts when, *now*, the certificate chains to one of the roots the policy names, is
allowed to sign code (key usage digitalSignature and extended key usage codeSigning, RFC 5280, 4.2.1.3 and 4.2.1.12),
and one of its subject alternative names is the one the policy names. Chains are built and checked by
`cryptography.x509.verification`.

The machine's own certificate store is never used, and time is never taken from the certificate: an expired certificate
does not count, whenever the signature claims to have been made.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import ExpiredError, SettingsError, SignatureInvalidError
from .keys import PublicKey, public_key_of, read_key_file

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.x509.verification import ClientVerifier, ExtensionPolicy, Policy

CERTIFICATE_BYTES_MAX: Final = 16 << 10
"""Longest certificate, in bytes of DER (16 KiB)."""

CHAIN_MAX: Final = 8
"""Most certificates in a bundle, the signer's own included."""

ROOTS_MAX: Final = 32
"""Most roots in one policy entry."""

SAN_CHARACTERS_MAX: Final = 256
"""Longest name in a policy entry, in characters."""


@dataclass(frozen=True, slots=True)
class CertificateAuthority:
    """Whose certificates count: issued under one of `roots` (DER) for the name `san`.

    `san` is a URI (`spiffe://acme/ci`), an e-mail address or a DNS name, compared exactly; a URI that ends in `/*`
    stands for every URI below it.
    """

    roots: tuple[bytes, ...]
    san: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.roots) <= ROOTS_MAX:
            raise SettingsError(
                f"A certificate entry needs 1 to {ROOTS_MAX} roots; name at least one PEM file."
            )
        _check_san(self.san)

    @classmethod
    def load(cls, root_paths: Iterable[str | Path], san: str) -> CertificateAuthority:
        """Read the roots from PEM files, each of which may hold several certificates.

        Raises:
            SettingsError: a file cannot be read, holds no certificate, or the name is out of shape.
        """
        roots = tuple(root for path in root_paths for root in _read_pem(Path(path)))
        return cls(roots, san)

    @property
    def name(self) -> str:
        """A short text for people."""
        return f"a certificate for {self.san}"


def certificate_key(der: bytes) -> PublicKey:
    """Return the public key of a certificate; nothing about the certificate is checked.

    Raises:
        SignatureInvalidError: not a certificate, or its key is of a kind we do not verify with.
    """
    return _key_of(_load(der))


def verify_chain(
    leaf: bytes, chain: Sequence[bytes], authority: CertificateAuthority, now: dt.datetime
) -> PublicKey:
    """Return the key of a certificate that an authority's roots vouch for now, under the authority's name.

    Args:
        leaf: the signer's certificate, DER.
        chain: certificates of issuers, DER, in any order; the roots are never taken from here.
        authority: roots and name.
        now: time to judge every certificate's dates by, with a time zone.

    Raises:
        SignatureInvalidError: no chain to a root, another name, or not allowed to sign code.
        ExpiredError: the certificate or one of its issuers is outside its dates.
    """
    from cryptography.x509.verification import VerificationError

    certificate, issuers = _load(leaf), [_load(der) for der in chain[:CHAIN_MAX]]
    _check_dates([certificate], now)
    try:
        found = _verifier(authority.roots, now).verify(certificate, issuers)
        if len(found.chain) == 1:  # the library takes a certificate listed as a root for its own proof
            raise VerificationError("it is signed by itself")
    except (VerificationError, ValueError) as error:
        _check_dates([*issuers, *map(_load, authority.roots)], now)
        raise SignatureInvalidError(
            "The signer's certificate is not one that may sign under the policy's roots "
            f"({str(error)[:200]}); sign with a code-signing certificate of the right authority."
        ) from error
    _check_name(certificate, authority.san)
    return _key_of(certificate)


def _verifier(roots: tuple[bytes, ...], now: dt.datetime) -> ClientVerifier:
    from cryptography.x509.verification import PolicyBuilder, Store

    ca_policy, ee_policy = _extension_policies()
    return (
        PolicyBuilder()
        .store(Store([_load(root) for root in roots]))
        .time(now)
        .max_chain_depth(CHAIN_MAX)
        .extension_policies(ca_policy=ca_policy, ee_policy=ee_policy)
        .build_client_verifier()
    )


@functools.cache
def _extension_policies() -> tuple[ExtensionPolicy, ExtensionPolicy]:
    """The library's rules for authorities and for certificates of clients, with code signing instead of TLS."""
    from cryptography import x509
    from cryptography.x509.verification import Criticality, ExtensionPolicy

    ca_policy = ExtensionPolicy.webpki_defaults_ca().may_be_present(
        x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _may_issue_for_code
    )
    ee_policy = (
        ExtensionPolicy.webpki_defaults_ee()
        .require_present(x509.KeyUsage, Criticality.AGNOSTIC, _may_sign)
        .require_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _is_for_code)
    )
    return ca_policy, ee_policy


def _may_sign(_policy: Policy, _certificate: x509.Certificate, usage: x509.KeyUsage) -> None:
    if not usage.digital_signature or usage.key_cert_sign:
        raise ValueError("the certificate's key usage is not digital signature alone")


def _is_for_code(_policy: Policy, _certificate: x509.Certificate, usage: x509.ExtendedKeyUsage) -> None:
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if ExtendedKeyUsageOID.CODE_SIGNING not in usage:
        raise ValueError("the certificate is not for code signing")


def _may_issue_for_code(
    _policy: Policy, certificate: x509.Certificate, usage: x509.ExtendedKeyUsage | None
) -> None:
    if usage is not None:
        _is_for_code(_policy, certificate, usage)


def _check_dates(certificates: Iterable[x509.Certificate], now: dt.datetime) -> None:
    for certificate in certificates:
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not start <= now <= end:
            raise ExpiredError(
                f"The certificate of {certificate.subject.rfc4514_string()[:100] or 'the signer'} counts from "
                f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC only; sign again with a current certificate."
            )


def _check_name(certificate: x509.Certificate, wanted: str) -> None:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError) as error:
        raise SignatureInvalidError(
            "The signer's certificate names nobody; sign with one that has a name."
        ) from error
    kind = _kind_of(wanted)
    found = names.get_values_for_type(kind)
    if not any(_matches(name, wanted, kind) for name in found):
        listed = ", ".join(name[:100] for name in found[:4]) or "no such name"
        raise SignatureInvalidError(
            f"The signer's certificate is for {listed}, the policy asks for {wanted}; sign as the right identity."
        )


def _matches(name: str, wanted: str, kind: type[x509.GeneralName]) -> bool:
    from cryptography import x509

    if kind is x509.DNSName:
        return name.lower() == wanted.lower()
    if kind is x509.UniformResourceIdentifier and wanted.endswith("/*"):
        # A dot segment or an escape could make the name mean a place outside the prefix.
        below = name.removeprefix(wanted[:-1])
        return below not in (name, "") and "%" not in below and not {".", ".."} & set(below.split("/"))
    return name == wanted


def _kind_of(
    san: str,
) -> type[x509.UniformResourceIdentifier] | type[x509.RFC822Name] | type[x509.DNSName]:
    from cryptography import x509

    if "://" in san:
        return x509.UniformResourceIdentifier
    return x509.RFC822Name if "@" in san else x509.DNSName


def _check_san(san: str) -> None:
    body = san[:-1] if "://" in san and san.endswith("/*") and not san.endswith("://*") else san
    if (
        not 0 < len(san) <= SAN_CHARACTERS_MAX
        or not san.isascii()
        or not san.isprintable()
        or "*" in body
        or " " in san
        or body.endswith(":///")
    ):
        raise SettingsError(
            f"The certificate name {san[:80]!r} is no URI, e-mail address or DNS name; only a URI may end in '/*'."
        )


def _load(der: bytes) -> x509.Certificate:
    from cryptography import x509

    try:
        if len(der) > CERTIFICATE_BYTES_MAX:
            raise ValueError("too long")
        return x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion) as error:
        raise SignatureInvalidError(
            "A certificate of the signature bundle cannot be read; sign the adapter again."
        ) from error


def _key_of(certificate: x509.Certificate) -> PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return public_key_of(certificate.public_key())  # type: ignore[arg-type]
    except (ValueError, UnsupportedAlgorithm, SettingsError) as error:
        raise SignatureInvalidError(
            "The signer's certificate has a key of a kind that is not accepted; use ECDSA P-256."
        ) from error


def _read_pem(path: Path) -> list[bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    body = read_key_file(path)
    try:
        return [found.public_bytes(Encoding.DER) for found in x509.load_pem_x509_certificates(body)]
    except ValueError as error:
        raise SettingsError(f"{path} cannot be read: not PEM certificates.") from error
