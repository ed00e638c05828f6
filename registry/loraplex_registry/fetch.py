"""Fetching: from a verified manifest to an immutable directory that an engine may load.

The directory `<root>/sha256-<hex>/` holds exactly two files, both 0444 in a 0555 directory: `adapter_config.json`
written by us from the checked values, and `adapter_model.safetensors` with the signed bytes. It appears by one
rename after everything was checked, so no half of it is ever seen. A copy that is already there is hashed again
before it is used; one that differs is removed and fetched anew.

Many threads and processes may fetch into one root: the first rename wins, the others use its result.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from . import layout
from .base import CARD_NAME, BaseModel, Progress
from .canonical import canonical
from .errors import (
    ConflictError,
    DamagedError,
    DigestMismatchError,
    KeyAbsentError,
    RankTooLargeError,
    SettingsError,
    StoreUnavailableError,
    UnsupportedAdapterError,
)
from .lora_config import CONFIG_NAME, read_config
from .manifest import Manifest
from .record import StoredFile
from .store import Store
from .trust import VerifiedManifest
from .weights import (
    BUNDLE_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    AdapterFacts,
    Limits,
    check_file_name,
    open_regular,
    validate_adapter,
)

_HASH_CHUNK_BYTES: Final = 1 << 20
_TEMPORARY: Final = ".tmp-"


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
    progress: Progress | None = None,
) -> StagedAdapter:
    """Make sure the immutable directory exists and is right; see `Registry.fetch`."""
    manifest = verified.manifest
    base.require(manifest.base_model.digest, what=str(verified.ref))
    _check_limits(manifest, limits)
    config = _staged_config(store, verified, limits)
    final = root / verified.digest.replace(":", "-")
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_right(final, verified, config):
        _discard_wrong(root, final, verified, config)
        made = _stage_new(
            store, verified, root, final, base=base, limits=limits, config=config, progress=progress
        )
        if not made and not _is_right(final, verified, config):
            raise DigestMismatchError(
                f"{final} is wrong although another fetch just made it; look who writes there."
            )
    size = manifest.file(WEIGHTS_NAME).size + len(config)
    return StagedAdapter(verified.digest, final, manifest, size, manifest.lora.rank)


def pull(
    store: Store, verified: VerifiedManifest, target: Path, *, limits: Limits, progress: Progress | None
) -> None:
    """Write all files of a version, its manifest and its bundle into a new directory; see `Registry.pull`."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConflictError(f"{target} exists and is not an empty directory; name a new one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_directory(target.parent) as temporary:
        _download_all(store, verified, temporary, [file.name for file in verified.record.files], progress)
        _write(temporary / MANIFEST_NAME, verified.record.manifest_bytes)
        _write(temporary / BUNDLE_NAME, canonical(verified.record.bundle))
        base = _pulled_base(temporary, verified)
        validate_adapter(temporary, base, limits)
        temporary.chmod(0o755)
        if not _rename_into(temporary, target):
            raise ConflictError(f"{target} was made by somebody else meanwhile; name a new one.")


def stored_bytes(store: Store, verified: VerifiedManifest, name: str) -> bytes:
    """Return the checked bytes of one small file of a version.

    Raises:
        DigestMismatchError: the store holds other bytes than were signed.
    """
    return b"".join(_checked(_source(store, verified, verified.record.file(name)), verified, name, None))


def _check_limits(manifest: Manifest, limits: Limits) -> None:
    """Refuse by the signed names and figures before a byte of weights is asked for."""
    for file in manifest.files:
        check_file_name(file.name)
    if manifest.lora.rank > limits.max_rank:
        raise RankTooLargeError(
            f"The adapter has rank {manifest.lora.rank}, the limit is {limits.max_rank}; train it smaller."
        )
    size = manifest.file(WEIGHTS_NAME).size
    if size > limits.max_bytes:
        raise UnsupportedAdapterError(f"{WEIGHTS_NAME} has {size} bytes, the limit is {limits.max_bytes}.")


def _staged_config(store: Store, verified: VerifiedManifest, limits: Limits) -> bytes:
    return read_config(stored_bytes(store, verified, CONFIG_NAME), rank_max=limits.max_rank).to_json()


def _stage_new(
    store: Store,
    verified: VerifiedManifest,
    root: Path,
    final: Path,
    *,
    base: BaseModel,
    limits: Limits,
    config: bytes,
    progress: Progress | None,
) -> bool:
    """Download, check and publish a directory; False when another fetch published one first."""
    with _temporary_directory(root) as temporary:
        _download_all(store, verified, temporary, [CONFIG_NAME, WEIGHTS_NAME], progress)
        facts = validate_adapter(temporary, base, limits, progress=progress)
        _check_facts(facts, verified)
        (temporary / CONFIG_NAME).unlink()
        _write(temporary / CONFIG_NAME, config)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            (temporary / name).chmod(0o444)
        temporary.chmod(0o555)
        return _rename_into(temporary, final)


def _check_facts(facts: AdapterFacts, verified: VerifiedManifest) -> None:
    """Compare what was read back from disk with what was signed."""
    signed = {file.name: file.sha256 for file in verified.manifest.files}
    if any(signed[file.name] != file.sha256 for file in facts.files):
        raise DigestMismatchError(f"{verified.ref} differs on disk from what was signed; check the disk.")
    if facts.rank != verified.manifest.lora.rank:
        raise UnsupportedAdapterError(
            f"{verified.ref} has rank {facts.rank}, its manifest says otherwise; publish it again."
        )


def _download_all(
    store: Store, verified: VerifiedManifest, directory: Path, names: list[str], progress: Progress | None
) -> None:
    files = [verified.record.file(name) for name in names]
    meter = _Meter(progress, total=sum(file.size for file in files))
    for file in files:
        with (directory / file.name).open("xb") as sink:
            for chunk in _checked(_source(store, verified, file), verified, file.name, meter):
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())


def _source(store: Store, verified: VerifiedManifest, file: StoredFile) -> Iterator[bytes]:
    if file.inline is not None:
        yield file.inline
        return
    assert file.blob is not None
    key = layout.adapter_prefix(verified.ref) + file.blob
    try:
        yield from store.read_blob(key, size_bytes=file.size)
    except KeyAbsentError as error:
        raise DamagedError(
            f"{file.name} of {verified.ref} is gone from the store; publish the adapter again."
        ) from error


def _checked(
    chunks: Iterator[bytes], verified: VerifiedManifest, name: str, meter: _Meter | None
) -> Iterator[bytes]:
    """Pass chunks on while counting and hashing; the end is reached only when size and digest are the signed ones."""
    signed = verified.manifest.file(name)
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        size += len(chunk)
        if size > signed.size:
            break
        digest.update(chunk)
        if meter is not None:
            meter.add(len(chunk))
        yield chunk
    if (size, digest.hexdigest()) != (signed.size, signed.sha256):
        raise DigestMismatchError(
            f"{name} of {verified.ref} differs from the signed digest; the store is damaged or was tampered with."
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
            return _sha256(file) == verified.manifest.file(WEIGHTS_NAME).sha256
    except (OSError, UnsupportedAdapterError):
        return False


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_HASH_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _pulled_base(directory: Path, verified: VerifiedManifest) -> BaseModel:
    card = directory / CARD_NAME
    if not card.is_file():
        raise SettingsError(f"{verified.ref} carries no {CARD_NAME}; publish it again with this release.")
    base = BaseModel.load(card)
    base.require(verified.manifest.base_model.digest, what=str(verified.ref))
    return base


def _write(path: Path, body: bytes) -> None:
    with path.open("xb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _temporary_directory(root: Path) -> Iterator[Path]:
    """Yield a new directory in `root`, locked while in use and gone afterwards unless it was renamed away.

    The lock tells a living fetch from the left-over of a crash, which the next fetch sweeps.
    """
    _sweep(root)
    try:
        path, lock = _new_locked_directory(root)
    except OSError as error:
        raise StoreUnavailableError(f"{root} cannot be written ({error.strerror}).") from error
    try:
        yield path
    except OSError as error:
        raise StoreUnavailableError(
            f"{root} failed while an adapter was written ({error.strerror})."
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
    descriptor = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def _remove(path: Path) -> None:
    """Remove a directory we made, read-only or not, or whatever took its place."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        path.chmod(0o700)
    shutil.rmtree(path, ignore_errors=True)


class _Meter:
    """Adds up bytes for a progress callback."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, size_bytes: int) -> None:
        self._done += size_bytes
        if self._progress is not None:
            self._progress("fetch", self._done, self._total)
