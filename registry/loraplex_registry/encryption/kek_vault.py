"""A key-encryption key in HashiCorp Vault's transit engine: it never leaves Vault.

Vault's engine takes associated data only in newer versions and ignores it silently in older ones, and Tink's own Vault
client refuses it. So the SHA-256 of the `KeyContext` is encrypted together with the data key and compared after
decryption: transit ciphertexts are authenticated, so neither can be exchanged.

Address, token, namespace and CA come from `VAULT_ADDR`, `VAULT_TOKEN`, `VAULT_NAMESPACE` and `VAULT_CACERT`. The key is
of type aes256-gcm96, not derived. Needs `hvac`, the extra `loraplex[vault]`.

https://developer.hashicorp.com/vault/api-docs/secret/transit
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Callable
from typing import Any, Final

from ..errors import DigestMismatchError, SettingsError, StoreRefusedError, StoreUnavailableError
from .key_providers import KeyContext

TIMEOUT_S: Final = 10
"""Seconds to wait for an answer."""

_DIGEST_BYTES = 32
_PATH = re.compile(r"(?P<mount>[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*)/keys/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)")


class VaultKey:
    """See the module. `path` is `MOUNT/keys/NAME`, as `vault read` takes it."""

    def __init__(self, path: str) -> None:
        match = _PATH.fullmatch(path)
        if match is None or ".." in path:
            raise SettingsError(
                f"encryption key {path[:100]!r} is not a transit key; write vault:transit/keys/NAME."
            )
        self._path = path
        self._mount, self._name = match["mount"], match["name"]

    @property
    def uri(self) -> str:
        """`vault:` and the key's path."""
        return f"vault:{self._path}"

    def wrap(self, dek: bytes, context: KeyContext) -> bytes:
        """See `KeyProvider.wrap`. One request."""
        body = base64.b64encode(_binding(context) + dek).decode("ascii")
        answer = self._call(
            lambda transit: transit.encrypt_data(self._name, plaintext=body, mount_point=self._mount)
        )
        return str(answer["data"]["ciphertext"]).encode("ascii")

    def unwrap(self, wrapped: bytes, context: KeyContext) -> bytes:
        """See `KeyProvider.unwrap`. One request."""
        wrong = (
            f"The data key of {context} was not wrapped by {self.uri} for it; the record is damaged or was "
            "tampered with."
        )
        try:
            text = wrapped.decode("ascii")
            answer = self._call(
                lambda transit: transit.decrypt_data(self._name, ciphertext=text, mount_point=self._mount),
                wrong=wrong,
            )
            body = base64.b64decode(answer["data"]["plaintext"], validate=True)
        except (UnicodeDecodeError, binascii.Error) as error:
            raise DigestMismatchError(wrong) from error
        if not hmac.compare_digest(body[:_DIGEST_BYTES], _binding(context)):
            raise DigestMismatchError(wrong)
        return body[_DIGEST_BYTES:]

    def _call(self, call: Callable[[Any], Any], *, wrong: str | None = None) -> Any:
        """Run one call and turn its errors into ours. No message holds a ciphertext, a key or a token."""
        try:
            import hvac
            import requests
        except ImportError as error:
            raise SettingsError("Vault keys need hvac; install loraplex[vault].") from error
        try:
            client = hvac.Client(
                namespace=os.environ.get("VAULT_NAMESPACE"),
                verify=os.environ.get("VAULT_CACERT") or True,
                timeout=TIMEOUT_S,
            )
            return call(client.secrets.transit)
        except hvac.exceptions.InvalidRequest as error:
            if wrong is not None:
                raise DigestMismatchError(wrong) from error
            raise StoreRefusedError(f"{self.uri} refused to encrypt; check that the key exists.") from error
        except (
            hvac.exceptions.VaultDown,
            hvac.exceptions.InternalServerError,
            hvac.exceptions.BadGateway,
            hvac.exceptions.RateLimitExceeded,
            requests.exceptions.RequestException,
        ) as error:
            raise StoreUnavailableError(
                f"{self.uri} cannot be reached ({type(error).__name__}); try again."
            ) from error
        except hvac.exceptions.VaultError as error:
            raise StoreRefusedError(
                f"{self.uri} refused ({type(error).__name__}); check VAULT_TOKEN and its policy."
            ) from error

    def __repr__(self) -> str:
        return f"VaultKey({self.uri})"


def _binding(context: KeyContext) -> bytes:
    return hashlib.sha256(context.to_bytes()).digest()
