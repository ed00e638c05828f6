"""The manifest: the one small file that says what a version *is*. Its digest is the version's identity.

Laws: `Manifest.from_bytes(m.to_bytes()) == m`; bytes that are not the canonical spelling of a manifest are refused, so
one manifest has exactly one digest. The manifest is one of the signed files, which binds tenant, adapter, version,
base model and rank to the weights; the signature format itself binds none of them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from ..errors import InvalidReferenceError, SignatureInvalidError
from ..refs import Version, check_digest, check_name, check_version
from .canonical import StrictJsonError, canonical, exact_object, parse_canonical

SCHEMA: Final = "loraplex.adapter/1"
MANIFEST_BYTES_MAX: Final = 256 << 10
"""Longest manifest, in bytes (256 KiB)."""

FILES_MAX: Final = 16
"""Most files in a version."""

CHUNK_BYTES: Final = 8 << 20
"""Bytes of one chunk with a digest of its own (8 MiB): the unit in which a file is downloaded and verified."""

CHUNKS_MAX: Final = 2048
"""Most chunks of one file (16 GiB)."""

ANNOTATIONS_MAX: Final = 32
"""Most annotations of a version."""

_HEX64 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_ANNOTATION = re.compile(r"[a-z][a-z0-9._/-]{0,63}")
_ANNOTATION_LENGTH_MAX = 1024
_SIZE_MAX = 1 << 50
_TOP = frozenset(
    {"schema", "tenant", "adapter", "version", "created", "base_model", "lora", "files", "annotations"}
)
_BASE = frozenset({"name", "digest", "vocab_size", "hidden_size", "max_position"})
_LORA = frozenset({"rank", "r", "alpha", "rslora", "dtype", "target_modules", "n_tensors", "n_params"})
_FILE = frozenset({"name", "size", "sha256"})


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the version: name, size in bytes, lower-case hex SHA-256 of its bytes.

    `chunks` are the SHA-256 of its pieces of CHUNK_BYTES, the last one shorter; empty for a file of one piece, whose
    digest is the file's own. They let ranges be fetched and verified on their own, in any order and in parallel.
    """

    name: str
    size: int
    sha256: str
    chunks: tuple[str, ...] = ()

    @property
    def chunk_digests(self) -> tuple[str, ...]:
        """The digest of every piece, one at least."""
        return self.chunks or (self.sha256,)

    def to_value(self) -> dict[str, Any]:
        """Return the JSON form."""
        chunks = {"chunks": list(self.chunks)} if self.chunks else {}
        return {"name": self.name, "size": self.size, "sha256": self.sha256, **chunks}


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """The base model the version was made for; `digest` decides, the rest is for people and early refusals."""

    name: str
    digest: str
    vocab_size: int
    hidden_size: int
    max_position: int


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """The adapter's shape: `rank` is the largest of any module, `r` and `alpha` the defaults of the configuration."""

    rank: int
    r: int
    alpha: float
    rslora: bool
    dtype: str
    target_modules: tuple[str, ...]
    n_tensors: int
    n_params: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of one adapter of one tenant. `created` is UTC to the second, `2026-01-31T09:00:00Z`.

    `annotations` are names and texts of the publisher's own (licence, training run, parent), sorted by name; signed,
    and given no meaning here.
    """

    tenant: str
    adapter: str
    version: Version
    created: str
    base_model: BaseEntry
    lora: LoraEntry
    files: tuple[FileEntry, ...]
    annotations: tuple[tuple[str, str], ...] = ()

    def to_bytes(self) -> bytes:
        """Return the canonical bytes (RFC 8785) that are hashed and signed."""
        value = asdict(self)
        value["lora"]["target_modules"] = list(self.lora.target_modules)
        value["files"] = [file.to_value() for file in self.files]
        value["annotations"] = dict(self.annotations)
        return canonical({"schema": SCHEMA, **value})

    @property
    def digest(self) -> str:
        """`sha256:` and the hex SHA-256 of `to_bytes()`."""
        return digest_of(self.to_bytes())

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def file(self, name: str) -> FileEntry:
        """Return the entry of a file.

        Raises:
            KeyError: the manifest has no such file.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        raise KeyError(name)

    @classmethod
    def from_bytes(cls, body: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            SignatureInvalidError: not the canonical bytes of a manifest of this schema. A manifest is only ever read
                as a signed file, so an unreadable one means that nothing valid was signed.
        """
        try:
            value = exact_object(parse_canonical(body, limit_bytes=MANIFEST_BYTES_MAX), _TOP)
            if value["schema"] != SCHEMA:
                raise StrictJsonError("unknown schema")
            return cls._from_value(value)
        except (StrictJsonError, InvalidReferenceError) as error:
            raise SignatureInvalidError(
                f"adapter.manifest.json is not a manifest of schema {SCHEMA} ({error}); publish the adapter again."
            ) from error

    @classmethod
    def _from_value(cls, value: dict[str, Any]) -> Manifest:
        check_name("tenant", _text(value["tenant"]))
        check_name("adapter", _text(value["adapter"]))
        _check_version(value["version"])
        if not _CREATED.fullmatch(_text(value["created"])):
            raise StrictJsonError("created is not a UTC time")
        return cls(
            tenant=value["tenant"],
            adapter=value["adapter"],
            version=value["version"],
            created=value["created"],
            base_model=_base_entry(value["base_model"]),
            lora=_lora_entry(value["lora"]),
            files=_file_entries(value["files"]),
            annotations=check_annotations(value["annotations"]),
        )


def check_annotations(value: object) -> tuple[tuple[str, str], ...]:
    """Return checked annotations, sorted by name.

    Args:
        value: a dict of at most ANNOTATIONS_MAX names `[a-z][a-z0-9._/-]*` of at most 64 characters to printable
            texts of 1 to 1,024 characters.

    Raises:
        StrictJsonError: it is something else.
    """
    if not isinstance(value, dict) or len(value) > ANNOTATIONS_MAX:
        raise StrictJsonError("annotations are not an object of acceptable length")
    for name, text in value.items():
        if not isinstance(name, str) or not _ANNOTATION.fullmatch(name):
            raise StrictJsonError("an annotation has a name out of shape")
        if not isinstance(text, str) or not 0 < len(text) <= _ANNOTATION_LENGTH_MAX or not text.isprintable():
            raise StrictJsonError(f"annotation {name} is empty, too long or not printable")
    return tuple(sorted(value.items()))


def digest_of(body: bytes) -> str:
    """Return `sha256:` and the hex SHA-256 of `body`."""
    return "sha256:" + hashlib.sha256(body).hexdigest()


def _base_entry(value: object) -> BaseEntry:
    fields = exact_object(value, _BASE)
    check_digest(_text(fields["digest"]))
    sizes = {key: _whole(fields[key]) for key in ("vocab_size", "hidden_size", "max_position")}
    return BaseEntry(name=_text(fields["name"]), digest=fields["digest"], **sizes)


def _lora_entry(value: object) -> LoraEntry:
    fields = exact_object(value, _LORA)
    alpha, modules = fields["alpha"], fields["target_modules"]
    if type(alpha) not in (int, float) or type(fields["rslora"]) is not bool or not isinstance(modules, list):
        raise StrictJsonError("lora has a value of the wrong kind")
    return LoraEntry(
        rank=_whole(fields["rank"], least=1),
        r=_whole(fields["r"], least=1),
        alpha=float(alpha),
        rslora=fields["rslora"],
        dtype=_text(fields["dtype"]),
        target_modules=tuple(_text(module) for module in modules),
        n_tensors=_whole(fields["n_tensors"], least=1),
        n_params=_whole(fields["n_params"], least=1),
    )


def _file_entries(value: object) -> tuple[FileEntry, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= FILES_MAX:
        raise StrictJsonError("files is not a list of acceptable length")
    entries = tuple(_file_entry(item) for item in value)
    names = [entry.name for entry in entries]
    if names != sorted(set(names)):
        raise StrictJsonError("files are not sorted by name, each once")
    return entries


def _file_entry(value: object) -> FileEntry:
    fields = exact_object(value, _FILE, optional=frozenset({"chunks"}))
    name, sha256 = _text(fields["name"]), _text(fields["sha256"])
    if not _FILE_NAME.fullmatch(name) or not _HEX64.fullmatch(sha256):
        raise StrictJsonError("a file has a name or digest out of shape")
    size = _whole(fields["size"], least=1)
    return FileEntry(name, size, sha256, _chunks(fields, size))


def _chunks(fields: dict[str, Any], size: int) -> tuple[str, ...]:
    """A file of one chunk never lists it, a longer one always does: one file has one spelling."""
    count = -(-size // CHUNK_BYTES)
    if count == 1 and "chunks" not in fields:
        return ()
    chunks = fields.get("chunks")
    if count == 1 or not isinstance(chunks, list) or len(chunks) != count or count > CHUNKS_MAX:
        raise StrictJsonError("a file lists another number of chunks than its size has")
    if not all(isinstance(chunk, str) and _HEX64.fullmatch(chunk) for chunk in chunks):
        raise StrictJsonError("a chunk digest is out of shape")
    return tuple(chunks)


def _check_version(value: object) -> None:
    if type(value) is not int and not isinstance(value, str):
        raise StrictJsonError("version is neither a number nor a text")
    check_version(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
        raise StrictJsonError("a text is missing, too long or not printable")
    return value


def _whole(value: object, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value < _SIZE_MAX:
        raise StrictJsonError("a number is not whole or out of range")
    return value
