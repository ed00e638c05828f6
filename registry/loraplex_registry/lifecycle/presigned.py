"""Adapters signed elsewhere: write the manifest, sign the directory with any Model Signing tool, push it.

```
registry manifest ./orders acme/orders@3        # writes base_model.json and adapter.manifest.json
model_signing sign key ./orders --private_key acme.key --signature ./orders/adapter.sig.json
registry push ./orders acme/orders --signature ./orders/adapter.sig.json
```

The bundle then covers the manifest, and with it tenant, adapter, version and base. It is taken when it lists exactly
the files of the version: nothing unsigned is published, and nothing is signed that is not published.
"""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import (
    ConflictError,
    ExpiredError,
    PolicyRefusedError,
    RegistryError,
    SettingsError,
    SignatureInvalidError,
)
from ..format.manifest import MANIFEST_BYTES_MAX, Manifest
from ..refs import AdapterRef, Version
from ..signing.bundles import (
    BUNDLE_BYTES_MAX,
    KeyIdentity,
    bundle_identity,
    read_bundle,
    signed_files_unverified,
    verify_bundle_with,
)
from ..trust.policy import TrustPolicy
from ..validation.base import CARD_NAME
from ..validation.weights import BUNDLE_NAME, MANIFEST_NAME, read_small
from .amend import files_to_sign
from .content import Content, Signed


@dataclass(frozen=True, slots=True)
class Prepared:
    """A directory ready to be signed: its manifest, and where a signature inside it may lie."""

    manifest: Manifest
    signature: Path


def write_manifest(content: Content, ref: AdapterRef, version: Version, created: str) -> Prepared:
    """Write the base card and the manifest of a version into its directory.

    What the directory holds already is left alone when it is the same, but for the time in the manifest: then the
    manifest there stays.

    Args:
        content: the checked directory.
        ref: tenant and adapter.
        version: the version it will be pushed as.
        created: UTC to the second, `2026-01-31T09:00:00Z`.

    Raises:
        ConflictError: the directory holds a signature, or another manifest or base card.
        SettingsError: the directory cannot be written to.
    """
    place = content.directory
    manifest = content.manifest(ref, version, created)
    found = _manifest_in(place)
    if found is not None and found == content.manifest(ref, version, found.created):
        return Prepared(found, place / BUNDLE_NAME)
    if found is not None or (place / BUNDLE_NAME).exists():
        raise ConflictError(
            f"{place} holds another manifest or a signature already; remove {MANIFEST_NAME} and {BUNDLE_NAME} first."
        )
    if not (place / CARD_NAME).exists():
        _write(place / CARD_NAME, content.card)
    elif (place / CARD_NAME).read_bytes() != content.card:
        raise ConflictError(f"{place / CARD_NAME} is not the base given; remove it, or give it with --base.")
    _write(place / MANIFEST_NAME, manifest.to_bytes())
    return Prepared(manifest, place / BUNDLE_NAME)


def read_signed(directory: str | Path, signature: str | Path) -> Signed:
    """Return the manifest in a directory and the bundle over it, as they are published.

    Who signed is not looked at here; see `require_trusted`.

    Args:
        directory: holds the manifest.
        signature: the bundle file, as a Model Signing tool wrote it.

    Raises:
        SignatureInvalidError: not a bundle of an accepted form, or not over exactly the files of the version.
        SettingsError: the bundle cannot be opened.
        UnsupportedAdapterError: there is no manifest.
    """
    body = read_small(Path(directory) / MANIFEST_NAME, limit_bytes=MANIFEST_BYTES_MAX)
    manifest = Manifest.from_bytes(body)
    bundle = read_bundle(_read(Path(signature)))
    signed, wanted = signed_files_unverified(bundle), files_to_sign(manifest)
    for name in sorted(signed.keys() | wanted.keys()):
        if signed.get(name) != wanted.get(name):
            word = "does not sign" if name not in signed else "signs, beside the manifest,"
            if name in signed and name in wanted:
                word = "signs other bytes as"
            raise SignatureInvalidError(
                f"The bundle {word} {name[:64]!r}; run `registry manifest` and sign the directory as it is then."
            )
    return Signed(body, bundle)


def require_trusted(signed: Signed, policy: TrustPolicy, now: dt.datetime) -> str:
    """Return the id of the key that signed, when the policy lets it sign this adapter.

    Raises:
        PolicyRefusedError, SignatureInvalidError, ExpiredError: nobody would be able to use the version.
    """
    manifest, identity = signed.manifest, bundle_identity(signed.bundle)
    rule = policy.rule_for(manifest.tenant, manifest.adapter)
    if isinstance(identity, KeyIdentity):
        trusted = rule.key(identity.keyid, name=f"{manifest.tenant}/{manifest.adapter}@{manifest.version}")
        verify_bundle_with(signed.bundle, trusted.key, now)
        trusted.check(now)
        return identity.keyid
    refusal: RegistryError = PolicyRefusedError(
        f"The policy rule {rule.scope!r} names no certificates; add their authority, or sign with a listed key."
    )
    for entry in rule.authorities:
        try:
            verify_bundle_with(signed.bundle, entry.authority, now)
            entry.check(now)
        except (SignatureInvalidError, ExpiredError) as error:
            refusal = error
        else:
            return identity.keyid
    raise refusal


def _manifest_in(place: Path) -> Manifest | None:
    if not (place / MANIFEST_NAME).exists():
        return None
    return Manifest.from_bytes(read_small(place / MANIFEST_NAME, limit_bytes=MANIFEST_BYTES_MAX))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(BUNDLE_BYTES_MAX + 1)
    except OSError as error:
        raise SettingsError(
            f"Signature {path} cannot be opened ({error.strerror}); name the bundle."
        ) from error


def _write(path: Path, body: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(body)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}).") from error
