"""Signers: where a private key is, and how to sign with it.

A key is a file (PKCS#8 PEM), or one that never leaves its keeper, named by a URI of `securesystemslib`:

```
keys/acme.key                                    a file
awskms:alias/acme-adapters                       AWS KMS: key id, ARN, alias or alias ARN      extra awskms
gcpkms:projects/P/locations/L/keyRings/R/cryptoKeys/K/cryptoKeyVersions/1   Google Cloud KMS   extra gcpkms
azurekms://VAULT.vault.azure.net/keys/NAME       Azure Key Vault, newest version               extra azurekms
hsm:2?label=TOKEN                                PKCS#11 token ($PYKCS11LIB), PIN = passphrase  extra hsm
hv:NAME                                          HashiCorp Vault Transit, newest version        extra vault
```

Credentials are the ambient ones of the service; none is ever an argument. What a remote keeper returns is verified with
its public key before it is used, so a wrong key version or a broken token shows when signing, not when loading.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_plus, urlsplit

from ..errors import RegistryError, SettingsError, SignatureInvalidError
from .keys import PublicKey, Signer, public_key_of, read_key_file, signer_of

EXTRAS: Final = {
    "awskms": "awskms",
    "gcpkms": "gcpkms",
    "azurekms": "azurekms",
    "hsm": "hsm",
    "hv": "vault",
}
"""URI scheme -> the optional extra of the package that brings its library."""

_CLASSES: Final = {
    "awskms": "AWSSigner",
    "gcpkms": "GCPSigner",
    "azurekms": "AzureSigner",
    "hsm": "HSMSigner",
    "hv": "VaultSigner",
}
_SCHEME = re.compile(r"(awskms|gcpkms|azurekms|hsm|hv):")
_GCP_KEY = re.compile(
    r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+/cryptoKeyVersions/[0-9]+"
)
_AZURE_KEY = re.compile(r"/keys/([A-Za-z0-9-]{1,127})(/[0-9a-f]{1,64})?")
_AZURE_HOST = re.compile(r"([A-Za-z0-9-]{3,24})\.vault\.azure\.net")
_TOKEN_KEY = re.compile(r"([0-9]{0,9})(?:\?label=([^&=?#\s]{1,128}))?")
_VAULT_KEY = re.compile(r"([A-Za-z0-9_.-]{1,128})(/[0-9]{1,9})?")


def is_signer_uri(text: str) -> bool:
    """Say whether a text names a key in a key management service or token, rather than a file."""
    return _SCHEME.match(text) is not None


def load_signer(where: str | Path, passphrase: str | None = None) -> Signer:
    """Load the signer of a key file, or of a key in a key management service, a vault or a token.

    Args:
        where: path or URI; see the top of this module.
        passphrase: decrypts a key file, or is the PIN of a token.

    Raises:
        SettingsError: absent, not a private key of a known kind, the passphrase is missing or wrong, the service's
            optional extra is not installed, or the service refuses.
    """
    if isinstance(where, str) and is_signer_uri(where):
        return _remote_signer(where, passphrase)
    return _file_signer(where, passphrase)


class RemoteSigner(Signer):
    """A signer outside this process: what it returns is verified before it is used."""

    def sign(self, message: bytes) -> bytes:
        """Return the raw signature over `message`.

        Raises:
            SettingsError: the service failed, or returned something that does not verify.
        """
        with_key = f"Key {self.keyid[:16]}… could not sign"
        try:
            signature = super().sign(message)
        except RegistryError:
            raise
        except Exception as error:  # every service's library has errors of its own
            raise SettingsError(
                f"{with_key} ({_reason(error)}); look at the credentials and the key's permissions."
            ) from error
        try:
            self.public_key.check(signature, message)
        except SignatureInvalidError as error:
            raise SettingsError(
                f"{with_key}: the service's signature does not verify with its public key; name the right key version."
            ) from error
        return signature


@dataclass(frozen=True, slots=True)
class _Place:
    """A parsed URI: its scheme, what `import_` of the signer class is called with, and the version asked for."""

    scheme: str
    arguments: tuple[Any, ...]
    version: str = ""


def _file_signer(path: str | Path, passphrase: str | None) -> Signer:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(read_key_file(path), passphrase.encode() if passphrase else None)
    except TypeError as error:
        word = "does not need a passphrase" if passphrase else "needs a passphrase"
        raise SettingsError(f"Key {path} {word}; see LORAPLEX_KEY_PASSPHRASE_FILE.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(
            f"Key {path} cannot be read: not a PKCS#8 PEM private key, or another passphrase than "
            "LORAPLEX_KEY_PASSPHRASE_FILE holds."
        ) from error
    return signer_of(private)


def _remote_signer(uri: str, passphrase: str | None) -> RemoteSigner:
    from securesystemslib.exceptions import UnsupportedLibraryError

    place = _parse(uri)
    handler = _pin(uri, passphrase)
    signer_class = getattr(importlib.import_module("securesystemslib.signer"), _CLASSES[place.scheme])
    extra = {"secrets_handler": handler} if place.scheme == "hsm" else {}
    try:
        full_uri, key = signer_class.import_(*place.arguments, **extra)
        public = _public_key_of(key)
        inner = signer_class.from_priv_key_uri(full_uri, key, handler)
    except RegistryError:
        raise
    except UnsupportedLibraryError as error:
        raise SettingsError(
            f'Key {uri} needs an optional library; install it with `pip install "loraplex[{EXTRAS[place.scheme]}]"`.'
        ) from error
    except Exception as error:  # every service's library has errors of its own
        raise SettingsError(
            f"Key {uri} cannot be used ({_reason(error)}); look at its name, the credentials and the permissions."
        ) from error
    if place.version and not full_uri.endswith(place.version):
        raise SettingsError(f"Key {uri} is not the newest version; name the newest or leave the version out.")
    return RemoteSigner(lambda message: bytes.fromhex(inner.sign(message).signature), public)


def _parse(uri: str) -> _Place:
    """Return the parts of a URI; a URI out of shape never reaches a service's library."""
    scheme, _, rest = uri.partition(":")
    parsed = {"awskms": _aws, "gcpkms": _gcp, "azurekms": _azure, "hsm": _hsm, "hv": _vault}[scheme](
        uri, rest
    )
    if parsed is None or not uri.isprintable() or len(uri) > 512:
        raise SettingsError(
            f"Key {uri[:100]!r} is not written like a key of {scheme}; see `registry keys --help`."
        )
    return parsed


def _aws(_uri: str, rest: str) -> _Place | None:
    return _Place("awskms", (rest,)) if rest and not set(rest) & set(" ?#") else None


def _gcp(_uri: str, rest: str) -> _Place | None:
    return _Place("gcpkms", (rest,)) if _GCP_KEY.fullmatch(rest) else None


def _azure(uri: str, _rest: str) -> _Place | None:
    parts = urlsplit(uri)
    host, path = _AZURE_HOST.fullmatch(parts.netloc), _AZURE_KEY.fullmatch(parts.path)
    if host is None or path is None or parts.query or parts.fragment:
        return None
    return _Place("azurekms", (host[1], path[1]), path[2] or "")


def _hsm(_uri: str, rest: str) -> _Place | None:
    match = _TOKEN_KEY.fullmatch(rest)
    if match is None:
        return None
    return _Place("hsm", (int(match[1]) if match[1] else None, unquote_plus(match[2]) if match[2] else None))


def _vault(_uri: str, rest: str) -> _Place | None:
    match = _VAULT_KEY.fullmatch(rest)
    return None if match is None else _Place("hv", (match[1],), match[2] or "")


def _public_key_of(key: Any) -> PublicKey:
    """Return the key a service reported as ours: Ed25519 comes raw in hex, the others as PEM."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    text: str = key.keyval["public"]
    if key.keytype == "ed25519":
        return public_key_of(Ed25519PublicKey.from_public_bytes(bytes.fromhex(text)))
    return public_key_of(load_pem_public_key(text.encode("ascii")))


def _pin(uri: str, passphrase: str | None) -> Callable[[str], str]:
    def answer(_question: str) -> str:
        if passphrase is None:
            raise SettingsError(f"Key {uri} needs its PIN; see LORAPLEX_KEY_PASSPHRASE_FILE.")
        return passphrase

    return answer


def _reason(error: Exception) -> str:
    """Return a service's own code, or the kind of the error; its text could hold request details."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return found[:64] if isinstance(found, str) else type(error).__name__
