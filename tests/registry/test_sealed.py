"""Sealed memory, and the way from a verified version to a path that an engine loads."""

import fcntl
import json
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from loraplex_registry.delivery import handoff as handoff_module
from loraplex_registry.delivery import sealed as sealed_module
from loraplex_registry.delivery.cache import Cache
from loraplex_registry.delivery.handoff import Handoff, hand_off
from loraplex_registry.delivery.sealed import SealedDirectory, SealedFile
from loraplex_registry.errors import (
    DigestMismatchError,
    RankTooLargeError,
    StoreUnavailableError,
    UnsupportedAdapterError,
)
from loraplex_registry.format.hashing import entry_of
from loraplex_registry.format.manifest import CHUNK_BYTES, FileEntry
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.signing import Signer
from loraplex_registry.trust.verdict import TrustPolicy, VerifiedManifest
from loraplex_registry.validation.base import BaseModel
from loraplex_registry.validation.weights import Limits
from tests.registry import builders
from tests.registry.cache_campaigns import swap_campaign
from tests.registry.hostile import Watch

REF = AdapterRef.parse("acme/orders")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def sealed_of(body: bytes) -> SealedFile:
    file = SealedFile("test")
    file.write(body)
    file.seal()
    return file


def entry(body: bytes) -> FileEntry:
    return entry_of(WEIGHTS, body)


@pytest.fixture
def verified(
    local_registry: Registry, adapter: Path, signer: Signer, base: BaseModel, policy: TrustPolicy
) -> VerifiedManifest:
    local_registry.initialise()
    local_registry.publish(adapter, REF, signer, base)
    return local_registry.verify(local_registry.resolve(REF), policy)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_sealed_bytes_cannot_be_changed_by_anybody() -> None:
    with sealed_of(b"verified") as file:
        for flags in (os.O_RDWR, os.O_WRONLY):
            descriptor = os.open(file.path, flags)
            with pytest.raises(PermissionError):
                os.pwrite(descriptor, b"evil", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, 2)
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, 100)
            with pytest.raises(PermissionError):
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            os.close(descriptor)
        descriptor = os.open(file.path, os.O_RDWR)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, 8)
        os.close(descriptor)
        with pytest.raises(OSError):
            os.write(file.descriptor, b"x")
        child = subprocess.run(
            [sys.executable, "-c", f"open({file.path!r}, 'r+b', buffering=0).write(b'evil')"],
            capture_output=True,
            check=False,
        )
        assert b"PermissionError" in child.stderr
        with file.open() as again:
            assert again.read() == b"verified"


def test_somebody_who_has_it_mapped_for_writing_prevents_the_seal() -> None:
    with SealedFile("test") as file:
        file.write(bytes(4096))
        other = os.open(file.path, os.O_RDWR)
        with mmap.mmap(other, 4096), pytest.raises(StoreUnavailableError, match="sealed"):
            file.seal()
        os.close(other)
        file.seal()


def test_what_was_written_behind_our_back_before_the_seal_is_found_by_the_check() -> None:
    body = b"verified" * 100
    with SealedFile("test") as file:
        file.write(body)
        other = os.open(file.path, os.O_RDWR)
        os.pwrite(other, b"evil", 3)
        os.close(other)
        file.seal()
        with pytest.raises(DigestMismatchError):
            file.check(entry(body))


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
def test_every_chunk_is_checked(size: int, tmp_path: Path) -> None:
    body = bytearray(random.Random(size).randbytes(size))
    path = tmp_path / "body"
    path.write_bytes(body)
    with SealedFile("test") as file, path.open("rb") as source:
        file.copy(source, size_bytes=size)
        file.seal()
        right = entry(bytes(body))
        file.check(right)
        for index in range(len(right.chunk_digests)):
            wrong = (*right.chunk_digests[:index], "0" * 64, *right.chunk_digests[index + 1 :])
            changed = replace(right, chunks=wrong) if right.chunks else replace(right, sha256=wrong[0])
            with pytest.raises(DigestMismatchError):
                file.check(changed)
        for other in (size - 1, size + 1):
            with pytest.raises(DigestMismatchError):
                file.check(replace(right, size=other))


def test_a_file_shorter_than_signed_is_refused_while_it_is_copied(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    with (
        SealedFile("test") as file,
        (tmp_path / "short").open("rb") as source,
        pytest.raises(DigestMismatchError),
    ):
        file.copy(source, size_bytes=4)


def test_running_out_of_descriptors_is_a_declared_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(sealed_module.os, "memfd_create", none_left)
    with pytest.raises(StoreUnavailableError, match="Too many open files"):
        SealedFile("test")


def _meddle(how: str, inner: Path) -> None:
    kept = inner.with_name("kept")
    if how == "replaced link":
        (inner / WEIGHTS).unlink()
        (inner / WEIGHTS).write_bytes(b"evil")
    elif how == "replaced link and back":
        target = os.readlink(inner / WEIGHTS)
        (inner / WEIGHTS).unlink()
        (inner / WEIGHTS).symlink_to(target)
    elif how == "added file":
        (inner / "adapter_model.bin").write_bytes(b"evil")
    elif how == "directory swapped and back":
        inner.rename(kept)
        inner.mkdir()
        inner.rmdir()
        kept.rename(inner)
    elif how == "times set back":
        before = inner.stat()
        (inner / "x").touch()
        (inner / "x").unlink()
        os.utime(inner, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif how == "gone":
        inner.rename(kept)


@pytest.mark.parametrize(
    "how",
    [
        "replaced link",
        "replaced link and back",
        "added file",
        "directory swapped and back",
        "times set back",
        "gone",
    ],
)
def test_any_change_to_the_links_is_found_afterwards(how: str, cache: Cache) -> None:
    with cache.workplace() as (place, descriptor), sealed_of(b"verified") as file:
        directory = SealedDirectory(place, descriptor, "sha256-x", {WEIGHTS: file})
        (place / "sha256-x").chmod(0o700)  # so that no later change needs a chmod, which would show by itself
        directory.watch()
        assert (directory.path / WEIGHTS).read_bytes() == b"verified"
        directory.confirm()
        _meddle(how, place / "sha256-x")
        with pytest.raises(DigestMismatchError, match="changed"):
            directory.confirm()


def test_moving_the_whole_cache_away_does_not_change_what_an_engine_reads(
    cache: Cache, tmp_path: Path
) -> None:
    with cache.workplace() as (place, descriptor), sealed_of(b"verified") as file:
        directory = SealedDirectory(place, descriptor, "sha256-x", {WEIGHTS: file})
        directory.watch()
        cache.root.rename(tmp_path / "away")
        (place / "sha256-x").mkdir(parents=True)
        (place / "sha256-x" / WEIGHTS).write_bytes(b"evil")
        assert (directory.path / WEIGHTS).read_bytes() == b"verified"
        directory.confirm()


@pytest.mark.parametrize("sealed", [True, False])
def test_an_engine_in_another_process_loads_exactly_the_signed_tensors(
    sealed: bool,
    local_registry: Registry,
    verified: VerifiedManifest,
    base: BaseModel,
    cache: Cache,
    adapter: Path,
) -> None:
    for _ in range(2):
        handoff = hand_off(local_registry, verified, cache, base=base, sealed=sealed)
        path = handoff.staged.path
        assert verified.digest.replace(":", "-") in str(path)
        assert sorted(os.listdir(path)) == [CONFIG, WEIGHTS]
        assert json.loads((path / CONFIG).read_bytes())["r"] == 4
        code = (
            "import sys, os.path\nfrom safetensors import safe_open\n"
            f"assert os.path.isfile({str(path / WEIGHTS)!r})\n"
            f"with safe_open({str(path / WEIGHTS)!r}, framework='np') as f:\n"
            "    print(sum(float(f.get_tensor(k).sum()) for k in sorted(f.keys())))"
        )
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
        tensors = builders.adapter_tensors()
        assert float(child.stdout) == sum(float(tensors[name].sum()) for name in sorted(tensors))
        handoff.confirm()
        assert [entry.leased for entry in cache.entries()] == [True]
        handoff.close()
        handoff.close()
        assert not path.exists() if sealed else path.exists()
        assert [entry.leased for entry in cache.entries()] == [False]


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("spoil", ["weights", "shorter", "config", "extra", "link", "missing"])
def test_a_wrong_copy_in_the_cache_is_fetched_anew(
    spoil: str,
    sealed: bool,
    local_registry: Registry,
    verified: VerifiedManifest,
    base: BaseModel,
    cache: Cache,
    adapter: Path,
    tmp_path: Path,
) -> None:
    hand_off(local_registry, verified, cache, base=base).close()
    entry = cache.root / verified.digest.replace(":", "-")
    entry.chmod(0o700)
    good = (entry / WEIGHTS).read_bytes()
    for name in (WEIGHTS, CONFIG):
        (entry / name).chmod(0o600)
    if spoil == "weights":
        (entry / WEIGHTS).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif spoil == "shorter":
        (entry / WEIGHTS).write_bytes(good[:-4])
    elif spoil == "config":
        (entry / CONFIG).write_bytes(
            (entry / CONFIG).read_bytes().replace(b'"lora_alpha": 8', b'"lora_alpha": 9')
        )
    elif spoil == "extra":
        (entry / "adapter_model.bin").write_bytes(b"\x80")
    elif spoil == "link":
        (tmp_path / "same").write_bytes(good)
        (entry / WEIGHTS).unlink()
        (entry / WEIGHTS).symlink_to(tmp_path / "same")
    else:
        (entry / WEIGHTS).unlink()
    handoff = hand_off(local_registry, verified, cache, base=base, sealed=sealed)
    assert (handoff.staged.path / WEIGHTS).read_bytes() == good
    assert json.loads((handoff.staged.path / CONFIG).read_bytes())["lora_alpha"] == 8
    handoff.confirm()
    handoff.close()
    assert sorted(path.name for path in entry.iterdir()) == [CONFIG, WEIGHTS]


def test_a_cached_copy_is_used_without_the_store(
    local_registry: Registry, verified: VerifiedManifest, base: BaseModel, cache: Cache, tmp_path: Path
) -> None:
    hand_off(local_registry, verified, cache, base=base).close()
    (tmp_path / "local").rename(tmp_path / "away")
    hand_off(local_registry, verified, cache, base=base).close()
    cache.prune(0)
    with pytest.raises(StoreUnavailableError):
        hand_off(local_registry, verified, cache, base=base)


def test_limits_of_this_server_count_for_what_another_one_cached(
    local_registry: Registry,
    signer: Signer,
    policy: TrustPolicy,
    base: BaseModel,
    cache: Cache,
    tmp_path: Path,
) -> None:
    local_registry.initialise()
    tensors = builders.adapter_tensors()
    name = "base_model.model.model.embed_tokens"
    tensors[f"{name}.lora_embedding_A"] = np.ones((4, builders.VOCAB), np.float32)
    tensors[f"{name}.lora_embedding_B"] = np.ones((builders.HIDDEN, 4), np.float32)
    config = builders.adapter_config(target_modules=["q_proj", "v_proj", "embed_tokens"])
    directory = builders.make_adapter(tmp_path / "embeddings", tensors=tensors, config=config)
    local_registry.publish(directory, REF, signer, base)
    verified = local_registry.verify(local_registry.resolve(REF), policy)
    hand_off(local_registry, verified, cache, base=base).close()
    for limits, error in (
        (Limits(embeddings=False), UnsupportedAdapterError),
        (Limits(max_rank=3), RankTooLargeError),
        (Limits(max_bytes=100), UnsupportedAdapterError),
    ):
        for sealed in (True, False):
            with pytest.raises(error):
                hand_off(local_registry, verified, cache, base=base, limits=limits, sealed=sealed)
    assert [entry.leased for entry in cache.entries()] == [False]


def test_a_file_rewritten_while_an_engine_reads_it_in_place_is_found(
    local_registry: Registry, verified: VerifiedManifest, base: BaseModel, cache: Cache
) -> None:
    changes: list[Callable[[Path], object]] = [
        lambda file: (file.chmod(0o600), file.write_bytes(file.read_bytes())),
        lambda file: (
            file.parent.chmod(0o700),
            file.rename(file.with_name("x")),
            file.with_name("x").rename(file),
        ),
        lambda file: file.parent.rename(file.parent.with_name(".tmp-x")),
    ]
    for change in changes:
        handoff = hand_off(local_registry, verified, cache, base=base, sealed=False)
        handoff.confirm()
        change(handoff.staged.path / WEIGHTS)
        with pytest.raises(DigestMismatchError, match="changed"):
            handoff.confirm()
        handoff.close()
        cache.prune(0)


def test_nothing_stays_open_or_lying_around(
    local_registry: Registry, verified: VerifiedManifest, base: BaseModel, cache: Cache
) -> None:
    hand_off(local_registry, verified, cache, base=base).close()
    before = len(os.listdir("/proc/self/fd"))
    for sealed in (True, False) * 5:
        hand_off(local_registry, verified, cache, base=base, sealed=sealed).close()
        with pytest.raises(RankTooLargeError):
            hand_off(local_registry, verified, cache, base=base, sealed=sealed, limits=Limits(max_rank=3))
    assert len(os.listdir("/proc/self/fd")) == before
    assert [path.name for path in cache.root.iterdir()] == [verified.digest.replace(":", "-")]


def test_the_plaintext_of_an_encrypted_version_never_touches_a_disk(
    local_registry: Registry,
    verified: VerifiedManifest,
    base: BaseModel,
    cache: Cache,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handoff_module._Job, "encrypted", True)
    watch = Watch.get()
    watch.broken.clear()
    for _ in range(2):
        with watch.only(tmp_path):
            handoff = hand_off(local_registry, verified, cache, base=base, sealed=False)
        opened = [event for event in watch.broken if WEIGHTS in event or CONFIG in event or "/fetch" in event]
        assert opened == []
        assert (handoff.staged.path / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
        handoff.confirm()
        assert cache.entries() == []
        handoff.close()
    assert list(cache.root.iterdir()) == []
    with watch.only(tmp_path):
        hand_off(local_registry, verified, cache, base=base, sealed=False).close()
    monkeypatch.setattr(handoff_module._Job, "encrypted", False)
    with watch.only(tmp_path):
        hand_off(local_registry, verified, cache, base=base, sealed=False).close()
    assert any(WEIGHTS in event for event in watch.broken), "the watch would not have seen a file"


def evil_twin(seed: int = 99) -> bytes:
    """Weights of the same shape and another meaning."""
    return save(builders.adapter_tensors(seed=seed))


def test_whatever_is_swapped_between_check_and_load_the_verified_bytes_are_served_or_an_error(
    local_registry: Registry, verified: VerifiedManifest, base: BaseModel, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    found = swap_campaign(
        local_registry, verified, base, tmp_path / "cache", evil=evil_twin(), rounds=60, seed=seed
    )
    print(dict(found))
    assert found["served wrong"] == 0
    assert found["served right"] > 0
    assert sum(found[key] for key in found if key.startswith("refused")) > 0, "nobody was attacked"


def test_the_type_says_what_a_handoff_is(
    local_registry: Registry, verified: VerifiedManifest, base: BaseModel, cache: Cache
) -> None:
    handoff = hand_off(local_registry, verified, cache, base=base)
    assert isinstance(handoff, Handoff)
    assert handoff.staged.rank == 4
    assert handoff.staged.size_bytes == sum(
        (handoff.staged.path / name).stat().st_size for name in (CONFIG, WEIGHTS)
    )
    handoff.close()
