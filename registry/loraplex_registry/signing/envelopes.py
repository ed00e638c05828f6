"""DSSE envelopes (https://github.com/secure-systems-lab/dsse): signed statements with one to eight signatures.

Laws: `verify_envelope(sign_envelope(p, t, *signers), t, keys) == p` for every set of keys that signed; a payload
signed as one type never verifies as another; signing one after the other gives the same envelope as signing at once.

An envelope has one spelling: signatures in ascending order of their key ids, each key once. So no second envelope with
the same meaning can be stored in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import SettingsError, SignatureInvalidError
from ..format.canonical import StrictJsonError, b64decode, b64encode, exact_object
from .keys import PublicKey, Signer, is_keyid

PAYLOAD_BYTES_MAX: Final = 128 << 10
"""Longest signed statement, in bytes (128 KiB)."""

SIGNATURES_MAX: Final = 8
"""Most signatures on one envelope."""

SIGNATURE_BYTES_MAX: Final = 1 << 10
"""Longest signature, in bytes (1 KiB; the longest kind we accept has 141)."""

PAYLOAD_TYPE_CHARACTERS_MAX: Final = 128
"""Longest payload type, in characters."""


@dataclass(frozen=True, slots=True)
class _Envelope:
    payload: bytes
    payload_type: str
    signatures: dict[str, bytes]

    def to_value(self) -> dict[str, Any]:
        return {
            "payload": b64encode(self.payload),
            "payloadType": self.payload_type,
            "signatures": [
                {"sig": b64encode(self.signatures[keyid]), "keyid": keyid}
                for keyid in sorted(self.signatures)
            ],
        }


def sign_envelope(payload: bytes, payload_type: str, *signers: Signer) -> dict[str, Any]:
    """Return an envelope signed by 1 to `SIGNATURES_MAX` signers with different keys.

    Raises:
        SettingsError: no signer, too many, a key twice, or the payload or its type is too long.
    """
    if not _is_sized(payload, payload_type):
        raise SettingsError(
            f"A signed statement has at most {PAYLOAD_BYTES_MAX} bytes and a type of at most "
            f"{PAYLOAD_TYPE_CHARACTERS_MAX} characters; shorten it."
        )
    keyids = {signer.keyid for signer in signers}
    if not 1 <= len(signers) <= SIGNATURES_MAX or len(keyids) != len(signers):
        raise SettingsError(
            f"A statement is signed by 1 to {SIGNATURES_MAX} different keys; give each key once."
        )
    message = pae(payload, payload_type)
    return _Envelope(
        payload, payload_type, {signer.keyid: signer.sign(message) for signer in signers}
    ).to_value()


def cosign_envelope(envelope: object, signer: Signer) -> dict[str, Any]:
    """Return the envelope with one more signature; the envelope given is left alone.

    The signatures already there are not verified. Signing again with a key that has signed replaces its signature.

    Raises:
        SignatureInvalidError: not an envelope, or it has `SIGNATURES_MAX` signatures of other keys.
    """
    read = _read(envelope)
    signatures = {**read.signatures, signer.keyid: b""}
    if len(signatures) > SIGNATURES_MAX:
        raise SignatureInvalidError(f"The statement has {SIGNATURES_MAX} signatures already; no more fit.")
    signatures[signer.keyid] = signer.sign(pae(read.payload, read.payload_type))
    return _Envelope(read.payload, read.payload_type, signatures).to_value()


def envelope_keyids(envelope: object) -> tuple[str, ...]:
    """Return the ids of the keys an envelope claims, in ascending order, unverified.

    Raises:
        SignatureInvalidError: not an envelope.
    """
    return tuple(_read(envelope).signatures)


def envelope_keyid(envelope: object) -> str:
    """Return the id of the one key an envelope claims, unverified.

    Raises:
        SignatureInvalidError: not an envelope with exactly one signature.
    """
    keyids = envelope_keyids(envelope)
    if len(keyids) != 1:
        raise SignatureInvalidError(
            f"The signed statement has {len(keyids)} signatures where one is allowed; sign it again."
        )
    return keyids[0]


def verify_envelope(envelope: object, payload_type: str, keys: PublicKey | Sequence[PublicKey]) -> bytes:
    """Return the payload of an envelope that every one of `keys` signed as `payload_type`.

    A signature of a key not given is not looked at beyond its form: give every known key that `envelope_keyids`
    names, so that a bad signature of a known key is never passed over.

    Raises:
        SignatureInvalidError: another type, no key given, a key that did not sign, a bad signature, or not an
            envelope.
    """
    read = _read(envelope)
    if read.payload_type != payload_type:
        raise SignatureInvalidError(f"The signed statement is of another type than {payload_type}.")
    wanted = [keys] if isinstance(keys, PublicKey) else list(keys)
    if not wanted:
        raise SignatureInvalidError(
            "No key was given to verify the signed statement with; name at least one."
        )
    message = pae(read.payload, payload_type)
    for key in wanted:
        if key.keyid not in read.signatures:
            raise SignatureInvalidError(
                f"Key {key.keyid[:16]}… did not sign the statement; sign it with this key too."
            )
        key.check(read.signatures[key.keyid], message)
    return read.payload


def payload_unverified(envelope: object) -> bytes:
    """Return the payload of an envelope without any check of its signatures: for listings, never for decisions.

    Raises:
        SignatureInvalidError: not an envelope.
    """
    return _read(envelope).payload


def pae(payload: bytes, payload_type: str) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding of a payload and its type.

    https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md#signature-definition
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _read(envelope: object) -> _Envelope:
    try:
        fields = exact_object(envelope, frozenset({"payload", "payloadType", "signatures"}))
        payload, payload_type = b64decode(fields["payload"]), fields["payloadType"]
        if not isinstance(payload_type, str) or not _is_sized(payload, payload_type):
            raise StrictJsonError("the payload is too long or its type out of shape")
        return _Envelope(payload, payload_type, _signatures(fields["signatures"]))
    except StrictJsonError as error:
        raise SignatureInvalidError(f"The signed statement is refused ({error}); sign it again.") from error


def _signatures(value: object) -> dict[str, bytes]:
    if not isinstance(value, list) or not 1 <= len(value) <= SIGNATURES_MAX:
        raise StrictJsonError(f"1 to {SIGNATURES_MAX} signatures are needed")
    found: dict[str, bytes] = {}
    for item in value:
        fields = exact_object(item, frozenset({"sig", "keyid"}))
        signature = b64decode(fields["sig"])
        if not is_keyid(fields["keyid"]) or not 0 < len(signature) <= SIGNATURE_BYTES_MAX:
            raise StrictJsonError("a signature or its key id is out of shape")
        if found and fields["keyid"] <= max(found):
            raise StrictJsonError("the key ids are not in ascending order, each once")
        found[fields["keyid"]] = signature
    return found


def _is_sized(payload: bytes, payload_type: str) -> bool:
    return len(payload) <= PAYLOAD_BYTES_MAX and 0 < len(payload_type) <= PAYLOAD_TYPE_CHARACTERS_MAX
