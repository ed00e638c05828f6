"""Fetching: from a verified manifest to an immutable directory that an engine may load.

The directory `<root>/sha256-<hex>/` holds exactly two files, both 0444 in a 0555 directory: `adapter_config.json`
written by us from the checked values, and `adapter_model.safetensors` with the signed bytes. It appears by one
rename after everything was checked, so no half of it is ever seen. A copy that is already there is hashed again
before it is used; one that differs is removed and fetched anew. That is why nothing is synced to disk: what a power
failure leaves behind does not pass that check.

Bytes are checked while they are downloaded and never read a second time: digests, header, shapes, NaN and infinity.

Many threads and processes may fetch into one root: the first rename wins, the others use its result.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..encryption.key_providers import KeyRing
from ..errors import (
    ConflictError,
    DigestMismatchError,
    RankTooLargeError,
    SettingsError,
    StoreUnavailableError,
    UnsupportedAdapterError,
    what_to_do,
)
from ..format.canonical import canonical
from ..format.manifest import Manifest
from ..storage.store import Store
from ..trust.verdict import VerifiedManifest
from ..validation.base import CARD_BYTES_MAX, CARD_NAME, BaseModel, Progress
from ..validation.lora_config import CONFIG_BYTES_MAX, CONFIG_NAME, AdapterConfig, read_config
from ..validation.safetensors_header import Header
from ..validation.scan import WeightsScan
from ..validation.weights import (
    BUNDLE_NAME,
    MANIFEST_NAME,
    TEXT_BYTES_MAX,
    WEIGHTS_NAME,
    Limits,
    check_file_name,
    check_head,
    open_regular,
    refuse_not_finite,
)
from .download import matches
from .stored_files import Meter, StoredFiles

_TEMPORARY: Final = ".tmp-"
_SMALL_BYTES_MAX: Final = {CONFIG_NAME: CONFIG_BYTES_MAX, CARD_NAME: CARD_BYTES_MAX}


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """An adapter ready to load.

    Attributes:
        digest: the version's identity.
        path: the immutable directory.
        manifest: the signed manifest.
        size_bytes: bytes of the two files.
        rank: largest rank of any module.
    """

    digest: str
    path: Path
    manifest: Manifest
    size_bytes: int
    rank: int


def stage(
    store: Store,
    verified: VerifiedManifest,
    root: Path,
    *,
    base: BaseModel,
    limits: Limits,
    keys: KeyRing | None = None,
    progress: Progress | None = None,
) -> StagedAdapter:
    """Make sure the immutable directory exists and is right; see `Registry.fetch`."""
    manifest = verified.manifest
    base.require(manifest.base_model.digest, what=str(verified.ref))
    _check_limits(manifest, limits)
    files = StoredFiles(store, verified, keys)
    config = read_config(files.body(CONFIG_NAME), rank_max=limits.max_rank)
    text = config.to_json()
    final = root / verified.digest.replace(":", "-")
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_right(final, verified, text):
        _discard_wrong(root, final, verified, text)
        with _temporary_directory(root) as temporary:
            meter = Meter(progress, total_bytes=manifest.file(WEIGHTS_NAME).size)
            _fetch_weights(files, temporary, config, base, limits, meter)
            _write(temporary / CONFIG_NAME, text)
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                (temporary / name).chmod(0o444)
            temporary.chmod(0o555)
            made = _rename_into(temporary, final)
        if not made and not _is_right(final, verified, text):
            raise DigestMismatchError(
                f"{final} is wrong although another fetch just made it; look who writes there."
            )
    size = manifest.file(WEIGHTS_NAME).size + len(text)
    return StagedAdapter(verified.digest, final, manifest, size, manifest.lora.rank)


def stage_into(
    store: Store,
    verified: VerifiedManifest,
    target: int,
    *,
    base: BaseModel,
    limits: Limits,
    keys: KeyRing | None = None,
    progress: Progress | None = None,
) -> AdapterConfig:
    """Fill an empty file that is open for writing with the weights alone; see `Registry.fetch_into`."""
    base.require(verified.manifest.base_model.digest, what=str(verified.ref))
    _check_limits(verified.manifest, limits)
    files = StoredFiles(store, verified, keys)
    config = read_config(files.body(CONFIG_NAME), rank_max=limits.max_rank)
    meter = Meter(progress, total_bytes=verified.manifest.file(WEIGHTS_NAME).size)
    _fill_with_weights(files, target, config, base, limits, meter)
    return config


def pull(
    store: Store,
    verified: VerifiedManifest,
    target: Path,
    *,
    limits: Limits,
    keys: KeyRing | None = None,
    progress: Progress | None = None,
) -> None:
    """Write all files of a version, its manifest and its bundle into a new directory; see `Registry.pull`."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConflictError(f"{target} exists and is not an empty directory; name a new one.")
    _check_limits(verified.manifest, limits)
    files = StoredFiles(store, verified, keys)
    base = _pulled_base(files, verified)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_directory(target.parent) as temporary:
        meter = Meter(progress, total_bytes=verified.manifest.size_bytes)
        for file in verified.manifest.files:
            if file.name != WEIGHTS_NAME:
                _write(temporary / file.name, files.body(file.name))
                meter.add(file.size)
        config = read_config((temporary / CONFIG_NAME).read_bytes(), rank_max=limits.max_rank)
        _fetch_weights(files, temporary, config, base, limits, meter)
        _write(temporary / MANIFEST_NAME, verified.record.manifest_bytes)
        _write(temporary / BUNDLE_NAME, canonical(verified.record.bundle))
        temporary.chmod(0o755)
        if not _rename_into(temporary, target):
            raise ConflictError(f"{target} was made by somebody else meanwhile; name a new one.")


def stored_bytes(
    store: Store, verified: VerifiedManifest, name: str, *, keys: KeyRing | None = None
) -> bytes:
    """Return the checked bytes of one small file of a version.

    Raises:
        DigestMismatchError: the store holds other bytes than were signed.
    """
    return StoredFiles(store, verified, keys).body(name)


def _check_limits(manifest: Manifest, limits: Limits) -> None:
    """Refuse by the signed names and figures before a byte of weights is asked for."""
    for file in manifest.files:
        check_file_name(file.name)
        limit = (
            limits.max_bytes if file.name == WEIGHTS_NAME else _SMALL_BYTES_MAX.get(file.name, TEXT_BYTES_MAX)
        )
        if file.size > limit:
            raise UnsupportedAdapterError(f"{file.name} has {file.size} bytes, the limit is {limit}.")
    if manifest.lora.rank > limits.max_rank:
        raise RankTooLargeError(
            f"The adapter has rank {manifest.lora.rank}, the limit is {limits.max_rank}; train it smaller."
        )


def _fetch_weights(
    files: StoredFiles, directory: Path, config: AdapterConfig, base: BaseModel, limits: Limits, meter: Meter
) -> None:
    """Download the weights into a new file of a directory."""
    descriptor = os.open(
        directory / WEIGHTS_NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
    )
    try:
        _fill_with_weights(files, descriptor, config, base, limits, meter)
    finally:
        os.close(descriptor)


def _fill_with_weights(
    files: StoredFiles, target: int, config: AdapterConfig, base: BaseModel, limits: Limits, meter: Meter
) -> None:
    """Download the weights into an open file, checking digests, header, shapes and numbers on the way."""
    manifest = files.verified.manifest
    ranks: list[int] = []

    def parse(head: bytes) -> Header:
        header, rank = check_head(head, manifest.file(WEIGHTS_NAME).size, config, base, limits)
        ranks.append(rank)
        return header

    scan = WeightsScan(parse, header_bytes_max=limits.max_header_bytes)
    files.into(WEIGHTS_NAME, target, look=scan, progress=meter.add)
    refuse_not_finite(scan.result(manifest.file(WEIGHTS_NAME).size))
    if ranks[0] != manifest.lora.rank:
        raise UnsupportedAdapterError(
            f"{files.verified.ref} has rank {ranks[0]}, its manifest says otherwise; publish it again."
        )


def _is_right(directory: Path, verified: VerifiedManifest, config: bytes) -> bool:
    """Say whether a staged directory holds exactly the two right files."""
    try:
        if sorted(os.listdir(directory)) != [CONFIG_NAME, WEIGHTS_NAME]:
            return False
        with open_regular(directory / CONFIG_NAME) as file:
            if file.read(len(config) + 1) != config:
                return False
        with open_regular(directory / WEIGHTS_NAME) as file:
            return matches(file.fileno(), verified.manifest.file(WEIGHTS_NAME))
    except (OSError, UnsupportedAdapterError):
        return False


def _pulled_base(files: StoredFiles, verified: VerifiedManifest) -> BaseModel:
    if CARD_NAME not in {file.name for file in verified.manifest.files}:
        raise SettingsError(f"{verified.ref} carries no {CARD_NAME}; publish it again with this release.")
    base = BaseModel.from_json(files.body(CARD_NAME))
    base.require(verified.manifest.base_model.digest, what=str(verified.ref))
    return base


def _write(path: Path, body: bytes) -> None:
    with path.open("xb") as file:
        file.write(body)


@contextlib.contextmanager
def _temporary_directory(root: Path) -> Iterator[Path]:
    """Yield a new directory in `root`, locked while in use and gone afterwards unless it was renamed away.

    The lock tells a living fetch from the left-over of a crash, which the next fetch sweeps.
    """
    _sweep(root)
    try:
        path, lock = _new_locked_directory(root)
    except OSError as error:
        raise StoreUnavailableError(
            f"{root} cannot be written ({error.strerror}); {what_to_do(error)}."
        ) from error
    try:
        yield path
    except OSError as error:
        raise StoreUnavailableError(
            f"{root} failed while an adapter was written ({error.strerror}); {what_to_do(error)}."
        ) from error
    finally:
        _remove(path)
        os.close(lock)


def _new_locked_directory(root: Path) -> tuple[Path, int]:
    for _ in range(8):
        path = root / f"{_TEMPORARY}{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():  # a sweeper may have seen it before the lock was held
                return path, lock
            os.close(lock)
    raise StoreUnavailableError(f"{root} cannot be written: its temporary directories vanish.")


def _sweep(root: Path) -> None:
    """Remove temporary directories that nobody holds."""
    for path in root.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(lock)


def _discard_wrong(root: Path, final: Path, verified: VerifiedManifest, config: bytes) -> None:
    """Move a wrong copy out of the way.

    Under the root's lock and after a second look, so that a good copy another fetch has just made is never moved.
    """
    with _locked(root):
        if not os.path.lexists(final) or _is_right(final, verified, config):
            return
        grave = root / f"{_TEMPORARY}{secrets.token_hex(8)}"
        os.rename(final, grave)
    _remove(grave)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _rename_into(temporary: Path, final: Path) -> bool:
    """Publish a directory under its name; False when there is one already, which stays."""
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.is_dir():
            raise
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a directory we made, read-only or not, or whatever took its place."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        path.chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)
