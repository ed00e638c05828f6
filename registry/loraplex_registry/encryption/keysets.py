"""Tink keysets of exactly one key of exactly one known kind: made, and read back strictly.

A keyset may hold several keys of several kinds, and Tink then tries them all. We accept one: its kind, size, status
and parameters are fixed by `Kind`, so that no stored byte chooses an algorithm.

Serialised keysets are secrets. They are `bytes`, never logged, and never part of a message.
"""

from __future__ import annotations

import enum
from typing import Any


class Kind(enum.Enum):
    """The kinds of key in use, by their Tink template."""

    WRAPPING = "AES256_GCM_RAW"
    """Wraps data keys: AES-256-GCM, 96-bit random nonce."""

    STREAMING = "AES256_GCM_HKDF_1MB"
    """Encrypts files: AES-256-GCM in segments of 1 MiB, a key per file derived by HKDF-SHA256 from a random salt."""


class KeysetError(ValueError):
    """The bytes are not a keyset of the expected kind. Says nothing about them."""


def new_keyset(kind: Kind) -> bytes:
    """Return a new random key, serialised."""
    import tink
    from tink import proto_keyset_format, secret_key_access

    handle = tink.new_keyset_handle(_template(kind))
    return bytes(proto_keyset_format.serialize(handle, secret_key_access.TOKEN))


def primitive(keyset: bytes, kind: Kind) -> Any:
    """Return the Tink primitive (`Aead` or `StreamingAead`) of a serialised key.

    Raises:
        KeysetError: not exactly one enabled key of this kind, size and parameters.
    """
    import tink
    from tink import aead, proto_keyset_format, secret_key_access, streaming_aead

    key_value(keyset, kind)
    try:
        handle = proto_keyset_format.parse(keyset, secret_key_access.TOKEN)
        return handle.primitive(aead.Aead if kind is Kind.WRAPPING else streaming_aead.StreamingAead)
    except tink.TinkError as error:
        raise KeysetError("not a keyset") from error


def key_value(keyset: bytes, kind: Kind) -> bytes:
    """Return the key in a serialised keyset, a secret of 32 bytes.

    Raises:
        KeysetError: not exactly one enabled key of this kind, size and parameters.
    """
    from google.protobuf.message import DecodeError

    try:
        return _checked(keyset, _template(kind), kind)
    except DecodeError as error:
        raise KeysetError("not a keyset") from error


def _template(kind: Kind) -> Any:
    from tink import aead, streaming_aead

    if kind is Kind.WRAPPING:
        aead.register()
        return aead.aead_key_templates.AES256_GCM_RAW
    streaming_aead.register()
    return streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB


def _checked(keyset: bytes, template: Any, kind: Kind) -> bytes:
    from tink.proto import aes_gcm_hkdf_streaming_pb2, aes_gcm_pb2, tink_pb2

    parsed = tink_pb2.Keyset.FromString(keyset)
    if len(parsed.key) != 1 or parsed.SerializeToString() != keyset:
        raise KeysetError("not exactly one key")
    entry = parsed.key[0]
    data = entry.key_data
    if (entry.status, entry.output_prefix_type, entry.key_id) != (
        tink_pb2.ENABLED,
        tink_pb2.RAW,
        parsed.primary_key_id,
    ) or (data.type_url, data.key_material_type) != (template.type_url, tink_pb2.KeyData.SYMMETRIC):
        raise KeysetError("another kind of key")
    if kind is Kind.WRAPPING:
        plain = aes_gcm_pb2.AesGcmKey.FromString(data.value)
        wanted = aes_gcm_pb2.AesGcmKeyFormat.FromString(template.value)
        same = True
    else:
        plain = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey.FromString(data.value)
        wanted = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKeyFormat.FromString(template.value)
        same = plain.params == wanted.params
    if not same or plain.version != 0 or len(plain.key_value) != wanted.key_size:
        raise KeysetError("another size or other parameters")
    return bytes(plain.key_value)
