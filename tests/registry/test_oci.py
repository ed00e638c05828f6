"""OCI image layouts: written by the book, read with suspicion, and the same digest there and back."""

import hashlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_registry.delivery.pulled import verify_directory
from loraplex_registry.errors import DigestMismatchError, RegistryError, UnsupportedAdapterError
from loraplex_registry.exchange import oci
from loraplex_registry.exchange.oci import export_layout
from loraplex_registry.exchange.oci_read import is_layout, read_layout
from loraplex_registry.lifecycle.presigned import read_signed
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.storage.store import open_store
from loraplex_registry.trust.verdict import TrustPolicy
from loraplex_registry.validation.base import BaseModel
from tests.registry import builders
from tests.registry.conftest import NOW

REF = AdapterRef.parse("acme/orders@1.2.0-rc.1")


@pytest.fixture
def exported(
    local_registry: Registry,
    adapter: Path,
    signer: Signer,
    base: BaseModel,
    policy: TrustPolicy,
    tmp_path: Path,
) -> Path:
    """A version with a licence and a read-me, exported."""
    (adapter / "README.md").write_text("for orders")
    (adapter / "LICENSE").write_text("Apache-2.0")
    local_registry.publish(adapter, REF, signer, base, annotations={"licence": "apache-2.0"})
    verified = local_registry.verify(local_registry.resolve(REF), policy)
    export_layout(local_registry, verified, tmp_path / "layout")
    return tmp_path / "layout"


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs/sha256" / digest.removeprefix("sha256:")


def manifest_of(layout: Path) -> Any:
    return read_json(blob(layout, read_json(layout / "index.json")["manifests"][0]["digest"]))


def test_a_layout_follows_the_specifications_of_oci_and_modelpack(exported: Path) -> None:
    assert read_json(exported / "oci-layout") == {"imageLayoutVersion": "1.0.0"}
    index = read_json(exported / "index.json")
    assert (index["schemaVersion"], index["mediaType"]) == (2, "application/vnd.oci.image.index.v1+json")
    (entry,) = index["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "1.2.0-rc.1"}
    manifest = manifest_of(exported)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    names = {
        layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]
    }
    assert names == {
        "adapter_model.safetensors": "application/vnd.cncf.model.weight.v1.raw",
        "adapter_config.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "base_model.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "adapter.manifest.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "adapter.sig.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "README.md": "application/vnd.cncf.model.doc.v1.raw",
        "LICENSE": "application/vnd.cncf.model.doc.v1.raw",
    }
    config = read_json(blob(exported, manifest["config"]["digest"]))
    assert config["modelfs"] == {
        "type": "layers",
        "diffIds": [layer["digest"] for layer in manifest["layers"]],
    }
    assert config["descriptor"]["createdAt"] == "2026-06-01T12:00:00Z"
    assert set(config) == {"descriptor", "config", "modelfs"}


def test_every_blob_is_named_by_its_digest_and_referred_to(exported: Path) -> None:
    manifest = manifest_of(exported)
    descriptors = [*read_json(exported / "index.json")["manifests"], manifest["config"], *manifest["layers"]]
    sizes = {descriptor["digest"]: descriptor["size"] for descriptor in descriptors}
    found = {}
    for path in (exported / "blobs/sha256").iterdir():
        body = path.read_bytes()
        assert hashlib.sha256(body).hexdigest() == path.name
        found[f"sha256:{path.name}"] = len(body)
    assert found == sizes
    assert is_layout(exported)


def test_an_export_of_one_version_always_has_the_same_bytes(
    exported: Path, local_registry: Registry, policy: TrustPolicy, tmp_path: Path
) -> None:
    verified = local_registry.verify(local_registry.resolve(REF), policy)
    export_layout(local_registry, verified, tmp_path / "again")
    assert (tmp_path / "again/index.json").read_bytes() == (exported / "index.json").read_bytes()
    assert [path.name for path in tmp_path.glob(".tmp-*")] == []


def imported(layout: Path, place: Path, policy: TrustPolicy) -> tuple[Registry, str]:
    """Read a layout, verify it, and publish it elsewhere without a key."""
    files = place / "files"
    files.mkdir(parents=True)
    attest = read_layout(layout, files)
    pulled = verify_directory(files, policy, now=NOW, attest=attest)
    elsewhere = Registry(open_store((place / "elsewhere").as_uri()))
    elsewhere.initialise()
    done = elsewhere.publish(
        files,
        REF,
        [],
        pulled.base,
        annotations=dict(pulled.verified.manifest.annotations),
        attest=attest,
        signed=pulled.signed,
    )
    return elsewhere, done.digest


def test_export_and_import_elsewhere_give_the_same_digest_bundle_and_bytes(
    exported: Path, local_registry: Registry, policy: TrustPolicy, tmp_path: Path
) -> None:
    before = local_registry.resolve(REF)
    elsewhere, digest = imported(exported, tmp_path / "there", policy)
    after = elsewhere.resolve(REF)
    assert (digest, after.record.manifest_bytes) == (before.digest, before.record.manifest_bytes)
    assert after.record.bundle == before.record.bundle
    verified = elsewhere.verify(after, policy)
    export_layout(elsewhere, verified, tmp_path / "back")
    assert (tmp_path / "back/index.json").read_bytes() == (exported / "index.json").read_bytes()


@settings(max_examples=8, deadline=None)
@given(
    rank=st.integers(1, 8),
    seed=st.integers(0, 1000),
    version=st.sampled_from([1, 7, "0.1.0", "2.0.0-rc.1"]),
    notes=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True),
        st.from_regex(r"[ -~]{1,20}", fullmatch=True),
        max_size=3,
    ),
    readme=st.text("abc \nü", min_size=1, max_size=50) | st.none(),
)
def test_the_round_trip_keeps_every_version(
    rank: int,
    seed: int,
    version: int | str,
    notes: dict[str, str],
    readme: str | None,
    tmp_path_factory: pytest.TempPathFactory,
    keys: Path,
    base: BaseModel,
) -> None:
    place = tmp_path_factory.mktemp("trip")
    directory = builders.make_adapter(place / "orders", rank=rank, seed=seed)
    if readme is not None:
        (directory / "README.md").write_text(readme)
    policy, ref = builders.acme_policy(keys), AdapterRef("acme", "orders", version=version)
    here, there = (Registry(open_store((place / name).as_uri())) for name in ("here", "there"))
    here.initialise(), there.initialise()
    digest = here.publish(
        directory, ref, builders.load_signer(keys / "acme.key"), base, annotations=notes
    ).digest
    export_layout(here, here.verify(here.resolve(ref), policy), place / "layout")
    (place / "files").mkdir()
    attest = read_layout(place / "layout", place / "files")
    pulled = verify_directory(place / "files", policy, now=NOW, attest=attest)
    done = there.publish(
        place / "files", ref, [], pulled.base, annotations=notes, attest=attest, signed=pulled.signed
    )
    assert done.digest == digest
    assert there.resolve(ref).record.bundle == here.resolve(ref).record.bundle


# --- hostile layouts: each spoils a good one and is refused with a declared error


def rewrite_manifest(layout: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest, with all digests above it right again."""
    manifest = manifest_of(layout)
    change(manifest)
    put_manifest(layout, json.dumps(manifest).encode())


def put_manifest(layout: Path, body: bytes, media_type: str = oci.MANIFEST_TYPE) -> None:
    index = read_json(layout / "index.json")
    index["manifests"][0].update(put(layout, body, media_type))
    (layout / "index.json").write_text(json.dumps(index))


def put(layout: Path, body: bytes, media_type: str) -> dict[str, Any]:
    sha256 = hashlib.sha256(body).hexdigest()
    (layout / "blobs/sha256" / sha256).write_bytes(body)
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": len(body)}


def weights(manifest: Any) -> Any:
    return next(layer for layer in manifest["layers"] if "weight.v1" in layer["mediaType"])


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(bytes(body))


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace_by_link(path: Path, target: Path | str) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to(target)


def nested(layout: Path, depth: int) -> None:
    """An index in an index in an index."""
    entry = read_json(layout / "index.json")["manifests"][0]
    for _ in range(depth):
        entry = put(layout, json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(), oci.INDEX_TYPE)
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def cyclic(layout: Path) -> None:
    """An index whose entry claims to be itself: impossible with a right digest, so with a wrong one."""
    body = b'{"schemaVersion":2,"manifests":[]}'
    descriptor = {"mediaType": oci.INDEX_TYPE, "digest": "sha256:" + "0" * 64, "size": len(body)}
    (layout / "blobs/sha256" / ("0" * 64)).write_text(json.dumps({"manifests": [descriptor]}))
    descriptor["size"] = len(json.dumps({"manifests": [descriptor]}))
    (layout / "index.json").write_text(json.dumps({"manifests": [descriptor]}))


def set_layer(**values: Any) -> Callable[[Path], None]:
    return lambda layout: rewrite_manifest(layout, lambda manifest: weights(manifest).update(values))


def set_name(name: str) -> Callable[[Path], None]:
    return set_layer(annotations={oci.FILEPATH: name})


def weights_blob(layout: Path) -> Path:
    return blob(layout, weights(manifest_of(layout))["digest"])


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "another byte in the weights": lambda layout: flip(weights_blob(layout)),
    "a byte more": lambda layout: grow(weights_blob(layout)),
    "cut off": lambda layout: os.truncate(weights_blob(layout), 10),
    "no weights blob": lambda layout: weights_blob(layout).unlink(),
    "no manifest blob": lambda layout: blob(
        layout, read_json(layout / "index.json")["manifests"][0]["digest"]
    ).unlink(),
    "the weights are a link": lambda layout: replace_by_link(weights_blob(layout), "moved"),
    "a link out": lambda layout: replace_by_link(weights_blob(layout), "/etc/passwd"),
    "the blobs are a link": lambda layout: replace_by_link(layout / "blobs", "moved"),
    "sha256 is a link": lambda layout: replace_by_link(layout / "blobs/sha256", "moved"),
    "the index is a link": lambda layout: replace_by_link(layout / "index.json", "moved"),
    "the index is a directory": lambda layout: (
        (layout / "index.json").unlink(),
        (layout / "index.json").mkdir(),
    ),
    "the weights are a pipe": lambda layout: (path := weights_blob(layout), path.unlink(), os.mkfifo(path)),
    "no index": lambda layout: (layout / "index.json").unlink(),
    "no blobs": lambda layout: (layout / "blobs").rename(layout / "moved"),
    "another layout version": lambda layout: (layout / "oci-layout").write_text(
        '{"imageLayoutVersion":"2.0.0"}'
    ),
    "an index that is no JSON": lambda layout: (layout / "index.json").write_text("{"),
    "an index with a key twice": lambda layout: (layout / "index.json").write_text(
        '{"manifests":[],"manifests":[]}'
    ),
    "an index too long": lambda layout: (layout / "index.json").write_text(
        '{"manifests":[]}' + " " * (1 << 20)
    ),
    "an index too deep": lambda layout: (layout / "index.json").write_text("[" * 100_000),
    "an empty index": lambda layout: (layout / "index.json").write_text('{"manifests":[]}'),
    "an index of nonsense": lambda layout: (layout / "index.json").write_text('{"manifests":[1,null]}'),
    "too many manifests": lambda layout: (layout / "index.json").write_text(
        json.dumps({"manifests": read_json(layout / "index.json")["manifests"] * 65})
    ),
    "too many indexes": lambda layout: nested(layout, 17),
    "a cyclic index": cyclic,
    "another artifact type": lambda layout: rewrite_manifest(layout, lambda m: m.update(artifactType="x/y")),
    "no artifact type": lambda layout: rewrite_manifest(layout, lambda m: m.pop("artifactType")),
    "layers that are no list": lambda layout: rewrite_manifest(layout, lambda m: m.update(layers={})),
    "too many layers": lambda layout: rewrite_manifest(layout, lambda m: m.update(layers=m["layers"] * 4)),
    "a layer twice": lambda layout: rewrite_manifest(layout, lambda m: m["layers"].append(weights(m))),
    "a manifest too long": lambda layout: put_manifest(layout, b"{}" + b" " * (1 << 20)),
    "a name that climbs": set_name("../../adapter_model.safetensors"),
    "a name that is absolute": set_name("/etc/passwd"),
    "a name with a directory": set_name("sub/adapter_model.safetensors"),
    "no name": set_layer(annotations={}),
    "a name that is a number": set_layer(annotations={oci.FILEPATH: 3}),
    "a pickle": set_name("adapter_model.bin"),
    "code": set_name("setup.py"),
    "a tar layer": set_layer(mediaType="application/vnd.cncf.model.weight.v1.tar"),
    "a size that is a text": set_layer(size="12"),
    "a size below zero": set_layer(size=-1),
    "a size beyond the limit": set_layer(size=(2 << 30) + 1),
    "a size too small": set_layer(size=5),
    "another digest algorithm": set_layer(digest="sha512:" + "0" * 128),
    "a digest that climbs": set_layer(digest="sha256:../../../../etc/passwd"),
    "a digest in upper case": set_layer(digest="sha256:" + "A" * 64),
    "no digest": set_layer(digest=None),
    "annotations that are a list": set_layer(annotations=["x"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_layout_is_refused_with_a_declared_error(name: str, exported: Path, tmp_path: Path) -> None:
    HOSTILE[name](exported)
    (tmp_path / "files").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((UnsupportedAdapterError, DigestMismatchError)) as caught:
        read_layout(exported, tmp_path / "files")
    assert len(caught.value.message) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["adapter.manifest.json", "adapter.sig.json"])
def test_a_layout_without_signature_says_how_to_import_it(name: str, exported: Path, tmp_path: Path) -> None:
    rewrite_manifest(
        exported,
        lambda m: m.update(
            layers=[layer for layer in m["layers"] if layer["annotations"][oci.FILEPATH] != name]
        ),
    )
    (tmp_path / "files").mkdir()
    with pytest.raises(UnsupportedAdapterError, match="--base"):
        read_layout(exported, tmp_path / "files")


def test_a_layout_of_right_digests_and_other_bytes_fails_at_the_signature(
    exported: Path, policy: TrustPolicy, tmp_path: Path
) -> None:
    body = weights_blob(exported).read_bytes()
    other = bytearray(body)
    other[-1] ^= 1
    descriptor = put(exported, bytes(other), oci.WEIGHT_TYPE)
    rewrite_manifest(exported, lambda m: weights(m).update(descriptor))
    files = tmp_path / "files"
    files.mkdir()
    read_layout(exported, files)
    assert read_signed(files, files / "adapter.sig.json")
    with pytest.raises(RegistryError) as caught:
        verify_directory(files, policy, now=NOW)
    assert caught.value.code in {"SIGNATURE_INVALID", "DIGEST_MISMATCH"}


def test_of_several_manifests_one_is_chosen_by_name(exported: Path, tmp_path: Path) -> None:
    index = read_json(exported / "index.json")
    other = put(exported, json.dumps({**manifest_of(exported), "layers": []}).encode(), oci.MANIFEST_TYPE)
    index["manifests"].append({**other, "annotations": {oci.REF_NAME: "empty"}})
    (exported / "index.json").write_text(json.dumps(index))
    (tmp_path / "files").mkdir()
    with pytest.raises(UnsupportedAdapterError, match=r"1\.2\.0-rc\.1, empty"):
        read_layout(exported, tmp_path / "files")
    with pytest.raises(UnsupportedAdapterError, match="called 'none'"):
        read_layout(exported, tmp_path / "files", select="none")
    read_layout(exported, tmp_path / "files", select="1.2.0-rc.1")
    assert (tmp_path / "files/adapter_model.safetensors").is_file()


def test_an_index_of_indexes_within_bounds_is_read(exported: Path, tmp_path: Path) -> None:
    nested(exported, 5)
    (tmp_path / "files").mkdir()
    read_layout(exported, tmp_path / "files")
