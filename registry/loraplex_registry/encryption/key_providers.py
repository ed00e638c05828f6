"""Key-encryption keys: who holds them, which one wraps, which ones may unwrap.

A data key encrypts one push and lies in its record, wrapped by a key-encryption key (KEK) that never lies in the
store. Every provider binds the wrapped key to its `KeyContext`, so that it opens for the tenant, adapter, version and
push it was made for and for nothing else.

```
file:keys/acme.kek                                   a key file, `raw:<id>` in records
awskms:arn:aws:kms:eu-central-1:123456789012:key/…   a key that never leaves AWS KMS
vault:transit/keys/acme                              a key that never leaves HashiCorp Vault's transit engine
```

`{tenant}` in an address stands for the tenant's name, so one setting serves many tenants. A record names the key that
wrapped it, but only to be compared: the key used is always one that is configured, and no text of a record becomes a
path, an address or an ARN that is asked for.

This module is light; each provider loads its library when it is first used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import unquote

from ..errors import PolicyRefusedError, RegistryError, SettingsError
from ..format.canonical import canonical
from ..refs import AdapterRef, Version, check_name

if TYPE_CHECKING:
    from ..format.manifest import FileEntry

CONTEXT_FORMAT: Final = 1
"""Version of the associated data; part of it, so that another form can never be mistaken for this one."""

KEYS_MAX: Final = 8
"""Most key-encryption keys configured at once."""

SCHEMES: Final = ("file", "awskms", "vault")


@dataclass(frozen=True, slots=True)
class KeyContext:
    """What a data key belongs to: one push of one version of one adapter of one tenant. Public, and no secret."""

    tenant: str
    adapter: str
    version: Version
    pid: str

    @classmethod
    def of(cls, ref: AdapterRef, version: Version, pid: str) -> KeyContext:
        """Return the context of push `pid` of a version of `ref`."""
        return cls(ref.tenant, ref.adapter, version, pid)

    def to_bytes(self) -> bytes:
        """Return the associated data of the wrapped key: canonical JSON, so equal contexts are equal bytes."""
        return canonical(self._value())

    def of_file(self, file: FileEntry) -> bytes:
        """Return the associated data of one file: the context, and the file's name, plaintext size and SHA-256."""
        return canonical({**self._value(), "name": file.name, "size": file.size, "sha256": file.sha256})

    def to_pairs(self) -> dict[str, str]:
        """Return the context as the texts a key management service takes; it logs them in clear."""
        pairs = {"tenant": self.tenant, "adapter": self.adapter, "version": str(self.version)}
        return {**pairs, "pid": self.pid}

    def _value(self) -> dict[str, Any]:
        return {
            "fmt": CONTEXT_FORMAT,
            "tenant": self.tenant,
            "adapter": self.adapter,
            "version": self.version,
            "pid": self.pid,
        }

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}@{self.version}"


class KeyProvider(Protocol):
    """One key-encryption key. Methods may be called from many threads; no `repr` shows a secret."""

    @property
    def uri(self) -> str:
        """What records call the key."""

    def wrap(self, dek: bytes, context: KeyContext) -> bytes:
        """Return `dek` encrypted and bound to `context`.

        Raises:
            PolicyRefusedError: the key is not for this tenant.
            StoreUnavailableError, StoreRefusedError: the key service.
        """

    def unwrap(self, wrapped: bytes, context: KeyContext) -> bytes:
        """Return the data key.

        Raises:
            DigestMismatchError: it was not wrapped by this key for this context.
            PolicyRefusedError: the key is not for this tenant.
            StoreUnavailableError, StoreRefusedError: the key service.
        """


class DestroyableKey(KeyProvider, Protocol):
    """A key this package can destroy: a file, or a key in AWS KMS."""

    def check_destroyable(self, tenant: str) -> str:
        """Return what destroying the key would do, in words.

        Raises:
            PolicyRefusedError: it cannot be shown that the key serves this tenant alone.
        """

    def destroy(self, tenant: str, *, pending_days: int) -> str:
        """Destroy the key as far as its holder allows and return what was done, in words."""


class KeyRing:
    """The configured keys: the first wraps, each of them may unwrap. Holds addresses only, and reads keys when used.

    A ring of no keys is false: new versions are then left in clear, and encrypted ones are refused.
    """

    def __init__(self, addresses: Sequence[str] = ()) -> None:
        if len(addresses) > KEYS_MAX:
            raise SettingsError(
                f"More than {KEYS_MAX} encryption keys are set; rewrap and leave old ones out."
            )
        for address in addresses:
            _check_address(address)
        self._addresses = tuple(addresses)

    @classmethod
    def parse(cls, text: str | None) -> KeyRing:
        """Return the ring of the setting `encryption_key`: addresses separated by commas, or None.

        Raises:
            SettingsError: an address of no known kind.
        """
        return cls([part.strip() for part in text.split(",")] if text else ())

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses as configured."""
        return self._addresses

    def __bool__(self) -> bool:
        return bool(self._addresses)

    def wrapping(self, tenant: str) -> KeyProvider:
        """Return the key that wraps a tenant's new data keys.

        Raises:
            SettingsError: no key is configured; or its file is absent, readable by others, damaged, another tenant's.
        """
        if not self._addresses:
            raise SettingsError("No encryption_key is set; name a key file, or a key of AWS KMS or Vault.")
        return provider_from(self._addresses[0], tenant=tenant)

    def unwrapping(self, tenant: str, kek: str) -> KeyProvider:
        """Return the configured key that records call `kek`.

        Raises:
            PolicyRefusedError: none of the keys configured for the tenant is called so.
            SettingsError: the only key that might be it cannot be read.
        """
        failure: RegistryError | None = None
        for address in self._addresses:
            try:
                provider = provider_from(address, tenant=tenant)
            except RegistryError as error:
                failure = failure or error
                continue
            if provider.uri == kek:
                return provider
        if failure is not None:
            raise failure
        missing = (
            "is not among the configured ones" if self._addresses else "is needed, and none is configured"
        )
        raise PolicyRefusedError(
            f"Encryption key {kek[:100]!r} {missing} for tenant {tenant}; set encryption_key to the key that wraps it."
        )

    def all(self, tenant: str) -> Iterator[KeyProvider]:
        """Yield every key configured for a tenant; see `wrapping` for what is raised."""
        for address in self._addresses:
            yield provider_from(address, tenant=tenant)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self._addresses)})"


def provider_from(address: str, *, tenant: str) -> KeyProvider:
    """Return the key at `address`, with `{tenant}` replaced.

    Args:
        address: as in the module's docstring; a `file:` path is relative to the working directory, see
            `anchored_addresses`.
        tenant: whose adapters are to be wrapped or unwrapped.

    Raises:
        SettingsError: the address is of no known kind, or its key file cannot be used.
    """
    check_name("tenant", tenant)
    _check_address(address)
    scheme, _, rest = address.replace("{tenant}", tenant).partition(":")
    if scheme == "awskms":
        from .kek_awskms import AwsKmsKey

        return AwsKmsKey(rest)
    if scheme == "vault":
        from .kek_vault import VaultKey

        return VaultKey(rest)
    from .kek_file import FileKey

    return FileKey.load(file_path(rest), tenant=tenant)


def file_path(rest: str) -> Path:
    """Return the path in a `file:` address, given without its scheme: `keys/a.kek`, `/keys/a.kek`, `///keys/a.kek`."""
    return Path(unquote(rest.removeprefix("//")) if rest.startswith("///") else rest).expanduser()


def anchored_addresses(text: str, directory: Path) -> str:
    """Return the setting `encryption_key` with relative key files made absolute, below `directory`."""
    parts = []
    for part in text.split(","):
        scheme, colon, rest = part.strip().partition(":")
        if scheme == "file" and colon:
            rest = str(directory / file_path(rest))
        parts.append(scheme + colon + rest)
    return ", ".join(parts)


def _check_address(address: str) -> None:
    scheme, colon, rest = address.partition(":")
    if scheme not in SCHEMES or not colon or not rest:
        raise SettingsError(
            f"encryption key {address[:100]!r} is of no known kind; write file:PATH, awskms:ARN or "
            "vault:MOUNT/keys/NAME."
        )
