"""Keys: public keys and their ids, key files, and what a signer is.

A key's id is the lower-case hex SHA-256 of its SubjectPublicKeyInfo in PEM, which is also the key hint of OpenSSF Model
Signing: one id everywhere. Signing and verifying is done by `cryptography`, with the hashes of OpenSSF Model Signing.
`securesystemslib`, which speaks to key services, is not used for it: importing its signers loads the SDK of every
service that is installed, and took half the time of a short command.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .. import durable
from ..errors import SettingsError, SignatureInvalidError, what_to_do

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurve
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

KEY_FILE_BYTES_MAX: Final = 16 << 10
"""Longest PEM file read, in bytes (16 KiB)."""

ALGORITHMS: Final = ("ecdsa-p256", "ecdsa-p384", "ecdsa-p521", "ed25519")
"""Key kinds understood. The first is the default and the one every Model Signing verifier must support."""

SIGNATURES_KNOWN_MAX: Final = 8192
"""Most signatures that are not verified again; about 300 bytes each."""

_KEYID: Final = re.compile(r"[0-9a-f]{64}")

_CURVES: Final = {
    "secp256r1": ("ecdsa-p256", "SHA256"),
    "secp384r1": ("ecdsa-p384", "SHA384"),
    "secp521r1": ("ecdsa-p521", "SHA512"),
}
"""Curve -> our name of the algorithm, and the hash of ECDSA (FIPS 186-5: as strong as the curve)."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key by its id: lower-case hex SHA-256 of its SubjectPublicKeyInfo in PEM (the standard's key hint)."""

    keyid: str
    algorithm: str
    pem: str

    def check(self, signature: bytes, message: bytes) -> None:
        """Raise SignatureInvalidError unless `signature` over `message` was made with this key.

        What was found good before is not computed again: a server decides about the same statements again and again.
        """
        from cryptography.exceptions import InvalidSignature

        claim = (self.pem, signature, hashlib.sha256(message).digest())
        if _GOOD.knows(claim):
            return
        try:
            _verifier(self.pem)(signature, message)
        except InvalidSignature as error:
            raise SignatureInvalidError(
                f"The signature does not verify with key {self.keyid[:16]}…; the bytes were changed or never signed."
            ) from error
        _GOOD.add(claim)


class _GoodSignatures:
    """Key, signature and digest of the message of signatures that verified; those used last are kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claims: OrderedDict[tuple[str, bytes, bytes], None] = OrderedDict()

    def knows(self, claim: tuple[str, bytes, bytes]) -> bool:
        with self._lock:
            known = claim in self._claims
            if known:
                self._claims.move_to_end(claim)
            return known

    def add(self, claim: tuple[str, bytes, bytes]) -> None:
        with self._lock:
            self._claims[claim] = None
            while len(self._claims) > SIGNATURES_KNOWN_MAX:
                self._claims.popitem(last=False)


_GOOD: Final = _GoodSignatures()


class Signer:
    """Signs with one private key, wherever that is. Its `repr` shows the key id alone.

    Args:
        sign: returns the raw signature over a message.
        public_key: the key it signs with.
    """

    def __init__(self, sign: Callable[[bytes], bytes], public_key: PublicKey) -> None:
        self._sign = sign
        self.public_key = public_key

    @property
    def keyid(self) -> str:
        """The public key's id."""
        return self.public_key.keyid

    def sign(self, message: bytes) -> bytes:
        """Return the raw signature over `message`."""
        return self._sign(message)

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
    return PublicKey(hashlib.sha256(pem).hexdigest(), _algorithm(key), pem.decode("ascii"))


def signer_of(key: PrivateKeyTypes) -> Signer:
    """Return the signer of a `cryptography` private key.

    Raises:
        SettingsError: a kind not in `ALGORITHMS`.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    public = public_key_of(key.public_key())
    if isinstance(key, ec.EllipticCurvePrivateKey):
        private, scheme = key, _ecdsa(key.curve)
        return Signer(lambda message: private.sign(message, scheme), public)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    return Signer(key.sign, public)


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
        raise SettingsError(f"{path} cannot be written ({error.strerror}); {what_to_do(error)}.") from error


@functools.lru_cache(maxsize=1024)
def _verifier(pem: str) -> Callable[[bytes, bytes], None]:
    """Return what verifies a signature over a message, or raises InvalidSignature. The key is parsed once."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    key = _load_public(pem.encode("ascii"))
    _algorithm(key)
    if isinstance(key, ec.EllipticCurvePublicKey):
        public, scheme = key, _ecdsa(key.curve)
        return lambda signature, message: public.verify(signature, message, scheme)
    assert isinstance(key, ed25519.Ed25519PublicKey)
    return key.verify


def _algorithm(key: PublicKeyTypes) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name][0]
    raise SettingsError(f"The key is of an unknown kind; use one of {', '.join(ALGORITHMS)}.")


def _ecdsa(curve: EllipticCurve) -> ECDSA:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    return ECDSA(getattr(hashes, _CURVES[curve.name][1])())


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
