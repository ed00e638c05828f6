"""What each command of `registry` does: a function from a session to a JSON-able result and lines for people."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from . import trust
from .base import CARD_NAME, BaseModel
from .canonical import StrictJsonError, parse_canonical
from .errors import (
    ConflictError,
    RegistryError,
    SettingsError,
    SignatureInvalidError,
    UnsupportedAdapterError,
)
from .manifest import MANIFEST_BYTES_MAX, Manifest
from .progress import ProgressBar, readable
from .record import RECORD_BYTES_MAX, CommittedRecord, StoredFile
from .refs import AdapterRef, check_name
from .registry import Registry, Resolved, utc_now
from .settings import Settings, config_directory, data_directory, load_settings, settings_path
from .signing import generate_key, load_public_key, load_signer
from .store import open_store
from .trust import TrustPolicy, VerifiedManifest
from .weights import BUNDLE_NAME, MANIFEST_NAME, Limits, open_regular, read_small, validate_adapter

Result = tuple[dict[str, Any], list[str]]


@dataclass(frozen=True)
class Session:
    """One run of the command: its arguments, the settings they override, and the terminal."""

    arguments: argparse.Namespace
    settings: Settings
    environment: Mapping[str, str]
    stderr: TextIO

    @classmethod
    def begin(cls, arguments: argparse.Namespace, environment: Mapping[str, str], stderr: TextIO) -> Session:
        """Read the settings file and lay the command line over it."""
        names = ("registry", "endpoint_url", "region", "policy", "key")
        given = {name: getattr(arguments, name, None) for name in names}
        return cls(arguments, load_settings(environment).overridden(**given), environment, stderr)

    def registry(self) -> Registry:
        """Return the registry that is set."""
        url = self.settings.require("registry", option="--registry")
        return Registry(open_store(url, endpoint_url=self.settings.endpoint_url, region=self.settings.region))

    def policy(self) -> TrustPolicy:
        """Return the trust policy that is set."""
        return TrustPolicy.load(self.settings.require("policy", option="--policy"))

    def ref(self, text: str) -> AdapterRef:
        """Return a reference; a name without tenant gets the tenant of the settings."""
        if "/" not in text.partition("@")[0]:
            text = f"{self.settings.require('tenant', option='the tenant: TENANT/' + text[:80])}/{text}"
        return AdapterRef.parse(text)

    def verified(self, text: str) -> tuple[Registry, VerifiedManifest]:
        """Resolve and verify a reference."""
        registry = self.registry()
        return registry, registry.verify(registry.resolve(self.ref(text)), self.policy())

    def passphrase(self, path: str | None) -> str | None:
        """Return the first line of a passphrase file, None without one. A passphrase is never an argument."""
        if not path:
            return None
        try:
            with Path(path).open(encoding="utf-8") as file:
                line = file.readline(4096).rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"Passphrase file {path} cannot be read.") from error
        if not line:
            raise SettingsError(f"Passphrase file {path} is empty.")
        return line


def init(session: Session) -> Result:
    """Make key, policy, settings and registry; keep what exists."""
    tenant = session.arguments.tenant
    check_name("tenant", tenant)
    path = settings_path(session.environment)
    if path.exists():
        if session.settings.tenant != tenant:
            raise ConflictError(
                f"{path} exists and is for tenant {session.settings.tenant}; edit it, or remove it first."
            )
        return {"settings": str(path), "created": False}, [f"{path} exists; nothing was changed."]
    place = config_directory(session.environment)
    url = session.settings.registry or (data_directory(session.environment) / "registry").as_uri()
    key = place / "keys" / f"{tenant}.key"
    public = key.with_suffix(".pub")
    keyid = (load_public_key(public) if public.exists() else generate_key(key)).keyid
    Registry(
        open_store(url, endpoint_url=session.settings.endpoint_url, region=session.settings.region)
    ).initialise()
    policy = place / "policy.toml"
    if not policy.exists():
        policy.write_text(_policy_text(tenant), encoding="utf-8")
    path.write_text(_settings_text(tenant, url, session.settings), encoding="utf-8")
    result = {
        "settings": str(path),
        "created": True,
        "registry": url,
        "tenant": tenant,
        "keyid": keyid,
        "key": str(key),
        "policy": str(policy),
    }
    return result, [
        f"registry  {url}",
        f"key       {key} ({keyid[:16]}…)",
        f"policy    {policy}",
        f"settings  {path}",
        "Next: registry push ./adapter",
    ]


def keys(session: Session) -> Result:
    """Make a key pair."""
    arguments = session.arguments
    path = Path(arguments.file)
    public = path.with_suffix(".pub")
    if public == path:
        raise SettingsError(
            f"{path} would be both private and public key; name the private key without .pub."
        )
    passphrase = session.passphrase(arguments.passphrase_file)
    key = generate_key(path, passphrase, algorithm=arguments.algorithm)
    result = {"key": str(path), "public_key": str(public), "keyid": key.keyid, "algorithm": key.algorithm}
    return result, [f"private  {path}", f"public   {public}", f"keyid    {key.keyid}"]


def push(session: Session) -> Result:
    """Publish a directory."""
    directory = Path(session.arguments.directory)
    ref = session.ref(session.arguments.ref or directory.resolve().name)
    bar = ProgressBar(session.stderr)
    signer = load_signer(
        session.settings.require("key", option="--key"),
        session.passphrase(session.environment.get("LORAPLEX_KEY_PASSPHRASE_FILE")),
    )
    try:
        base = _base_for(session, directory, bar)
        done = session.registry().publish(
            directory, ref, signer, base, tag=session.arguments.tag, progress=bar
        )
    finally:
        bar.close()
    result = {
        "ref": str(done.ref),
        "version": done.version,
        "digest": done.digest,
        "created": done.created,
        "size_bytes": done.size_bytes,
        "requests": done.requests,
        "keyid": done.keyid,
        "tag": done.tag,
        "tag_moved": done.tag_moved,
    }
    lines = [
        f"{'pushed' if done.created else 'already pushed'} {ref.name}@{done.version}",
        f"  digest  {done.digest}",
        f"  signed  {done.keyid[:16]}…",
        f"  size    {readable(done.size_bytes)} in {done.requests} requests",
    ]
    if done.tag is not None:
        lines.append(f"  tag     {done.tag} {'moved here' if done.tag_moved else 'points here already'}")
    return result, lines


def pull(session: Session) -> Result:
    """Write a verified version to a directory."""
    registry, verified = session.verified(session.arguments.ref)
    bar = ProgressBar(session.stderr)
    try:
        registry.pull(verified, session.arguments.directory, progress=bar)
    finally:
        bar.close()
    result = {**_verified_result(verified), "directory": session.arguments.directory}
    return result, [f"pulled {verified.ref} to {session.arguments.directory}", f"  digest  {verified.digest}"]


def verify(session: Session) -> Result:
    """Check a pulled directory, or a version in the registry with all its bytes."""
    target = Path(session.arguments.target)
    if (target / BUNDLE_NAME).is_file():
        verified = _verify_directory(session, target)
    else:
        registry, verified = session.verified(session.arguments.target)
        bar = ProgressBar(session.stderr)
        try:
            with tempfile.TemporaryDirectory(prefix="loraplex-") as place:
                registry.pull(verified, Path(place) / "adapter", progress=bar)
        finally:
            bar.close()
    lines = [f"verified {verified.ref}", f"  digest  {verified.digest}"]
    return _verified_result(verified), [
        *lines,
        f"  signed  {verified.keyid[:16]}… under rule {verified.scope!r}",
    ]


def resolve(session: Session) -> Result:
    """Print the verified digest of a reference."""
    _, verified = session.verified(session.arguments.ref)
    return _verified_result(verified), [f"{verified.ref.name}@{verified.digest}"]


def show(session: Session) -> Result:
    """Print a version's manifest and whether it would be trusted."""
    registry = session.registry()
    resolved = registry.resolve(session.ref(session.arguments.ref))
    manifest = resolved.record.manifest_unverified()
    trusted, reason = _trusted(session, registry, resolved)
    base, lora = manifest.base_model, manifest.lora
    result = {
        "ref": f"{resolved.ref.name}@{resolved.version}",
        "digest": resolved.digest,
        "verified": trusted,
        "reason": reason,
        "tag_generation": resolved.tag.statement.generation if resolved.tag else None,
        "manifest": parse_canonical(resolved.record.manifest_bytes),
    }
    lines = [
        f"{manifest.tenant}/{manifest.adapter}@{manifest.version}",
        f"  digest    {resolved.digest}",
        f"  verified  {'yes' if trusted else f'NO: {reason}'}",
        f"  created   {manifest.created}",
        f"  base      {base.name} {base.digest}",
        f"  lora      rank {lora.rank}, alpha {lora.alpha:g}, {lora.dtype}, {lora.n_params} parameters",
        f"  modules   {', '.join(lora.target_modules)}",
        *(f"  file      {file.name}  {readable(file.size)}  sha256:{file.sha256}" for file in manifest.files),
    ]
    return result, lines


def ls(session: Session) -> Result:
    """List tenants, adapters or versions; nothing is verified."""
    registry, scope = session.registry(), session.arguments.scope
    if scope is None:
        tenants = list(registry.tenants())
        return {"tenants": tenants}, tenants
    if "/" not in scope:
        adapters = list(registry.adapters(scope))
        return {"tenant": scope, "adapters": adapters}, [f"{scope}/{name}" for name in adapters]
    ref = AdapterRef.parse(scope)
    tags = list(registry.tags(ref))
    versions = list(registry.versions(ref))
    result = {
        "adapter": ref.name,
        "tags": tags,
        "versions": [
            {
                "version": entry.version,
                "state": entry.state,
                "digest": entry.digest,
                "created": entry.created,
                "size_bytes": entry.size_bytes,
            }
            for entry in versions
        ],
    }
    lines = [
        f"{ref.name}@{entry.version}  {entry.state}  {entry.digest or ''}".rstrip() for entry in versions
    ]
    return result, lines + [f"{ref.name}@{tag}  tag" for tag in tags]


COMMANDS: Mapping[str, Callable[[Session], Result]] = {
    "init": init,
    "keys": keys,
    "push": push,
    "pull": pull,
    "verify": verify,
    "resolve": resolve,
    "show": show,
    "ls": ls,
}


def _base_for(session: Session, directory: Path, bar: ProgressBar) -> BaseModel:
    """Return the base model: the option, the card in the directory, or the settings, in this order."""
    named = session.arguments.base
    if named is None and (directory / CARD_NAME).is_file():
        return BaseModel.load(directory / CARD_NAME)
    place = named or session.settings.base
    if place is None:
        raise SettingsError(
            f"The base model of {directory} is not known: it holds no {CARD_NAME}; give --base DIR, or set base in "
            "the settings."
        )
    return BaseModel.load(place, progress=bar)


def _trusted(session: Session, registry: Registry, resolved: Resolved) -> tuple[bool, str | None]:
    try:
        registry.verify(resolved, session.policy())
    except RegistryError as error:
        return False, f"{error.code}: {error.message}"
    return True, None


def _verified_result(verified: VerifiedManifest) -> dict[str, Any]:
    return {
        "ref": str(verified.ref),
        "version": verified.ref.version,
        "digest": verified.digest,
        "keyid": verified.keyid,
        "scope": verified.scope,
        "tag": verified.tag,
        "tag_generation": verified.tag_generation,
        "rank": verified.manifest.lora.rank,
        "base_digest": verified.manifest.base_model.digest,
        "size_bytes": verified.manifest.size_bytes,
    }


def _verify_directory(session: Session, directory: Path) -> VerifiedManifest:
    """Verify a pulled directory as if a store held it."""
    manifest_bytes = read_small(directory / MANIFEST_NAME, limit_bytes=MANIFEST_BYTES_MAX)
    manifest = Manifest.from_bytes(manifest_bytes)
    try:
        bundle = parse_canonical(read_small(directory / BUNDLE_NAME, limit_bytes=RECORD_BYTES_MAX))
    except StrictJsonError as error:
        raise SignatureInvalidError(
            f"{directory / BUNDLE_NAME} cannot be read ({error}); pull the adapter again."
        ) from error
    files = tuple(_found(directory / file.name) for file in manifest.files)
    record = CommittedRecord("0" * 32, manifest_bytes, bundle, files)
    ref = AdapterRef(manifest.tenant, manifest.adapter, version=manifest.version)
    policy = session.policy()
    verified = trust.verify(
        ref, version=manifest.version, record=record, tag=None, policy=policy, now=utc_now()
    )
    facts = validate_adapter(directory, BaseModel.load(directory / CARD_NAME), Limits())
    if {fact.name for fact in facts.files} | {CARD_NAME} != {file.name for file in manifest.files}:
        raise UnsupportedAdapterError(
            f"{directory} holds other files than were signed; pull the adapter again."
        )
    return verified


def _found(path: Path) -> StoredFile:
    """Return size and digest of a file as it lies on disk."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return StoredFile(path.name, size, digest.hexdigest(), blob="")


def _policy_text(tenant: str) -> str:
    return f"""# Whose signature counts for which adapter. Everything not listed is refused.
version = 1
default = "deny"

[[rules]]
scope = "{tenant}/**"
keys = [{{ path = "keys/{tenant}.pub" }}]
"""


def _settings_text(tenant: str, url: str, settings: Settings) -> str:
    lines = {
        "registry": url,
        "tenant": tenant,
        "key": f"keys/{tenant}.key",
        "policy": "policy.toml",
        "endpoint_url": settings.endpoint_url,
        "region": settings.region,
    }
    # A JSON string is a TOML basic string.
    return "".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines.items() if value
    )
