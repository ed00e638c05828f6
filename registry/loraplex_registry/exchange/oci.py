"""A version as an OCI image layout with ModelPack media types, there and back without losing its signature.

```
DIR/oci-layout            {"imageLayoutVersion":"1.0.0"}
DIR/index.json            one manifest, of artifact type application/vnd.cncf.model.manifest.v1+json
DIR/blobs/sha256/<hex>    the manifest, its configuration, and one layer per file of the version
```

Every file is a raw layer with its name in `org.cncf.model.filepath`, so any tool for OCI artifacts can copy it to a
registry and any ModelPack tool can unpack it. Our manifest and signature bundle are layers like the others: what is
unpacked verifies with `model_signing verify key`, and an import (`oci_read`) publishes the very same digest again, with
no key. An export of one version always has the same bytes.

Sources: opencontainers/image-spec v1.1 (image-layout.md, index.md, manifest.md), modelpack/model-spec (docs/spec.md,
docs/config.md, docs/annotations.md).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ConflictError, StoreUnavailableError, what_to_do
from ..format.canonical import canonical
from ..format.manifest import FileEntry, Manifest
from ..registry import Registry
from ..trust.verdict import VerifiedManifest
from ..validation.base import Progress
from ..validation.weights import WEIGHTS_NAME

INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE: Final = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE: Final = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG_TYPE: Final = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_TYPE: Final = "application/vnd.cncf.model.doc.v1.raw"
LAYER_TYPES: Final = frozenset({WEIGHT_TYPE, WEIGHT_CONFIG_TYPE, DOC_TYPE})
FILEPATH: Final = "org.cncf.model.filepath"
REF_NAME: Final = "org.opencontainers.image.ref.name"
DIGEST: Final = "org.loraplex.adapter.digest"
"""Annotation with the version's own digest, for people; an import works it out again."""

ATTESTATIONS_NAME: Final = "adapter.attestations.json"
"""Name of the layer with the attached statements, a canonical JSON list."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a blob: media type, hex SHA-256, size in bytes, annotations."""

    media_type: str
    sha256: str
    size: int
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """`sha256:…`, as OCI writes it."""
        return f"sha256:{self.sha256}"

    def to_value(self) -> dict[str, Any]:
        """Return the JSON form."""
        annotations = {"annotations": dict(self.annotations)} if self.annotations else {}
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size, **annotations}


@dataclass(frozen=True, slots=True)
class ExportedLayout:
    """What `export_layout` wrote: the OCI manifest's digest, and the number and bytes of the layers."""

    oci_digest: str
    layers: int
    size_bytes: int


def export_layout(
    registry: Registry, verified: VerifiedManifest, directory: Path, *, progress: Progress | None = None
) -> ExportedLayout:
    """Write a verified version as an OCI image layout.

    Args:
        registry: where the version is.
        verified: the version.
        directory: must not exist, or be empty; it appears all at once.
        progress: as `Registry.pull`.

    Raises:
        ConflictError: the directory exists and is not empty.
        StoreUnavailableError: it cannot be written.
        Others: as `Registry.pull`.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConflictError(f"{directory} exists and is not an empty directory; name a new one.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=directory.parent) as temporary:
            place = Path(temporary)
            registry.pull(verified, place / "files", progress=progress)
            exported = _write_layout(place / "files", place / "layout", verified)
            os.rename(place / "layout", directory)
    except OSError as error:
        raise StoreUnavailableError(
            f"{directory} cannot be written ({error.strerror}); {what_to_do(error)}."
        ) from error
    return exported


def _write_layout(files: Path, place: Path, verified: VerifiedManifest) -> ExportedLayout:
    blobs = place / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    if verified.record.attest:
        (files / ATTESTATIONS_NAME).write_bytes(canonical(list(verified.record.attest)))
    layers = []
    for path in sorted(files.iterdir(), key=lambda path: (path.name != WEIGHTS_NAME, path.name)):
        layers.append(_layer(path, verified.manifest))
        os.rename(path, blobs / layers[-1].sha256)
    config = _put(blobs, CONFIG_TYPE, _config(verified.manifest, layers))
    manifest = _put(blobs, MANIFEST_TYPE, _oci_manifest(verified, config, layers))
    entry = {
        **manifest.to_value(),
        "artifactType": ARTIFACT_TYPE,
        "annotations": {REF_NAME: str(verified.manifest.version)},
    }
    (place / "index.json").write_bytes(
        canonical({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]})
    )
    (place / "oci-layout").write_bytes(canonical({"imageLayoutVersion": "1.0.0"}))
    return ExportedLayout(manifest.digest, len(layers), sum(layer.size for layer in layers))


def _layer(path: Path, manifest: Manifest) -> Descriptor:
    signed: dict[str, FileEntry] = {file.name: file for file in manifest.files}
    if path.name in signed:  # pulled and verified a moment ago
        sha256, size = signed[path.name].sha256, signed[path.name].size
    else:
        body = path.read_bytes()
        sha256, size = hashlib.sha256(body).hexdigest(), len(body)
    media_type = WEIGHT_TYPE if path.name == WEIGHTS_NAME else WEIGHT_CONFIG_TYPE
    if path.suffix in {".md", ".txt"} or path.name == "LICENSE":
        media_type = DOC_TYPE
    return Descriptor(media_type, sha256, size, ((FILEPATH, path.name),))


def _put(blobs: Path, media_type: str, value: dict[str, Any]) -> Descriptor:
    body = canonical(value)
    sha256 = hashlib.sha256(body).hexdigest()
    (blobs / sha256).write_bytes(body)
    return Descriptor(media_type, sha256, len(body))


def _config(manifest: Manifest, layers: list[Descriptor]) -> dict[str, Any]:
    """Return the model configuration (model-spec, docs/config.md); raw layers are their own diff ids."""
    precision = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}.get(manifest.lora.dtype, "mixed")
    return {
        "descriptor": {
            "createdAt": manifest.created,
            "vendor": manifest.tenant,
            "name": manifest.adapter,
            "version": str(manifest.version),
            "title": f"LoRA adapter of rank {manifest.lora.rank} for {manifest.base_model.name}",
        },
        "config": {
            "format": "safetensors",
            "paramSize": _param_size(manifest.lora.n_params),
            "precision": precision,
        },
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
    }


def _param_size(count: int) -> str:
    """Return a number of parameters as the specification writes it: `1.5k`, `21.0m`, `1.2b`."""
    size = count / 1000
    for unit in "kmb":
        if size < 1000:
            return f"{size:.1f}{unit}"
        size /= 1000
    return f"{size:.1f}t"


def _oci_manifest(verified: VerifiedManifest, config: Descriptor, layers: list[Descriptor]) -> dict[str, Any]:
    manifest = verified.manifest
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": config.to_value(),
        "layers": [layer.to_value() for layer in layers],
        "annotations": {
            "org.opencontainers.image.created": manifest.created,
            "org.opencontainers.image.title": f"{manifest.tenant}/{manifest.adapter}",
            "org.opencontainers.image.version": str(manifest.version),
            DIGEST: verified.digest,
        },
    }
