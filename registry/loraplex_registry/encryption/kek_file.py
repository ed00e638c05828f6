"""A key-encryption key in a file: one AES-256-GCM key of one tenant, made by `registry keys gen --encryption FILE`.

The file is canonical JSON that holds a Tink keyset, a random id and the tenant's name. It must be readable by its
owner alone. The id is what records call the key (`raw:<id>`); it says nothing about the key.

Tink wraps the data key, with the `KeyContext` as associated data.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any, Final

from ..durable import sync_directory
from ..errors import ConflictError, DigestMismatchError, PolicyRefusedError, SettingsError
from ..format.canonical import StrictJsonError, b64decode, b64encode, canonical, exact_object, parse_canonical
from ..refs import check_name
from ..signing.keys import write_new
from .key_providers import KeyContext
from .keysets import KeysetError, Kind, new_keyset, primitive

SCHEMA: Final = "loraplex.kek/1"
KEY_FILE_BYTES_MAX: Final = 16 << 10
"""Longest key file, in bytes (16 KiB)."""

_ID = re.compile(r"[0-9a-f]{32}")
_FIELDS = frozenset({"schema", "id", "tenant", "keyset"})


class FileKey:
    """See the module. Its `repr` shows the id alone."""

    def __init__(self, path: Path, key_id: str, tenant: str, aead: Any) -> None:
        self._path = path
        self._id = key_id
        self._tenant = tenant
        self._aead = aead

    @classmethod
    def load(cls, path: Path, *, tenant: str) -> FileKey:
        """Read a key file.

        Raises:
            SettingsError: absent, readable by others, not a key file, or another tenant's.
        """
        try:
            fields = exact_object(parse_canonical(_read(path), limit_bytes=KEY_FILE_BYTES_MAX), _FIELDS)
            if (
                fields["schema"] != SCHEMA
                or not isinstance(fields["id"], str)
                or not _ID.fullmatch(fields["id"])
            ):
                raise StrictJsonError("unknown schema or id")
            aead = primitive(b64decode(fields["keyset"]), Kind.WRAPPING)
        except (StrictJsonError, KeysetError) as error:
            raise SettingsError(
                f"Encryption key {path} is not a key file ({error}); make one with `registry keys gen --encryption`."
            ) from error
        if fields["tenant"] != tenant:
            raise SettingsError(
                f"Encryption key {path} is not tenant {tenant}'s; give every tenant its own, as in "
                "file:keys/{tenant}.kek."
            )
        return cls(path, fields["id"], tenant, aead)

    @property
    def uri(self) -> str:
        """`raw:` and the key's id."""
        return f"raw:{self._id}"

    def wrap(self, dek: bytes, context: KeyContext) -> bytes:
        """See `KeyProvider.wrap`."""
        self._check(context)
        return bytes(self._aead.encrypt(dek, context.to_bytes()))

    def unwrap(self, wrapped: bytes, context: KeyContext) -> bytes:
        """See `KeyProvider.unwrap`."""
        import tink

        self._check(context)
        try:
            return bytes(self._aead.decrypt(wrapped, context.to_bytes()))
        except tink.TinkError as error:
            raise DigestMismatchError(
                f"The data key of {context} was not wrapped by {self.uri} for it; the record is damaged or was "
                "tampered with."
            ) from error

    def check_destroyable(self, tenant: str) -> str:
        """See `DestroyableKey.check_destroyable`."""
        if tenant != self._tenant or self._path.is_symlink():
            raise PolicyRefusedError(f"{self._path} is a link or another tenant's key; it is not destroyed.")
        return f"overwrite and remove {self._path}"

    def destroy(self, tenant: str, *, pending_days: int) -> str:  # noqa: ARG002
        """Overwrite the file with random bytes, make that durable, and remove it. At once: `pending_days` is not used.

        A file system that copies on write, a flash disk and a backup may keep the old bytes; see `deploy/README.md`.
        """
        self.check_destroyable(tenant)
        _overwrite_and_remove(self._path)
        return f"overwrote and removed {self._path}"

    def _check(self, context: KeyContext) -> None:
        if context.tenant != self._tenant:
            raise PolicyRefusedError(
                f"Encryption key {self.uri} is not for {context}; it is another tenant's."
            )

    def __repr__(self) -> str:
        return f"FileKey({self.uri})"


def generate_encryption_key(path: str | Path, tenant: str) -> str:
    """Make a key file for a tenant, readable by its owner alone, and return what records will call the key.

    Losing the file loses every version encrypted under it: keep a copy in a safe place.

    Raises:
        SettingsError: the file exists or cannot be written.
    """
    check_name("tenant", tenant)
    keyset, key_id = new_keyset(Kind.WRAPPING), secrets.token_hex(16)
    body = canonical({"schema": SCHEMA, "id": key_id, "tenant": tenant, "keyset": b64encode(keyset)})
    write_new(Path(path), body, mode=0o600)
    return f"raw:{key_id}"


def _read(path: Path) -> bytes:
    """Read a key file. A link is followed (secrets are mounted so), what it leads to must be the owner's alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            body = file.read(KEY_FILE_BYTES_MAX + 1) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise SettingsError(
            f"Encryption key {path} cannot be opened ({error.strerror}); name a key file of yours, or make one with "
            "`registry keys gen FILE --encryption`."
        ) from error
    if not body:
        raise SettingsError(f"Encryption key {path} is empty or not a regular file; name the key file.")
    if status.st_mode & 0o077 or status.st_uid not in {0, os.geteuid()}:
        raise SettingsError(
            f"Encryption key {path} may be read by others; run `chmod 600 {path}` as its owner."
        )
    return body


def _overwrite_and_remove(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(
            descriptor, "wb"
        ) as file:  # opened without O_TRUNC: the old blocks are written over in place
            file.write(secrets.token_bytes(KEY_FILE_BYTES_MAX))
            file.flush()
            os.fsync(descriptor)
        path.unlink()
        sync_directory(path.parent)
    except OSError as error:
        raise ConflictError(f"{path} could not be removed ({error.strerror}); remove it by hand.") from error
