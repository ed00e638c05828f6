"""The manifest's canonical form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.errors import SignatureInvalidError
from loraplex_registry.format.manifest import CHUNK_BYTES, BaseEntry, FileEntry, LoraEntry, Manifest
from tests.registry.test_refs import digests, names, versions

texts = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20)
sizes = st.integers(1, 2**40)
hexes = digests.map(lambda digest: digest[7:])


@st.composite
def entries(draw: st.DrawFn) -> FileEntry:
    """A file of one to five chunks."""
    size = draw(st.integers(1, 5 * CHUNK_BYTES))
    count = -(-size // CHUNK_BYTES)
    chunks = () if count == 1 else tuple(draw(st.lists(hexes, min_size=count, max_size=count)))
    name = draw(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,10}", fullmatch=True))
    return FileEntry(name, size, draw(hexes), chunks)


files = st.lists(
    entries(),
    min_size=1,
    max_size=5,
    unique_by=lambda file: file.name,
).map(lambda found: tuple(sorted(found, key=lambda file: file.name)))
manifests = st.builds(
    Manifest,
    tenant=names,
    adapter=names,
    version=versions,
    created=st.datetimes().map(lambda when: f"{when:%Y}".zfill(4) + f"{when:-%m-%dT%H:%M:%SZ}"),
    base_model=st.builds(BaseEntry, texts, digests, sizes, sizes, st.integers(0, 10**6)),
    lora=st.builds(
        LoraEntry,
        rank=sizes,
        r=sizes,
        alpha=st.floats(1e-3, 1e4),
        rslora=st.booleans(),
        dtype=texts,
        target_modules=st.lists(texts, max_size=4).map(tuple),
        n_tensors=sizes,
        n_params=sizes,
    ),
    files=files,
    annotations=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9._/-]{0,10}", fullmatch=True), texts, max_size=3
    ).map(lambda found: tuple(sorted(found.items()))),
)


@given(manifests)
def test_a_manifest_reads_back_as_itself_from_its_canonical_bytes(manifest: Manifest) -> None:
    body = manifest.to_bytes()
    again = Manifest.from_bytes(body)
    assert again == manifest
    assert again.to_bytes() == body
    assert again.digest == manifest.digest


@given(manifests, st.data())
def test_no_changed_byte_reads_as_the_same_manifest(manifest: Manifest, data: st.DataObject) -> None:
    body = bytearray(manifest.to_bytes())
    position = data.draw(st.integers(0, len(body) - 1))
    body[position] ^= data.draw(st.integers(1, 255))
    try:
        changed = Manifest.from_bytes(bytes(body))
    except SignatureInvalidError:
        return
    assert changed != manifest
    assert changed.digest != manifest.digest


MANIFEST = Manifest(
    tenant="acme",
    adapter="orders",
    version=3,
    created="2026-06-01T12:00:00Z",
    base_model=BaseEntry("tiny", "sha256:" + "0" * 64, 40, 16, 128),
    lora=LoraEntry(4, 4, 8.0, False, "F32", ("q_proj",), 8, 448),
    files=(
        FileEntry("adapter_config.json", 10, "1" * 64),
        FileEntry("adapter_model.safetensors", 20, "2" * 64),
    ),
)


def test_the_digest_of_a_known_manifest_never_changes() -> None:
    # Whoever changes this number changes the identity of every version ever published.
    assert MANIFEST.digest == "sha256:49327c4b86e379d83660cb3050e31a21d21c5e0dd8b77bae6614b1e5f730dc3c"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "loraplex.adapter/2"},
        {"tenant": "../x"},
        {"version": 0},
        {"version": "3"},
        {"version": True},
        {"created": "yesterday"},
        {"version": "1.0"},
        {"extra": 1},
        {"annotations": {"Licence": "x"}},
        {"annotations": {"licence": ""}},
        {"annotations": {"licence": "a\nb"}},
        {"annotations": {f"a{n}": "x" for n in range(33)}},
        {"annotations": []},
        {"files": []},
        {"files": [{"name": "x", "size": 1, "sha256": "0" * 64, "chunks": ["0" * 64]}]},
        {"files": [{"name": "x", "size": 1 + CHUNK_BYTES, "sha256": "0" * 64}]},
        {"files": [{"name": "x", "size": 1 + CHUNK_BYTES, "sha256": "0" * 64, "chunks": ["0" * 64]}]},
        {"files": [{"name": "x", "size": 1 + CHUNK_BYTES, "sha256": "0" * 64, "chunks": ["0" * 64, "x"]}]},
        {"files": [{"name": "../x", "size": 1, "sha256": "0" * 64}]},
        {"files": [{"name": "x", "size": 1, "sha256": "0" * 63}]},
        {
            "files": [
                {"name": "b", "size": 1, "sha256": "0" * 64},
                {"name": "a", "size": 1, "sha256": "0" * 64},
            ]
        },
    ],
)
def test_a_manifest_out_of_shape_is_refused(change: dict[str, object]) -> None:
    value = {**json.loads(MANIFEST.to_bytes()), **change}
    with pytest.raises(SignatureInvalidError):
        Manifest.from_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
