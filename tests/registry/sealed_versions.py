"""Encrypted versions made by hand, without publishing, and mutants of them."""

import dataclasses
import hashlib
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_registry.encryption.data_keys import (
    ALGORITHM,
    DataKey,
    new_data_key,
    open_data_key,
)
from loraplex_registry.encryption.kek_file import generate_encryption_key
from loraplex_registry.encryption.key_providers import KeyContext, KeyRing
from loraplex_registry.errors import DigestMismatchError, PolicyRefusedError
from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.format.record import Encryption
from tests.registry.blobs import reader_of

CONTEXT = KeyContext("acme", "orders", 3, "0" * 31 + "1")
REFUSED = (DigestMismatchError, PolicyRefusedError)
"""How a tampered version is refused: these two, whose codes are DIGEST_MISMATCH and POLICY_REFUSED."""


def entry(name: str, body: bytes) -> FileEntry:
    """Describe a file."""
    return FileEntry(name, len(body), hashlib.sha256(body).hexdigest())


def make_ring(directory: Path, *tenants: str) -> KeyRing:
    """Make a key file for each tenant and return a ring that serves them all."""
    for tenant in tenants:
        generate_encryption_key(directory / f"{tenant}.kek", tenant)
    return KeyRing([f"file:{directory}/{{tenant}}.kek"])


@dataclass(frozen=True)
class SealedVersion:
    """What the store holds of a version, and the signed facts a reader knows."""

    context: KeyContext
    envelope: Encryption | None
    files: dict[str, FileEntry]
    stored: dict[str, bytes] = field(repr=False)

    def read(self, ring: KeyRing) -> dict[str, bytes]:
        """Read every file: demand encryption and decrypt.

        The digests are not compared, as every real reader does on top: encryption must refuse by itself.
        """
        if self.envelope is None:
            raise PolicyRefusedError(f"{self.context} is not encrypted.")
        key = open_data_key(ring, self.envelope, self.context)
        bodies = {}
        for name, file in self.files.items():
            bodies[name] = key.opened(self.stored[name], file)
            read, half = key.decrypting(reader_of(self.stored[name]), file), file.size // 2
            tail = b"".join(map(bytes, read(half, file.size - half)))
            assert b"".join(map(bytes, read(0, half))) + tail == bodies[name]
        return bodies


def make_version(ring: KeyRing, bodies: dict[str, bytes], context: KeyContext = CONTEXT) -> SealedVersion:
    """Encrypt files as a push does: small ones inline, others through a temporary file."""
    key = new_data_key(ring.wrapping(context.tenant), context)
    files = {name: entry(name, body) for name, body in bodies.items()}
    stored = {name: _stored(key, body, files[name]) for name, body in bodies.items()}
    return SealedVersion(context, key.encryption, files, stored)


def _stored(key: DataKey, body: bytes, file: FileEntry) -> bytes:
    if len(body) < 1000:
        return key.inline(file, body)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / file.name
        source.write_bytes(body)
        with key.blob(file, source) as (path, uploaded):
            ciphertext = path.read_bytes()
            assert uploaded == entry(file.name, ciphertext)
    return ciphertext


def mutants(versions: list[SealedVersion], count: int, seed: int) -> Iterator[tuple[str, SealedVersion]]:
    """Yield named mutants of versions: of one tenant and another, several versions and pushes of one adapter."""
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random, list[SealedVersion]], SealedVersion | None]] = [
        _flip_ciphertext,
        _cut_ciphertext,
        _extend_ciphertext,
        _reorder_segments,
        _exchange_files,
        _exchange_between_versions,
        _flip_wrapped,
        _cut_wrapped,
        _exchange_wrapped,
        _exchange_envelope,
        _strip_envelope,
        _other_algorithm,
        _other_kek,
        _other_context,
        _other_file_facts,
    ]
    made, turn = 0, 0
    while made < count:
        kind = kinds[turn % len(kinds)]
        turn += 1
        mutant = kind(rng, versions)
        if mutant is None or mutant in versions:
            continue
        made += 1
        yield kind.__name__.lstrip("_"), mutant


def _pick(rng: random.Random, versions: list[SealedVersion]) -> tuple[SealedVersion, str]:
    version = rng.choice(versions)
    return version, rng.choice(sorted(version.stored))


def _with_file(version: SealedVersion, name: str, ciphertext: bytes) -> SealedVersion:
    return dataclasses.replace(version, stored={**version.stored, name: ciphertext})


def _with_envelope(version: SealedVersion, **changes: object) -> SealedVersion:
    assert version.envelope is not None
    return dataclasses.replace(version, envelope=dataclasses.replace(version.envelope, **changes))


def _flipped(rng: random.Random, body: bytes) -> bytes:
    place = rng.randrange(len(body) * 8)
    changed = bytearray(body)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def _flip_ciphertext(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version, name = _pick(rng, versions)
    return _with_file(version, name, _flipped(rng, version.stored[name]))


def _cut_ciphertext(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version, name = _pick(rng, versions)
    body = version.stored[name]
    whole = [length for length in (0, 1, 40, 1 << 20, 2 << 20, len(body) - 1) if length < len(body)]
    return _with_file(version, name, body[: rng.choice([*whole, rng.randrange(len(body))])])


def _extend_ciphertext(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version, name = _pick(rng, versions)
    body = version.stored[name]
    return _with_file(version, name, body + rng.choice([b"\0", body, rng.randbytes(16), body[-100:]]))


def _reorder_segments(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion | None:
    version, name = _pick(rng, versions)
    body = version.stored[name]
    segments = [body[start : start + (1 << 20)] for start in range(0, len(body), 1 << 20)]
    if len(segments) < 2:
        return None
    one, two = rng.sample(range(len(segments)), 2)
    if rng.random() < 0.5:
        segments[one], segments[two] = segments[two], segments[one]
    else:
        segments[one] = segments[two]
    return _with_file(version, name, b"".join(segments))


def _exchange_files(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version, name = _pick(rng, versions)
    other = rng.choice([other for other in version.stored if other != name])
    return dataclasses.replace(
        version,
        stored={**version.stored, name: version.stored[other], other: version.stored[name]},
    )


def _exchange_between_versions(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion | None:
    version, name = _pick(rng, versions)
    return _with_file(version, name, rng.choice(versions).stored[name])


def _flip_wrapped(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version, _ = _pick(rng, versions)
    assert version.envelope is not None
    return _with_envelope(version, wrapped=_flipped(rng, version.envelope.wrapped))


def _cut_wrapped(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version, _ = _pick(rng, versions)
    assert version.envelope is not None
    wrapped = version.envelope.wrapped
    return _with_envelope(version, wrapped=wrapped[: rng.randrange(1, len(wrapped))])


def _exchange_wrapped(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version, other = rng.sample(versions, 2)
    assert other.envelope is not None
    return _with_envelope(version, wrapped=other.envelope.wrapped)


def _exchange_envelope(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version, other = rng.sample(versions, 2)
    both = rng.random() < 0.5  # key and ciphertext of another version, under this version's name
    return dataclasses.replace(
        version, envelope=other.envelope, stored=other.stored if both else version.stored
    )


def _strip_envelope(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    return dataclasses.replace(rng.choice(versions), envelope=None)


def _other_algorithm(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    names = [
        "",
        "none",
        "tink-AES128_GCM_HKDF_1MB",
        ALGORITHM.lower(),
        ALGORITHM + " ",
        "tink-AES256_CTR_HMAC",
    ]
    return _with_envelope(rng.choice(versions), alg=rng.choice(names))


def _other_kek(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version, other = rng.sample(versions, 2)
    assert version.envelope is not None
    assert other.envelope is not None
    names = [
        "file:/etc/passwd",
        "raw:" + "0" * 32,
        "raw:../globex",
        "awskms:arn:aws:kms:x:0:key/0",
        "",
        "file:",
    ]
    if other.envelope.kek != version.envelope.kek:
        names.append(other.envelope.kek)
    return _with_envelope(version, kek=rng.choice(names))


def _other_context(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    version = rng.choice(versions)
    changes: list[dict[str, object]] = [
        {"tenant": "globex" if version.context.tenant == "acme" else "acme"},
        {"adapter": "other"},
        {"adapter": version.context.adapter + "s"},
        {"version": 4},
        {"version": f"{version.context.version}.0.0"},
        {"pid": f"{rng.getrandbits(128):032x}"},
    ]
    return dataclasses.replace(version, context=dataclasses.replace(version.context, **rng.choice(changes)))


def _other_file_facts(rng: random.Random, versions: list[SealedVersion]) -> SealedVersion:
    """Another manifest over the same ciphertext, as a publisher with a valid key could sign one."""
    version, name = _pick(rng, versions)
    file = version.files[name]
    changed = rng.choice(
        [
            dataclasses.replace(file, size=file.size + rng.choice([1, 16, 1 << 20])),
            dataclasses.replace(file, size=max(file.size - rng.choice([1, 16, 1 << 20]), 0)),
            dataclasses.replace(file, sha256=hashlib.sha256(rng.randbytes(8)).hexdigest()),
            dataclasses.replace(file, name=file.name + "x"),
        ]
    )
    return dataclasses.replace(version, files={**version.files, name: changed})


@dataclass(frozen=True)
class Campaign:
    """What a campaign of mutants found: refused ones by kind, and those accepted or refused in a wrong way."""

    refused: dict[str, int]
    accepted: list[str]
    wrong_errors: list[str]

    @property
    def total(self) -> int:
        """Mutants tried."""
        return sum(self.refused.values()) + len(self.accepted) + len(self.wrong_errors)


def campaign(directory: Path, *, count: int, seed: int) -> Campaign:
    """Try mutants of encrypted versions; a right reader refuses every one with a declared error."""
    ring = make_ring(directory, "acme", "globex")
    rng = random.Random(seed)
    contexts = [
        CONTEXT,
        dataclasses.replace(CONTEXT, pid="0" * 31 + "2"),
        dataclasses.replace(CONTEXT, version=5, pid="0" * 31 + "3"),
        dataclasses.replace(CONTEXT, version="3.0.0", pid="0" * 31 + "4"),
        dataclasses.replace(CONTEXT, adapter="other", pid="0" * 31 + "5"),
        dataclasses.replace(CONTEXT, tenant="globex", pid="0" * 31 + "6"),
    ]
    bodies = {
        "README.md": b"[]",  # as long as the settings, so that only the associated data tells them apart
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": rng.randbytes(2 * (1 << 20) + 17),
    }
    versions = [make_version(ring, bodies, context) for context in contexts]
    for version in versions:
        assert version.read(ring) == bodies
    found = Campaign({}, [], [])
    for number, (kind, mutant) in enumerate(mutants(versions, count, seed)):
        try:
            mutant.read(ring)
        except REFUSED:
            found.refused[kind] = found.refused.get(kind, 0) + 1
        except Exception as error:
            found.wrong_errors.append(f"{kind} #{number}: {type(error).__name__}")
        else:
            found.accepted.append(f"{kind} #{number}")
    return found
