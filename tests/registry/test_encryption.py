"""What client-side encryption promises: sizes, bounded reading, refusals, and no secret in any text."""

import dataclasses
import io
import json
import os
import pickle
import random
import secrets
import sys
import traceback
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_registry.encryption.data_keys import DataKey, RingSealer, new_data_key, open_data_key
from loraplex_registry.encryption.key_providers import KeyContext, KeyRing
from loraplex_registry.encryption.keysets import KeysetError, Kind, new_keyset, primitive
from loraplex_registry.encryption.segments import HEADER_BYTES, SEGMENT_BYTES, TAG_BYTES, ciphertext_size
from loraplex_registry.errors import (
    DigestMismatchError,
    PolicyRefusedError,
    SettingsError,
    StoreUnavailableError,
)
from loraplex_registry.refs import AdapterRef
from loraplex_registry.storage.store import Piece
from tests.registry.blobs import reader_of
from tests.registry.sealed_versions import CONTEXT, campaign, entry, make_ring, make_version
from tests.registry.sealed_versions import mutants as make_mutants

MIB = 1 << 20
FIRST = SEGMENT_BYTES - HEADER_BYTES - TAG_BYTES
"""Plaintext bytes of the first segment when it is full."""


class MemoryKey:
    """A provider for tests: keeps data keys in a table."""

    uri = "raw:test"

    def __init__(self) -> None:
        self.keys: dict[bytes, tuple[bytes, KeyContext]] = {}

    def wrap(self, dek: bytes, context: KeyContext) -> bytes:
        wrapped = secrets.token_bytes(16)
        self.keys[wrapped] = (dek, context)
        return wrapped

    def unwrap(self, wrapped: bytes, context: KeyContext) -> bytes:
        dek, bound = self.keys[wrapped]
        if bound != context:
            raise DigestMismatchError("another context")
        return dek


@pytest.fixture(scope="module")
def key() -> DataKey:
    """One data key."""
    return new_data_key(MemoryKey(), CONTEXT)


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    """Keys of acme and globex."""
    return make_ring(tmp_path / "keks", "acme", "globex")


@given(st.one_of(st.integers(0, 4096), st.integers(-40, 40).map(lambda near: FIRST + near)))
@settings(max_examples=60, deadline=None)
def test_ciphertext_has_exactly_the_size_foretold_and_decrypts_to_the_plaintext(
    key: DataKey, size: int
) -> None:
    body = os.urandom(size)
    ciphertext = key.inline(entry("f", body), body)
    assert len(ciphertext) == ciphertext_size(size)
    assert key.opened(ciphertext, entry("f", body)) == body


@pytest.mark.parametrize("segments", [2, 3, 9])
@pytest.mark.parametrize("near", [-1, 0, 1])
def test_size_formula_holds_where_a_segment_begins(key: DataKey, segments: int, near: int) -> None:
    size = FIRST + (segments - 1) * (SEGMENT_BYTES - TAG_BYTES) + near
    body = bytes(size)
    ciphertext = key.inline(entry("f", body), body)
    assert len(ciphertext) == ciphertext_size(size)
    assert b"".join(map(bytes, key.decrypting(reader_of(ciphertext), entry("f", body))(0, size))) == body


@given(size=st.integers(0, 1 << 40), more=st.integers(1, 1 << 30))
def test_ciphertext_size_is_strictly_monotone(size: int, more: int) -> None:
    assert ciphertext_size(size) + more <= ciphertext_size(size + more)


@given(data=st.data(), piece_bytes=st.integers(1000, 3 * MIB))
@settings(max_examples=25, deadline=None)
def test_any_range_is_the_plaintext_there_however_the_ciphertext_is_cut(
    key: DataKey, data: st.DataObject, piece_bytes: int
) -> None:
    size = data.draw(st.sampled_from([7, FIRST, FIRST + 1, 3 * MIB, FIRST + SEGMENT_BYTES - TAG_BYTES]))
    body = random.Random(size).randbytes(size)
    ciphertext = key.inline(entry("f", body), body)
    read = key.decrypting(reader_of(ciphertext, piece_bytes=piece_bytes), entry("f", body))
    for _ in range(4):
        start = data.draw(st.integers(0, size) | st.sampled_from([0, min(FIRST, size), size - 1]))
        length = data.draw(st.integers(0, size - start))
        found = [bytes(piece) for piece in read(start, length)]
        assert b"".join(found) == body[start : start + length]
        assert max(map(len, found), default=0) < SEGMENT_BYTES


def test_ranges_are_read_by_many_threads_at_once_and_the_header_once(key: DataKey) -> None:
    body = random.Random(1).randbytes(9 * MIB)
    ciphertext = key.inline(entry("f", body), body)
    asked: list[tuple[int, int]] = []

    def counted(start: int, length: int) -> Iterator[Piece]:
        asked.append((start, length))
        return reader_of(ciphertext)(start, length)

    read = key.decrypting(counted, entry("f", body))

    def part(index: int) -> bytes:
        return b"".join(map(bytes, read(index * MIB, MIB)))

    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(part, range(1, 9))) == body[MIB:]
    assert asked.count((0, HEADER_BYTES)) == 1
    assert len(asked) == 9


@pytest.mark.parametrize("length", [-1, 1])
def test_a_ciphertext_of_another_length_is_refused(key: DataKey, length: int) -> None:
    body = b"a" * 1000
    ciphertext = key.inline(entry("f", body), body)
    other = ciphertext + b"x" if length > 0 else ciphertext[:-1]
    with pytest.raises(DigestMismatchError):
        key.opened(other, entry("f", body))


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, 1001), (1001, 0), (5, -1)])
def test_a_range_outside_the_file_is_refused(key: DataKey, start: int, length: int) -> None:
    body = b"a" * 1000
    ciphertext = key.inline(entry("f", body), body)
    with pytest.raises(DigestMismatchError):
        list(key.decrypting(reader_of(ciphertext), entry("f", body))(start, length))


def test_a_file_on_disk_goes_through_a_private_temporary_file_that_vanishes(
    key: DataKey, tmp_path: Path
) -> None:
    body = os.urandom(3 * MIB)
    source = tmp_path / "adapter_model.safetensors"
    source.write_bytes(body)
    file = entry(source.name, body)
    with key.blob(file, source) as (path, uploaded):
        ciphertext = path.read_bytes()
        assert path.parent.stat().st_mode & 0o077 == 0
        assert uploaded == entry(file.name, ciphertext)
        assert body[:64] not in ciphertext
    assert not path.parent.exists()
    assert b"".join(map(bytes, key.decrypting(reader_of(ciphertext), file)(0, file.size))) == body


def test_a_file_that_changed_before_it_was_encrypted_is_refused(key: DataKey, tmp_path: Path) -> None:
    source = tmp_path / "adapter_model.safetensors"
    source.write_bytes(b"x" * 5000)
    with (
        pytest.raises(DigestMismatchError, match="changed while it was published"),
        key.blob(entry(source.name, b"y" * 5000), source),
    ):
        pass


def test_no_more_is_read_than_the_ciphertext_can_have(key: DataKey) -> None:
    body = b"a" * 1000
    ciphertext = key.inline(entry("f", body), body)
    read = 0

    def endless(start: int, length: int) -> Iterator[bytes]:
        nonlocal read
        yield ciphertext
        while True:
            read += 65536
            yield bytes(65536)

    with pytest.raises(DigestMismatchError):
        list(key.decrypting(endless, entry("f", body))(0, 1000))
    assert read <= 65536


def test_memory_does_not_grow_with_the_file(key: DataKey) -> None:
    body = bytes(48 * MIB)
    file = entry("f", body)
    ciphertext = key.inline(file, body)
    del body
    tracemalloc.start()
    try:
        assert (
            sum(len(piece) for piece in key.decrypting(reader_of(ciphertext), file)(0, file.size))
            == file.size
        )
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_an_error_of_the_download_is_passed_on_unchanged(key: DataKey) -> None:
    body = bytes(3 * MIB)
    ciphertext = key.inline(entry("f", body), body)
    error = StoreUnavailableError("broke off")

    def broken(start: int, length: int) -> Iterator[bytes]:
        yield ciphertext[: 2 * MIB]
        raise error

    with pytest.raises(StoreUnavailableError) as caught:
        list(key.decrypting(broken, entry("f", body))(0, len(body)))
    assert caught.value is error


def test_the_download_is_closed_when_the_reader_stops_early(key: DataKey) -> None:
    body = bytes(4 * MIB)
    ciphertext = key.inline(entry("f", body), body)
    closed = []

    def download(start: int, length: int) -> Iterator[bytes]:
        try:
            for start in range(0, len(ciphertext), 65536):
                yield ciphertext[start : start + 65536]
        finally:
            closed.append(True)

    plaintext = key.decrypting(download, entry("f", body))(0, len(body))
    next(plaintext)
    plaintext.close()  # type: ignore[attr-defined]
    assert closed


def test_mutants_of_ciphertext_key_and_context_are_refused(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    found = campaign(tmp_path, count=200, seed=seed)
    assert found.total == 200
    assert not found.accepted
    assert not found.wrong_errors
    assert len(found.refused) == 15


def test_the_campaign_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that binds files to nothing but their key accepts exchanges; the campaign must say so."""
    monkeypatch.setattr(KeyContext, "of_file", lambda self, file: b"")
    found = campaign(tmp_path, count=60, seed=1)
    assert any(mutant.startswith("exchange_files") for mutant in found.accepted)


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "globex"},
        {"adapter": "order"},
        {"version": 4},
        {"version": "3.0.0"},
        {"pid": "f" * 32},
    ],
    ids=lambda change: next(iter(change.items())).__repr__(),
)
def test_a_key_opens_for_its_own_version_only(ring: KeyRing, change: dict[str, object]) -> None:
    version = make_version(ring, {"a": b"x", "b": b"y"})
    assert version.envelope is not None
    open_data_key(ring, version.envelope, CONTEXT)
    with pytest.raises((DigestMismatchError, PolicyRefusedError)):
        open_data_key(ring, version.envelope, dataclasses.replace(CONTEXT, **change))


def test_every_push_has_a_key_and_a_salt_of_its_own(ring: KeyRing) -> None:
    bodies = {"a": b"same bytes", "b": b"same bytes"}
    one, two = make_version(ring, bodies), make_version(ring, bodies)
    assert one.envelope != two.envelope
    headers = {stored[:HEADER_BYTES] for version in (one, two) for stored in version.stored.values()}
    assert len(headers) == 4


def test_headers_never_repeat_under_one_key(key: DataKey) -> None:
    assert distinct_headers(key, 2000) == 2000


def distinct_headers(key: DataKey, count: int) -> int:
    """Encrypt one small file so often; return how many different headers (salt and nonce prefix) were seen."""
    body = b"x"
    file = entry("f", body)
    return len({key.inline(file, body)[:HEADER_BYTES] for _ in range(count)})


def test_a_push_without_a_configured_key_is_refused() -> None:
    with pytest.raises(SettingsError, match="encryption_key"):
        RingSealer(KeyRing()).begin(AdapterRef("acme", "orders"), 3, "0" * 32)
    assert not KeyRing()


def test_an_unknown_algorithm_is_refused_before_any_key_is_asked(ring: KeyRing) -> None:
    version = make_version(ring, {"a": b"x", "b": b"y"})
    assert version.envelope is not None
    with pytest.raises(PolicyRefusedError, match="not accepted"):
        open_data_key(
            KeyRing(), dataclasses.replace(version.envelope, alg="tink-AES256_GCM_HKDF_4KB"), CONTEXT
        )


def test_only_one_key_of_the_one_kind_is_a_data_key() -> None:
    good = new_keyset(Kind.STREAMING)
    primitive(good, Kind.STREAMING)
    for other in (
        new_keyset(Kind.WRAPPING),
        b"",
        b"\0",
        good[:-1],
        good + b"\0",
        good + good,
        os.urandom(131),
    ):
        with pytest.raises(KeysetError):
            primitive(other, Kind.STREAMING)


def test_keysets_with_other_parameters_are_refused() -> None:
    import tink
    from tink import proto_keyset_format, secret_key_access, streaming_aead

    streaming_aead.register()
    templates = streaming_aead.streaming_aead_key_templates
    for template in (
        templates.AES128_GCM_HKDF_1MB,
        templates.AES256_GCM_HKDF_4KB,
        templates.AES256_CTR_HMAC_SHA256_1MB,
    ):
        keyset = proto_keyset_format.serialize(tink.new_keyset_handle(template), secret_key_access.TOKEN)
        with pytest.raises(KeysetError):
            primitive(keyset, Kind.STREAMING)


def test_no_text_of_a_key_shows_a_secret(ring: KeyRing, tmp_path: Path) -> None:
    canary: list[bytes] = []

    class Spy(MemoryKey):
        def wrap(self, dek: bytes, context: KeyContext) -> bytes:
            canary.append(dek)
            return super().wrap(dek, context)

    key = new_data_key(Spy(), CONTEXT)
    secret = canary[0]
    shown = "".join([repr(key), str(key), repr(key.encryption), repr(ring), repr(ring.wrapping("acme"))])
    for form in (secret.hex(), repr(secret)[2:20], secret[-32:].hex()):
        assert form not in shown
    with pytest.raises(TypeError):
        pickle.dumps(key)
    versions = [make_version(ring, {"a": b"x", "b": b"y" * 2000}), make_version(ring, {"a": b"x", "b": b"z"})]
    keyset = json.loads((tmp_path / "keks" / "acme.kek").read_text())["keyset"]
    texts = []
    for _, mutant in make_mutants(versions, 60, 5):
        with pytest.raises((DigestMismatchError, PolicyRefusedError)) as caught:
            mutant.read(ring)
        texts.append("".join(traceback.format_exception(caught.value)))
    assert keyset not in "".join(texts)


def test_importing_the_module_loads_no_library() -> None:
    import subprocess

    code = (
        "import sys; import loraplex_registry.encryption, loraplex_registry.encryption.rewrap; "
        "print([m for m in ('tink', 'google.protobuf', 'botocore', 'hvac', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_tink_reads_what_we_write() -> None:
    """The stored form is Tink's own: its library alone decrypts it, given key and associated data."""
    import tink
    from tink import proto_keyset_format, secret_key_access, streaming_aead

    provider = MemoryKey()
    key = new_data_key(provider, CONTEXT)
    body = b"hello"
    file = entry("f", body)
    ciphertext = key.inline(file, body)
    (keyset, _), *_ = provider.keys.values()
    handle: tink.KeysetHandle = proto_keyset_format.parse(keyset, secret_key_access.TOKEN)
    stream = handle.primitive(streaming_aead.StreamingAead).new_decrypting_stream(
        io.BytesIO(ciphertext), CONTEXT.of_file(file)
    )
    assert stream.read() == body
    assert CONTEXT.of_file(file) == (
        b'{"adapter":"orders","fmt":1,"name":"f","pid":"00000000000000000000000000000001",'
        b'"sha256":"' + file.sha256.encode() + b'","size":5,"tenant":"acme","version":3}'
    )
