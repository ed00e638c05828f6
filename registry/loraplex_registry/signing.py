"""Signatures: OpenSSF Model Signing v1.0 bundles over a set of files, and plain DSSE statements.

The bundle is what the stock `model_signing verify key` command reads: sigstore bundle JSON v0.3, in it a DSSE
envelope, in it an in-toto statement whose predicate lists every file with its SHA-256
(https://github.com/ossf/model-signing-spec, v1.0). Made and verified through `securesystemslib`; no cryptography here.

The reader is stricter than the standard, because its leniencies have been used: exactly one signature, the exact
predicate type, method `files`, hash `sha256`, no symbolic links, no ignored paths, the key hint present. What a
signature *means* is decided in `trust`: it tells that a key signed these names and digests, no more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .canonical import StrictJsonError, b64decode, b64encode, canonical, exact_object, parse
from .errors import SettingsError, SignatureInvalidError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
PAYLOAD_BYTES_MAX: Final = 128 << 10
"""Longest signed statement, in bytes (128 KiB)."""

KEY_FILE_BYTES_MAX: Final = 16 << 10
"""Longest PEM file read, in bytes (16 KiB)."""

RESOURCES_MAX: Final = 32
"""Most files in one bundle."""

ALGORITHMS: Final = ("ecdsa-p256", "ecdsa-p384", "ecdsa-p521", "ed25519")
"""Key kinds understood. The first is the default and the one every Model Signing verifier must support."""

_SCHEMES: Final = {
    "ecdsa-sha2-nistp256": "ecdsa-p256",
    "ecdsa-sha2-nistp384": "ecdsa-p384",
    "ecdsa-sha2-nistp521": "ecdsa-p521",
    "ed25519": "ed25519",
}


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key by its id: lower-case hex SHA-256 of its SubjectPublicKeyInfo in PEM (the standard's key hint)."""

    keyid: str
    algorithm: str
    pem: str

    def check(self, signature: bytes, message: bytes) -> None:
        """Raise SignatureInvalidError unless `signature` over `message` was made with this key."""
        from securesystemslib.exceptions import UnverifiedSignatureError
        from securesystemslib.signer import Signature

        try:
            _sslib_key(_load_public(self.pem.encode("ascii")), self.keyid).verify_signature(
                Signature(self.keyid, signature.hex()), message
            )
        except UnverifiedSignatureError as error:
            raise SignatureInvalidError(
                f"The signature does not verify with key {self.keyid[:16]}…; the bytes were changed or never signed."
            ) from error


class Signer:
    """Signs with one private key through any `securesystemslib` signer. Its `repr` shows the key id alone."""

    def __init__(self, sslib_signer: Any, public_key: PublicKey) -> None:
        self._signer = sslib_signer
        self.public_key = public_key

    @property
    def keyid(self) -> str:
        """The public key's id."""
        return self.public_key.keyid

    def sign(self, message: bytes) -> bytes:
        """Return the raw signature over `message`."""
        return bytes.fromhex(self._signer.sign(message).signature)

    def __repr__(self) -> str:
        return f"Signer({self.keyid[:16]}…)"


def generate_key(
    path: str | Path,
    passphrase: str | None = None,
    *,
    algorithm: str = "ecdsa-p256",
    public_path: Path | None = None,
) -> PublicKey:
    """Create a key pair: PKCS#8 PEM at `path` (mode 0600, encrypted when a passphrase is given), public PEM beside it.

    Args:
        path: private key file; must not exist.
        passphrase: encrypts the private key.
        algorithm: one of `ALGORITHMS`.
        public_path: default `path` with the suffix `.pub`.

    Raises:
        SettingsError: a file exists already, or the algorithm is unknown.
    """
    from cryptography.hazmat.primitives import serialization as ser

    private = _new_private_key(algorithm)
    encryption = ser.BestAvailableEncryption(passphrase.encode()) if passphrase else ser.NoEncryption()
    private_pem = private.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, encryption)
    public = _public_key(private.public_key())
    place = Path(path)
    _write_new(place, private_pem, mode=0o600)
    _write_new(public_path or place.with_suffix(".pub"), public.pem.encode("ascii"), mode=0o644)
    return public


def load_signer(path: str | Path, passphrase: str | None = None) -> Signer:
    """Load a private key file (PKCS#8 PEM).

    Raises:
        SettingsError: absent, not a private key of a known kind, or the passphrase is missing or wrong.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    try:
        private = load_pem_private_key(_read_key(path), passphrase.encode() if passphrase else None)
    except TypeError as error:
        word = "does not need a passphrase" if passphrase else "needs a passphrase"
        raise SettingsError(f"Key {path} {word}; see LORAPLEX_KEY_PASSPHRASE_FILE.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(
            f"Key {path} cannot be read: wrong passphrase or not a PKCS#8 PEM private key."
        ) from error
    public = _public_key(private.public_key())
    return Signer(CryptoSigner(private, _sslib_key(private.public_key(), public.keyid)), public)


def load_public_key(path: str | Path) -> PublicKey:
    """Load a public key file (SubjectPublicKeyInfo PEM).

    Raises:
        SettingsError: absent, or not a public key of a known kind.
    """
    try:
        return _public_key(_load_public(_read_key(path)))
    except ValueError as error:
        raise SettingsError(f"Key {path} cannot be read: not a PEM public key of a known kind.") from error


def sign_files(files: Mapping[str, str], signer: Signer, *, subject: str) -> dict[str, Any]:
    """Return a Model Signing v1.0 bundle over files.

    Args:
        files: file name -> lower-case hex SHA-256.
        signer: the key.
        subject: a name for people; verifiers give it no meaning.
    """
    names = sorted(files)
    root = hashlib.sha256(b"".join(bytes.fromhex(files[name]) for name in names)).hexdigest()
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": subject, "digest": {"sha256": root}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [],
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": files[name]} for name in names],
        },
    }
    return {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": signer.keyid}, "tlogEntries": []},
        "dsseEnvelope": sign_envelope(canonical(statement), IN_TOTO_TYPE, signer),
    }


def bundle_keyid(bundle: object) -> str:
    """Return the id of the key a bundle claims, unverified.

    Raises:
        SignatureInvalidError: not a bundle of the one accepted form.
    """
    return _read_bundle(bundle)[0]


def verify_bundle(bundle: object, key: PublicKey) -> dict[str, str]:
    """Return {file name: hex SHA-256} that `key` signed.

    Raises:
        SignatureInvalidError: another key, a bad signature, or any form but the one accepted.
    """
    keyid, envelope = _read_bundle(bundle)
    if keyid != key.keyid:
        raise SignatureInvalidError(f"The bundle names key {keyid[:16]}…, not {key.keyid[:16]}….")
    return _read_statement(verify_envelope(envelope, IN_TOTO_TYPE, key))


def sign_envelope(payload: bytes, payload_type: str, signer: Signer) -> dict[str, Any]:
    """Return a DSSE envelope (https://github.com/secure-systems-lab/dsse) with one signature."""
    signature = signer.sign(_pae(payload, payload_type))
    return {
        "payload": b64encode(payload),
        "payloadType": payload_type,
        "signatures": [{"sig": b64encode(signature), "keyid": signer.keyid}],
    }


def envelope_keyid(envelope: object) -> str:
    """Return the id of the key an envelope claims, unverified.

    Raises:
        SignatureInvalidError: not an envelope with one signature.
    """
    return _read_envelope(envelope)[3]


def verify_envelope(envelope: object, payload_type: str, key: PublicKey) -> bytes:
    """Return the payload of an envelope that `key` signed as `payload_type`.

    Raises:
        SignatureInvalidError: another key or type, a bad signature, or not an envelope.
    """
    payload, found_type, signature, keyid = _read_envelope(envelope)
    if found_type != payload_type or keyid != key.keyid:
        raise SignatureInvalidError(f"The signed statement is of another type or key than {payload_type}.")
    key.check(signature, _pae(payload, payload_type))
    return payload


def _pae(payload: bytes, payload_type: str) -> bytes:
    from securesystemslib.dsse import Envelope

    return Envelope(payload, payload_type, {}).pae()  # type: ignore[no-any-return,unused-ignore]


def _read_bundle(bundle: object) -> tuple[str, object]:
    try:
        fields = exact_object(bundle, frozenset({"mediaType", "verificationMaterial", "dsseEnvelope"}))
        material = exact_object(fields["verificationMaterial"], frozenset({"publicKey", "tlogEntries"}))
        hint = exact_object(material["publicKey"], frozenset({"hint"}))["hint"]
    except StrictJsonError as error:
        raise SignatureInvalidError(
            f"The signature bundle is refused ({error}); sign the adapter again."
        ) from error
    if fields["mediaType"] != BUNDLE_TYPE or material["tlogEntries"] != [] or not _is_sha256(hint):
        raise SignatureInvalidError(
            "The signature bundle is not of the one accepted form; sign the adapter again."
        )
    if envelope_keyid(fields["dsseEnvelope"]) != hint:
        raise SignatureInvalidError("The signature bundle names two keys; sign the adapter again.")
    return hint, fields["dsseEnvelope"]


def _read_envelope(envelope: object) -> tuple[bytes, str, bytes, str]:
    try:
        fields = exact_object(envelope, frozenset({"payload", "payloadType", "signatures"}))
        signatures = fields["signatures"]
        if (
            not isinstance(signatures, list)
            or len(signatures) != 1
            or not isinstance(fields["payloadType"], str)
        ):
            raise StrictJsonError("exactly one signature is needed")
        signature = exact_object(signatures[0], frozenset({"sig", "keyid"}))
        payload = b64decode(fields["payload"])
        if len(payload) > PAYLOAD_BYTES_MAX or not _is_sha256(signature["keyid"]):
            raise StrictJsonError("the payload is too long or the key id out of shape")
        return payload, fields["payloadType"], b64decode(signature["sig"]), signature["keyid"]
    except StrictJsonError as error:
        raise SignatureInvalidError(f"The signed statement is refused ({error}); sign it again.") from error


def _read_statement(payload: bytes) -> dict[str, str]:
    try:
        statement = exact_object(
            parse(payload, limit_bytes=PAYLOAD_BYTES_MAX),
            frozenset({"_type", "subject", "predicateType", "predicate"}),
        )
        if statement["_type"] != STATEMENT_TYPE or statement["predicateType"] != PREDICATE_TYPE:
            raise StrictJsonError("another statement or predicate type")
        predicate = exact_object(statement["predicate"], frozenset({"serialization", "resources"}))
        _check_serialization(predicate["serialization"])
        files = _resources(predicate["resources"])
        _check_subject(statement["subject"], files)
    except StrictJsonError as error:
        raise SignatureInvalidError(
            f"The signed statement is refused ({error}); sign the adapter again."
        ) from error
    return files


def _check_serialization(value: object) -> None:
    fields = exact_object(
        value, frozenset({"method", "hash_type"}), optional=frozenset({"allow_symlinks", "ignore_paths"})
    )
    if fields["method"] != "files" or fields["hash_type"] != "sha256":
        raise StrictJsonError("only method files with sha256 is accepted")
    if fields.get("allow_symlinks", False) is not False or fields.get("ignore_paths", []) != []:
        raise StrictJsonError("symbolic links and ignored paths are not accepted")


def _resources(value: object) -> dict[str, str]:
    if not isinstance(value, list) or not 0 < len(value) <= RESOURCES_MAX:
        raise StrictJsonError("resources is not a list of acceptable length")
    files: dict[str, str] = {}
    for item in value:
        fields = exact_object(item, frozenset({"name", "algorithm", "digest"}))
        name, digest = fields["name"], fields["digest"]
        if (
            not isinstance(name, str)
            or name in files
            or fields["algorithm"] != "sha256"
            or not _is_sha256(digest)
        ):
            raise StrictJsonError("a resource is out of shape or named twice")
        files[name] = digest
    return files


def _check_subject(value: object, files: dict[str, str]) -> None:
    """The root digest hashes the files' digests in the order listed; it must agree or the statement is inconsistent."""
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in files.values())).hexdigest()
    if not isinstance(value, list) or len(value) != 1:
        raise StrictJsonError("exactly one subject is needed")
    subject = exact_object(value[0], frozenset({"name", "digest"}))
    if exact_object(subject["digest"], frozenset({"sha256"}))["sha256"] != root:
        raise StrictJsonError("the subject's digest does not follow from the resources")


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(char in "0123456789abcdef" for char in value)


def _new_private_key(algorithm: str) -> PrivateKeyTypes:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if algorithm == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    curves: dict[str, ec.EllipticCurve] = {
        "ecdsa-p256": ec.SECP256R1(),
        "ecdsa-p384": ec.SECP384R1(),
        "ecdsa-p521": ec.SECP521R1(),
    }
    if algorithm not in curves:
        raise SettingsError(f"Key algorithm {algorithm!r} is unknown; use one of {', '.join(ALGORITHMS)}.")
    return ec.generate_private_key(curves[algorithm])


def _load_public(pem: bytes) -> PublicKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return load_pem_public_key(pem)
    except UnsupportedAlgorithm as error:
        raise ValueError("unsupported key") from error


def _public_key(key: PublicKeyTypes) -> PublicKey:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    keyid = hashlib.sha256(pem).hexdigest()
    try:
        algorithm = _SCHEMES[_sslib_key(key, keyid).scheme]
    except (KeyError, ValueError) as error:
        raise SettingsError(f"The key is of an unknown kind; use one of {', '.join(ALGORITHMS)}.") from error
    return PublicKey(keyid, algorithm, pem.decode("ascii"))


def _sslib_key(key: PublicKeyTypes, keyid: str) -> Any:
    from securesystemslib.signer import SSlibKey

    return SSlibKey.from_crypto(key, keyid)


def _read_key(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(KEY_FILE_BYTES_MAX)
    except OSError as error:
        raise SettingsError(
            f"Key {path} cannot be opened ({error.strerror}); make one with `registry keys gen`."
        ) from error


def _write_new(path: Path, body: bytes, *, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise SettingsError(
            f"{path} exists already; a key is never overwritten, choose another name."
        ) from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}).") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
