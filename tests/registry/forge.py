"""Makes every object of a registry by hand and always the same: good ones, and ones no honest writer would make.

Keys follow from their names and all signatures are deterministic (Ed25519, and ECDSA after RFC 6979), so what is made
here can be kept in files. The keys are worth nothing: anybody can make them.
"""

import datetime as dt
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from loraplex_registry.format import layout
from loraplex_registry.format.canonical import b64encode, canonical
from loraplex_registry.format.manifest import Manifest
from loraplex_registry.format.record import CommittedRecord, Encryption, StoredFile
from loraplex_registry.format.tags import TagStatement, make_tag
from loraplex_registry.lifecycle.content import Content
from loraplex_registry.refs import AdapterRef, Version
from loraplex_registry.signing import PublicKey, Signer, sign_files
from loraplex_registry.signing.attestations import make_attestation
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.trust.revocations import Revocation, RevocationList, make_revocations
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import MANIFEST_NAME, validate_adapter
from tests.registry import builders

CREATED = "2026-06-01T12:00:00Z"
NOW = dt.datetime(2026, 6, 1, 12, 0, 0, tzinfo=dt.UTC)
Objects = dict[str, bytes]


class _Seeded:
    """Signs with a key made from a name."""

    def __init__(self, name: str, algorithm: str) -> None:
        seed = hashlib.sha256(f"loraplex test key {name}".encode()).digest()
        self.private: Any
        if algorithm == "ed25519":
            self.private = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        else:
            self.private = ec.derive_private_key(int.from_bytes(seed[:31]), ec.SECP256R1())

    def sign(self, message: bytes) -> bytes:
        if isinstance(self.private, ed25519.Ed25519PrivateKey):
            return self.private.sign(message)
        scheme = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        return bytes(self.private.sign(message, scheme))


def signer(name: str) -> Signer:
    """The key of this name; `p256-…` is ECDSA P-256, every other one Ed25519."""
    algorithm = "ecdsa-p256" if name.startswith("p256") else "ed25519"
    seeded = _Seeded(name, algorithm)
    public = seeded.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return Signer(
        seeded.sign, PublicKey(hashlib.sha256(public).hexdigest(), algorithm, public.decode("ascii"))
    )


class Forge:
    """Makes objects. The adapters are acme/orders and whatever else is asked for, of one tiny base model."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.base: BaseModel = builders.load_base(place / "tiny-base")
        self._contents: dict[int, Content] = {}

    def content(self, seed: int = 0) -> Content:
        """An adapter's files; another seed gives other weights."""
        if seed not in self._contents:
            directory = builders.make_adapter(self.place / f"adapter-{seed}", rank=2, seed=seed)
            facts = validate_adapter(directory, self.base)
            self._contents[seed] = Content(directory, facts, self.base, self.base.to_json())
        return self._contents[seed]

    def manifest(
        self,
        version: Version = 1,
        *,
        name: str = "acme/orders",
        seed: int = 0,
        created: str = CREATED,
        **changes: Any,
    ) -> Manifest:
        """A manifest; `changes` replace fields."""
        made = self.content(seed).manifest(AdapterRef.parse(name), version, created)
        return replace(made, **changes)

    def body(self, name: str, seed: int = 0) -> bytes:
        """A file's bytes."""
        content = self.content(seed)
        return content.card if name == "base_model.json" else (content.directory / name).read_bytes()

    def record(
        self,
        version: Version = 1,
        *,
        key: str = "ci",
        name: str = "acme/orders",
        seed: int = 0,
        manifest: Manifest | None = None,
        signed: dict[str, str] | None = None,
        attest: tuple[dict[str, Any], ...] = (),
        encryption: Encryption | None = None,
        **changes: Any,
    ) -> CommittedRecord:
        """A committed record; `signed` replaces the list of signed files."""
        manifest = manifest or self.manifest(version, name=name, seed=seed, **changes)
        body = manifest.to_bytes()
        pid = hashlib.sha256(body + str(seed).encode()).hexdigest()[:32]
        files = {file.name: file.sha256 for file in manifest.files}
        files[MANIFEST_NAME] = hashlib.sha256(body).hexdigest()
        bundle = sign_files(files if signed is None else signed, signer(key), subject=f"{name}@{version}")
        stored, blobs = [], 0
        for file in manifest.files:
            if file.name.endswith(".json"):
                stored.append(
                    StoredFile(file.name, file.size, file.sha256, inline=self.body(file.name, seed))
                )
            else:
                blob = layout.blob_name(version, pid, blobs)
                stored.append(StoredFile(file.name, file.size, file.sha256, blob=blob))
                blobs += 1
        return CommittedRecord(pid, body, bundle, tuple(stored), attest, encryption)

    def objects(
        self,
        record: CommittedRecord,
        *,
        under: str = "acme/orders",
        version: Version | None = None,
        seed: int = 0,
    ) -> Objects:
        """A record and its blobs as stored; `under` and `version` say where, whatever was signed."""
        ref = AdapterRef.parse(under)
        version = record.manifest_unverified().version if version is None else version
        found = {layout.version_key(ref, version): record.to_bytes()}
        for file in record.files:
            if file.blob is not None:
                found[layout.adapter_prefix(ref) + file.blob] = self.body(file.name, seed)
        return found

    def attestation(
        self,
        record: CommittedRecord,
        *,
        key: str = "builder",
        kind: str,
        builder: str = "https://ci.example/1",
    ) -> dict[str, Any]:
        """A provenance statement about a record."""
        manifest = record.manifest_unverified()
        predicate = {
            "buildDefinition": {"buildType": "https://loraplex.example/train/1", "externalParameters": {}},
            "runDetails": {"builder": {"id": builder}},
        }
        ref = AdapterRef(manifest.tenant, manifest.adapter)
        return make_attestation(ref, manifest.version, record.digest, kind, predicate, signer(key))


def statement(
    record: CommittedRecord | None,
    generation: int = 1,
    *,
    name: str = "acme/orders@prod",
    prev: str | None = None,
    issued: str = CREATED,
    expires: str = "",
    **changes: Any,
) -> TagStatement:
    """A tag statement about a record, None for a removed tag."""
    ref = AdapterRef.parse(name)
    assert ref.tag is not None
    manifest = None if record is None else record.manifest_unverified()
    made = TagStatement(
        tenant=ref.tenant,
        adapter=ref.adapter,
        tag=ref.tag,
        generation=generation,
        version=None if manifest is None else manifest.version,
        manifest_sha256="" if record is None else record.digest.removeprefix("sha256:"),
        prev=("" if generation == 1 else "0" * 64) if prev is None else prev,
        issued=issued,
        expires=expires,
    )
    return replace(made, **changes)


def tag(
    record: CommittedRecord | None,
    generation: int = 1,
    *,
    keys: tuple[str, ...] = ("ci",),
    name: str = "acme/orders@prod",
    under: str | None = None,
    carries: CommittedRecord | None = None,
    **changes: Any,
) -> Objects:
    """A tag as stored; `under` says where, `carries` which record it embeds, whatever was signed."""
    made = make_tag(
        statement(record, generation, name=name, **changes), carries or record, *(signer(key) for key in keys)
    )
    ref = AdapterRef.parse(under or name)
    assert ref.tag is not None
    return {layout.tag_key(ref, ref.tag): made.to_bytes()}


def revocations(
    *entries: Revocation,
    serial: int = 1,
    tenant: str = "acme",
    under: str | None = None,
    keys: tuple[str, ...] = ("security",),
    issued: str = CREATED,
    expires: str = "",
) -> Objects:
    """A revocation list as stored."""
    listed = tuple(sorted(entries, key=lambda entry: entry.subject))
    made = RevocationList(tenant, serial, "" if serial == 1 else "0" * 64, issued, expires, listed)
    return {layout.revocations_key(under or tenant): make_revocations(made, *map(signer, keys)).to_bytes()}


def policy_text(
    *lines: str, keys: tuple[str, ...] = ("ci",), scope: str = "acme/**", head: bool = True
) -> str:
    """A policy of one rule; `lines` follow its scope and keys. Keys are in `keys/<name>.pub` beside it."""
    rule = [
        "[[rules]]",
        f'scope = "{scope}"',
        f"keys = {key_list(*keys)}",
        'algorithms = ["ed25519"]',
        *lines,
        "",
    ]
    return "\n".join((["version = 1", 'default = "deny"', ""] if head else []) + rule)


def key_list(*names: str) -> str:
    """A TOML list of keys; `name from X to Y` gives dates."""
    entries = []
    for name in names:
        key, *words = name.split()
        dates = "".join(f", {word} = {date}" for word, date in zip(words[::2], words[1::2], strict=True))
        entries.append(f'{{ path = "keys/{key}.pub"{dates} }}')
    return f"[{', '.join(entries)}]"


def write_keys(directory: Path, *names: str) -> None:
    """Write public keys where `policy_text` looks for them."""
    (directory / "keys").mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / "keys" / f"{name}.pub").write_text(signer(name).public_key.pem)


def store_of(objects: Objects) -> MemoryStore:
    """A store that holds these objects, and nothing else but the format marker."""
    store = MemoryStore()
    store.prepare()
    for key, body in {"registry.json": canonical({"fmt": 1}), **objects}.items():
        store.create(key, body)
    return store


def edited(body: bytes, change: Any) -> bytes:
    """A canonical JSON object after `change(value)`."""
    import json

    value = json.loads(body)
    change(value)
    return canonical(value)


def repacked(
    envelope: dict[str, Any], payload: bytes, *keys: str, payload_type: str | None = None
) -> dict[str, Any]:
    """An envelope with another payload: signed by `keys`, or with the old signatures when none is named."""
    from loraplex_registry.signing import sign_envelope

    kind = payload_type or envelope["payloadType"]
    if keys:
        return sign_envelope(payload, kind, *map(signer, keys))
    return {**envelope, "payload": b64encode(payload), "payloadType": kind}
