"""Everything about making and reading signatures, under one name: keys, signers, envelopes and bundles."""

from __future__ import annotations

from .bundles import (
    BUNDLE_TYPE,
    IN_TOTO_TYPE,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    Authority,
    BundleIdentity,
    CertificateIdentity,
    KeyIdentity,
    KeylessIdentity,
    bundle_identity,
    bundle_keyid,
    read_bundle,
    sign_files,
    signed_files_unverified,
    verify_bundle,
    verify_bundle_with,
)
from .certificates import CertificateAuthority
from .envelopes import (
    PAYLOAD_BYTES_MAX,
    SIGNATURES_MAX,
    cosign_envelope,
    envelope_keyid,
    envelope_keyids,
    payload_unverified,
    sign_envelope,
    verify_envelope,
)
from .keyless import KeylessAuthority
from .keys import ALGORITHMS, PublicKey, Signer, generate_key, load_public_key
from .signers import is_signer_uri, load_signer

__all__ = [
    "ALGORITHMS",
    "BUNDLE_TYPE",
    "IN_TOTO_TYPE",
    "PAYLOAD_BYTES_MAX",
    "PREDICATE_TYPE",
    "SIGNATURES_MAX",
    "STATEMENT_TYPE",
    "Authority",
    "BundleIdentity",
    "CertificateAuthority",
    "CertificateIdentity",
    "KeyIdentity",
    "KeylessAuthority",
    "KeylessIdentity",
    "PublicKey",
    "Signer",
    "bundle_identity",
    "bundle_keyid",
    "cosign_envelope",
    "envelope_keyid",
    "envelope_keyids",
    "generate_key",
    "is_signer_uri",
    "load_public_key",
    "load_signer",
    "payload_unverified",
    "read_bundle",
    "sign_envelope",
    "sign_files",
    "signed_files_unverified",
    "verify_bundle",
    "verify_bundle_with",
    "verify_envelope",
]
