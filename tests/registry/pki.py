"""A small private certificate authority for tests: roots, intermediates and code-signing certificates."""

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from loraplex_registry.format.canonical import b64encode
from loraplex_registry.signing import sign_files
from loraplex_registry.signing.keys import Signer, signer_of

DAY = dt.timedelta(days=1)
SAN = "spiffe://acme.example/ci/release"


@dataclass
class Issued:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    def write(self, directory: Path, name: str) -> tuple[Path, Path]:
        """Write `name.pem` and `name.key` and return both paths."""
        pem, key = directory / f"{name}.pem", directory / f"{name}.key"
        pem.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        key.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return pem, key

    @property
    def signer(self) -> Signer:
        """A signer with the certificate's key."""
        return signer_of(self.key)


def issue(
    name: str,
    issuer: Issued | None,
    *,
    start: dt.datetime,
    end: dt.datetime,
    ca: bool = False,
    san: tuple[x509.GeneralName, ...] = (),
    usage: tuple[x509.ObjectIdentifier, ...] | None = (ExtendedKeyUsageOID.CODE_SIGNING,),
    digital_signature: bool = True,
    path_length: int | None = None,
    curve: ec.EllipticCurve | None = None,
) -> Issued:
    """Make a key and a certificate for it; self-signed without issuer."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_key = key if issuer is None else issuer.key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature and not ca, *[False] * 4, ca, ca, *[False] * 2), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName(san), critical=False)
    if usage and not ca:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    return Issued(builder.sign(issuer_key, hashes.SHA256()), key)


@dataclass
class Authority:
    """A root, an intermediate, and the time around which everything is valid."""

    root: Issued
    intermediate: Issued
    now: dt.datetime

    @classmethod
    def make(
        cls, now: dt.datetime, *, intermediate_end: dt.datetime | None = None, name: str = "Acme"
    ) -> "Authority":
        start = now - 1000 * DAY
        root = issue(f"{name} Root", None, start=start, end=now + 1000 * DAY, ca=True)
        end = intermediate_end or now + 500 * DAY
        return cls(root, issue(f"{name} Issuing", root, start=start, end=end, ca=True, path_length=0), now)

    def leaf(self, **changes: Any) -> Issued:
        """A good signing certificate for SAN, or one with changes."""
        good = {
            "start": self.now - DAY,
            "end": self.now + 90 * DAY,
            "san": (x509.UniformResourceIdentifier(SAN),),
        }
        return issue("release", self.intermediate, **{**good, **changes})


def sign_with_certificate(files: dict[str, str], leaf: Issued, *chain: Issued) -> dict[str, Any]:
    """A Model Signing bundle with a certificate chain, in the form we store."""
    bundle = sign_files(files, leaf.signer, subject="x")
    certificates = [{"rawBytes": b64encode(issued.der)} for issued in (leaf, *chain)]
    bundle["verificationMaterial"] = {
        "x509CertificateChain": {"certificates": certificates},
        "tlogEntries": [],
    }
    return bundle
