"""A private sigstore for tests: certificate authority, certificate log and transparency log, all made on the spot.

Formats: RFC 6962 (signed certificate timestamps, Merkle leaves), the Rekor v1 `dsse` entry, and the C2SP signed note.
"""

import datetime as dt
import hashlib
import struct
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from loraplex_registry.format.canonical import b64decode, b64encode, canonical
from loraplex_registry.signing.bundles import BUNDLE_TYPE, IN_TOTO_TYPE, sign_files
from loraplex_registry.signing.envelopes import pae
from tests.registry.pki import DAY, Issued, issue

ISSUER = "https://accounts.acme.example"
IDENTITY = "ci@acme.example"
_ISSUER_OID = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_SCT_OID = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_SHA256 = ec.ECDSA(hashes.SHA256())


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def log_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(spki(key)).digest()


@dataclass
class KeylessWorld:
    """The services, and the time at which they work."""

    now: dt.datetime
    certificate_log: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    transparency_log: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    authority: Issued = field(init=False)

    def __post_init__(self) -> None:
        start = self.now - 1000 * DAY
        self.authority = issue(
            "sigstore", None, start=start, end=self.now + 1000 * DAY, ca=True, path_length=0
        )

    def trusted_root(self) -> dict[str, Any]:
        """The trusted root, JSON."""
        start = {"start": (self.now - 1000 * DAY).strftime("%Y-%m-%dT%H:%M:%SZ")}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            public = {
                "rawBytes": b64encode(spki(key)),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": start,
            }
            return {
                "baseUrl": "https://log.acme.example",
                "hashAlgorithm": "SHA2_256",
                "publicKey": public,
                "logId": {"keyId": b64encode(log_id(key))},
            }

        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.transparency_log)],
            "certificateAuthorities": [
                {
                    "subject": {"organization": "acme", "commonName": "sigstore"},
                    "uri": "https://ca.acme.example",
                    "certChain": {"certificates": [{"rawBytes": b64encode(self.authority.der)}]},
                    "validFor": start,
                }
            ],
            "ctlogs": [log(self.certificate_log)],
            "timestampAuthorities": [],
        }

    def sign(self, files: dict[str, str], *, late: dt.timedelta = dt.timedelta(0)) -> dict[str, Any]:
        """A keyless bundle over files; `late` is how long after the certificate's start the log saw it."""
        key = new_key()
        leaf = self._certificate(key)
        signed = sign_files(files, Issued(leaf, key).signer, subject="x")
        payload = b64decode(signed["dsseEnvelope"]["payload"])
        signature = key.sign(pae(payload, IN_TOTO_TYPE), _SHA256)
        return {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {
                "certificate": {"rawBytes": b64encode(leaf.public_bytes(Encoding.DER))},
                "tlogEntries": [self._entry(leaf, payload, signature, self.now + late)],
            },
            "dsseEnvelope": {
                "payload": b64encode(payload),
                "payloadType": IN_TOTO_TYPE,
                "signatures": [{"sig": b64encode(signature), "keyid": ""}],
            },
        }

    def _certificate(self, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        """A ten-minute certificate for IDENTITY with one signed certificate timestamp."""
        usage = x509.KeyUsage(True, *[False] * 8)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sigstore")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - dt.timedelta(minutes=1))
            .not_valid_after(self.now + dt.timedelta(minutes=10))
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.key.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(IDENTITY)]), critical=True)
            .add_extension(x509.UnrecognizedExtension(_ISSUER_OID, ISSUER.encode()), critical=False)
        )
        tbs = builder.sign(self.authority.key, hashes.SHA256()).tbs_certificate_bytes
        stamped = x509.UnrecognizedExtension(_SCT_OID, self._timestamps(tbs))
        return builder.add_extension(stamped, critical=False).sign(self.authority.key, hashes.SHA256())

    def _timestamps(self, tbs: bytes) -> bytes:
        """A DER octet string with a list of one timestamp over a pre-certificate (RFC 6962, 3.2 and 3.3)."""
        time_ms = struct.pack("!Q", int(self.now.timestamp()) * 1000)
        issuer = hashlib.sha256(spki(self.authority.key)).digest()
        entry = struct.pack("!H", 1) + issuer + struct.pack("!I", len(tbs))[1:] + tbs
        signature = self.certificate_log.sign(b"\0\0" + time_ms + entry + b"\0\0", _SHA256)
        stamp = b"\0" + log_id(self.certificate_log) + time_ms + b"\0\0" + b"\x04\x03"
        stamp += struct.pack("!H", len(signature)) + signature
        listed = struct.pack("!H", len(stamp)) + stamp
        listed = struct.pack("!H", len(listed)) + listed
        assert 127 < len(listed) < 256 or len(listed) < 128
        length = bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])
        return b"\x04" + length + listed

    def _entry(
        self, leaf: x509.Certificate, payload: bytes, signature: bytes, seen: dt.datetime
    ) -> dict[str, Any]:
        """A log of one entry, with its promise and its proof."""
        body = canonical(
            {
                "apiVersion": "0.0.1",
                "kind": "dsse",
                "spec": {
                    "envelopeHash": {"algorithm": "sha256", "value": "0" * 64},
                    "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()},
                    "signatures": [
                        {
                            "signature": b64encode(signature),
                            "verifier": b64encode(leaf.public_bytes(Encoding.PEM)),
                        }
                    ],
                },
            }
        )
        key, when = self.transparency_log, int(seen.timestamp())
        promise = {"body": b64encode(body), "integratedTime": when, "logID": log_id(key).hex(), "logIndex": 0}
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"log.acme.example\n1\n{b64encode(root)}\n"
        note_signature = b64encode(log_id(key)[:4] + key.sign(note.encode(), _SHA256))
        return {
            "logIndex": "0",
            "logId": {"keyId": b64encode(log_id(key))},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(when),
            "inclusionPromise": {"signedEntryTimestamp": b64encode(key.sign(canonical(promise), _SHA256))},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": b64encode(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": f"{note}\n\u2014 log.acme.example {note_signature}\n"},
            },
            "canonicalizedBody": b64encode(body),
        }
