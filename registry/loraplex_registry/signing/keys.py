"""Keys: public keys and their ids, key files, and what a signer is.

A key's id is the lower-case hex SHA-256 of its SubjectPublicKeyInfo in PEM, which is also the key hint of OpenSSF Model
Signing: one id everywhere. Signing and verifying is done by `securesystemslib`; there is no cryptography here.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import durable
from ..errors import SettingsError, SignatureInvalidError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

KEY_FILE_BYTES_MAX: Final = 16 << 10
"""Longest PEM file read, in bytes (16 KiB)."""

ALGORITHMS: Final = ("ecdsa-p256", "ecdsa-p384", "ecdsa-p521", "ed25519")
"""Key kinds understood. The first is the default and the one every Model Signing verifier must support."""

_KEYID: Final = re.compile(r"[0-9a-f]{64}")

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
            _verifier(self.pem, self.keyid).verify_signature(Signature(self.keyid, signature.hex()), message)
        except UnverifiedSignatureError as error:
            raise SignatureInvalidError(
                f"The signature does not verify with key {self.keyid[:16]}…; the bytes were changed or never signed."
            ) from error


class Signer:
    """Signs with one private key through any `securesystemslib` signer. Its `repr` shows the key id alone.

    Args:
        sslib_signer: any object with the `securesystemslib.signer.Signer` interface: `sign(bytes)` returns an object
            whose `signature` is the signature in hex.
        public_key: the key it signs with.
    """

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


def is_keyid(value: object) -> bool:
    """Say whether a value has the form of a key id: 64 lower-case hex digits."""
    return isinstance(value, str) and _KEYID.fullmatch(value) is not None


def generate_key(
    path: str | Path,
    passphrase: str | None = None,
    *,
    algorithm: str = "ecdsa-p256",
) -> PublicKey:
    """Create a key pair: PKCS#8 PEM at `path` (mode 0600, encrypted when a passphrase is given), public PEM beside it.

    Args:
        path: private key file; must not exist.
        passphrase: encrypts the private key.
        algorithm: one of `ALGORITHMS`.

    Raises:
        SettingsError: a file exists already, or the algorithm is unknown.
    """
    from cryptography.hazmat.primitives import serialization as ser

    private = _new_private_key(algorithm)
    encryption = ser.BestAvailableEncryption(passphrase.encode()) if passphrase else ser.NoEncryption()
    private_pem = private.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, encryption)
    public = public_key_of(private.public_key())
    place = Path(path)
    write_new(place, private_pem, mode=0o600)
    write_new(place.with_suffix(".pub"), public.pem.encode("ascii"), mode=0o644)
    return public


def load_public_key(path: str | Path) -> PublicKey:
    """Load a public key file (SubjectPublicKeyInfo PEM).

    Raises:
        SettingsError: absent, or not a public key of a known kind.
    """
    try:
        return public_key_of(_load_public(read_key_file(path)))
    except ValueError as error:
        raise SettingsError(f"Key {path} cannot be read: not a PEM public key of a known kind.") from error


def public_key_of(key: PublicKeyTypes) -> PublicKey:
    """Return a `cryptography` public key as ours.

    Raises:
        SettingsError: a kind not in `ALGORITHMS`.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    keyid = hashlib.sha256(pem).hexdigest()
    try:
        algorithm = _SCHEMES[sslib_key(key, keyid).scheme]
    except (KeyError, ValueError) as error:
        raise SettingsError(f"The key is of an unknown kind; use one of {', '.join(ALGORITHMS)}.") from error
    return PublicKey(keyid, algorithm, pem.decode("ascii"))


def sslib_key(key: PublicKeyTypes, keyid: str) -> Any:
    """Return a `cryptography` public key as a `securesystemslib` key with our id.

    Raises:
        ValueError: a kind it does not know.
    """
    from securesystemslib.signer import SSlibKey

    return SSlibKey.from_crypto(key, keyid)


def read_key_file(path: str | Path) -> bytes:
    """Return the bytes of a key file, at most `KEY_FILE_BYTES_MAX`.

    Raises:
        SettingsError: it cannot be opened.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(KEY_FILE_BYTES_MAX)
    except OSError as error:
        raise SettingsError(
            f"Key {path} cannot be opened ({error.strerror}); make one with `registry keys gen`."
        ) from error


def write_new(path: Path, body: bytes, *, mode: int) -> None:
    """Write a file that must not exist yet, and flush it and its name to the disk.

    Raises:
        SettingsError: it exists, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_new(path, body, mode=mode)
    except FileExistsError as error:
        raise SettingsError(
            f"{path} exists already; a key is never overwritten, choose another name."
        ) from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}).") from error


@functools.lru_cache(maxsize=1024)
def _verifier(pem: str, keyid: str) -> Any:
    return sslib_key(_load_public(pem.encode("ascii")), keyid)


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
