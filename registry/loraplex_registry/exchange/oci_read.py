"""Reading an OCI image layout, judged as hostile: what `oci.export_layout` wrote, or somebody who claims to have.

Nothing outside the directory is opened and no link in it is followed; sizes are checked before a byte is read, digests
while the bytes are copied; the number of documents and of layers is bounded. Nothing that is read is trusted for it:
`pulled.verify_directory` decides about that.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import DigestMismatchError, UnsupportedAdapterError
from ..format.canonical import StrictJsonError, parse
from ..format.manifest import FILES_MAX, MANIFEST_BYTES_MAX
from ..format.record import ATTESTATIONS_BYTES_MAX, RECORD_BYTES_MAX, check_attestations
from ..validation.base import CARD_BYTES_MAX, CARD_NAME
from ..validation.lora_config import CONFIG_BYTES_MAX, CONFIG_NAME
from ..validation.weights import (
    BUNDLE_NAME,
    MANIFEST_NAME,
    TEXT_BYTES_MAX,
    WEIGHTS_NAME,
    Limits,
    check_file_name,
)
from .oci import (
    ARTIFACT_TYPE,
    ATTESTATIONS_NAME,
    FILEPATH,
    INDEX_TYPE,
    LAYER_TYPES,
    MANIFEST_TYPE,
    REF_NAME,
    Descriptor,
)

DOCUMENT_BYTES_MAX: Final = 1 << 20
"""Longest index or manifest that is read, in bytes (1 MiB)."""

DOCUMENTS_MAX: Final = 16
"""Most indexes and manifests that are read from one layout."""

DESCRIPTORS_MAX: Final = 64
"""Most entries of one index."""

LAYERS_MAX: Final = FILES_MAX + 3
"""Most layers of a manifest: the files, our manifest, the bundle and the attestations."""

_COPY_BYTES: Final = 1 << 20
_HEX64 = re.compile(r"[0-9a-f]{64}")
_SIZE_MAX = 1 << 50


def is_layout(directory: Path) -> bool:
    """Say whether a directory looks like an OCI image layout."""
    return (directory / "oci-layout").is_file()


def read_layout(
    directory: Path, target: Path, *, select: str | None = None, limits: Limits | None = None
) -> tuple[dict[str, Any], ...]:
    """Copy the files of an exported version out of an OCI image layout; nothing about them is trusted yet.

    Args:
        directory: the layout.
        target: an existing private directory; gets the files, our manifest and the bundle, as `pull` writes them.
        select: `org.opencontainers.image.ref.name` of the manifest wanted, when the layout holds several.
        limits: default `Limits()`.

    Returns:
        The attached statements.

    Raises:
        UnsupportedAdapterError: not such a layout, or beyond the limits.
        DigestMismatchError: a blob has another digest or size than its descriptor says.
    """
    with contextlib.ExitStack() as stack:
        layout = _Layout(stack, directory)
        manifest = layout.manifest(select)
        layers = _named_layers(manifest, limits or Limits())
        for name, layer in layers.items():
            layout.copy(layer, target / name)
    path = target / ATTESTATIONS_NAME
    if ATTESTATIONS_NAME not in layers:
        return ()
    body = path.read_bytes()
    path.unlink()
    try:
        return check_attestations(parse(body, limit_bytes=ATTESTATIONS_BYTES_MAX))
    except StrictJsonError as error:
        raise _refused(f"its {ATTESTATIONS_NAME} cannot be read ({error})") from error


class _Layout:
    """An image layout that is read through directory descriptors, so that no link leads out of it."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path) -> None:
        self._stack = stack
        self._documents = 0
        self._root = self._open_directory(str(directory), None)
        marker = self._json(self._root, "oci-layout")
        if not isinstance(marker, dict) or marker.get("imageLayoutVersion") != "1.0.0":
            raise _refused("its oci-layout is not of version 1.0.0")
        blobs = self._open_directory("blobs", self._root)
        self._blobs = self._open_directory("sha256", blobs)

    def manifest(self, select: str | None) -> dict[str, Any]:
        """Return the one ModelPack manifest of the layout, or the one called `select`."""
        found: list[tuple[str, Descriptor]] = []
        self._collect(self._json(self._root, "index.json"), found, seen=set())
        wanted = [entry for name, entry in found if select in (None, name)]
        if len({entry.sha256 for entry in wanted}) != 1:
            names = ", ".join(sorted({name for name, _ in found if name}))[:200]
            raise _refused(
                f"it holds {len(wanted)} model manifests{f' called {select[:64]!r}' if select else ''}; give --select "
                f"with one of: {names or 'none has a name'}"
            )
        manifest = self._document(wanted[0])
        if not isinstance(manifest, dict) or manifest.get("artifactType") != ARTIFACT_TYPE:
            raise _refused(f"its manifest is not of artifact type {ARTIFACT_TYPE}")
        return manifest

    def _collect(self, index: object, found: list[tuple[str, Descriptor]], seen: set[str]) -> None:
        """Gather the manifests of an index and of the indexes in it; each is read once, DOCUMENTS_MAX at most."""
        entries = index.get("manifests") if isinstance(index, dict) else None
        if not isinstance(entries, list) or len(entries) > DESCRIPTORS_MAX:
            raise _refused("an index has no list of manifests of acceptable length")
        for entry in entries:
            descriptor = _descriptor(entry)
            if descriptor.sha256 in seen:
                continue
            if descriptor.media_type == INDEX_TYPE:
                seen.add(descriptor.sha256)
                self._collect(self._document(descriptor), found, seen)
            elif (
                descriptor.media_type == MANIFEST_TYPE
                and entry.get("artifactType", ARTIFACT_TYPE) == ARTIFACT_TYPE
            ):
                found.append((dict(descriptor.annotations).get(REF_NAME, ""), descriptor))

    def copy(self, descriptor: Descriptor, target: Path) -> None:
        """Copy a blob out of the layout; it is complete and right when this returns."""
        with target.open("xb") as sink:
            for chunk in self._read(descriptor):
                sink.write(chunk)

    def _document(self, descriptor: Descriptor) -> object:
        self._documents += 1
        if self._documents > DOCUMENTS_MAX or descriptor.size > DOCUMENT_BYTES_MAX:
            raise _refused(
                f"it has more than {DOCUMENTS_MAX} documents, or one of more than {DOCUMENT_BYTES_MAX} bytes"
            )
        return _parsed(b"".join(self._read(descriptor)), descriptor.digest)

    def _json(self, place: int, name: str) -> object:
        with self._open(name, place) as file:
            return _parsed(file.read(DOCUMENT_BYTES_MAX + 1), name)

    def _read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """Yield a blob's bytes; the end is reached only when size and digest are right."""
        digest, size = hashlib.sha256(), 0
        with self._open(descriptor.sha256, self._blobs) as file:
            while chunk := file.read(min(_COPY_BYTES, descriptor.size - size + 1)):
                size += len(chunk)
                if size > descriptor.size:
                    break
                digest.update(chunk)
                yield chunk
        if (size, digest.hexdigest()) != (descriptor.size, descriptor.sha256):
            raise DigestMismatchError(
                f"Blob {descriptor.digest[:19]}… of the layout is not what its descriptor says; export it again."
            )

    def _open(self, name: str, place: int) -> Any:
        try:
            found = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=place)
        except OSError as error:
            raise _refused(f"{name[:80]} is missing or a link ({error.strerror})") from error
        if not stat.S_ISREG(os.fstat(found).st_mode):
            os.close(found)
            raise _refused(f"{name[:80]} is not a regular file")
        return os.fdopen(found, "rb")

    def _open_directory(self, name: str, place: int | None) -> int:
        follow = 0 if place is None else os.O_NOFOLLOW  # where the layout is, is the caller's own word
        try:
            found = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | follow, dir_fd=place)
        except OSError as error:
            raise _refused(f"{name[:80]} is missing or a link ({error.strerror})") from error
        self._stack.callback(os.close, found)
        return found


def _parsed(body: bytes, what: str) -> object:
    try:
        return parse(body, limit_bytes=DOCUMENT_BYTES_MAX)
    except StrictJsonError as error:
        raise _refused(f"{what[:80]} cannot be read ({error})") from error


def _descriptor(value: object) -> Descriptor:
    """Read a descriptor; unknown members are allowed, as the specification demands."""
    if not isinstance(value, dict):
        raise _refused("a descriptor is not an object")
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    annotations = value.get("annotations", {})
    if not isinstance(media_type, str) or not isinstance(annotations, dict):
        raise _refused("a descriptor has no media type, or annotations that are no object")
    algorithm, _, sha256 = digest.partition(":") if isinstance(digest, str) else ("", "", "")
    if algorithm != "sha256" or not _HEX64.fullmatch(sha256):
        raise _refused("a descriptor has no digest sha256: and 64 lower-case hex digits")
    if type(size) is not int or not 0 <= size < _SIZE_MAX:
        raise _refused("a descriptor has no size")
    if not all(isinstance(text, str) for text in annotations.values()):
        raise _refused("a descriptor has an annotation that is no text")
    return Descriptor(media_type, sha256, size, tuple(annotations.items()))


def _named_layers(manifest: dict[str, Any], limits: Limits) -> dict[str, Descriptor]:
    """Return file name -> layer, checked for name, size and number before anything is copied."""
    entries = manifest.get("layers")
    if not isinstance(entries, list) or len(entries) > LAYERS_MAX:
        raise _refused(f"its manifest has no list of at most {LAYERS_MAX} layers")
    layers: dict[str, Descriptor] = {}
    for entry in entries:
        layer = _descriptor(entry)
        name = dict(layer.annotations).get(FILEPATH, "")
        if layer.media_type not in LAYER_TYPES:
            raise _refused(f"a layer has the media type {layer.media_type[:80]!a}; only raw layers are read")
        if name != ATTESTATIONS_NAME:
            check_file_name(name)
        if name in layers:
            raise _refused(f"{name} is there twice")
        if layer.size > _size_max(name, limits):
            raise _refused(f"{name} has {layer.size} bytes, the limit is {_size_max(name, limits)}")
        layers[name] = layer
    for name in (MANIFEST_NAME, BUNDLE_NAME):
        if name not in layers:
            raise _refused(
                f"it carries no {name}, so nothing signed is in it; import its files as a directory with --base"
            )
    return layers


def _size_max(name: str, limits: Limits) -> int:
    known = {
        WEIGHTS_NAME: limits.max_bytes,
        CARD_NAME: CARD_BYTES_MAX,
        CONFIG_NAME: CONFIG_BYTES_MAX,
        MANIFEST_NAME: MANIFEST_BYTES_MAX,
        BUNDLE_NAME: RECORD_BYTES_MAX,
        ATTESTATIONS_NAME: ATTESTATIONS_BYTES_MAX,
    }
    return known.get(name, TEXT_BYTES_MAX)


def _refused(why: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(f"The OCI layout is refused: {why}.")
