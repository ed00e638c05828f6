"""Power cuts in the middle of a local store's work: what was acknowledged is there, and nothing half is seen."""

import hashlib
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_registry.errors import KeyAbsentError
from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.storage.disk import Disk
from loraplex_registry.storage.local import LocalStore
from tests.registry.blobs import read_blob
from tests.registry.power_cut import ForgetfulDisk, rebuild

OPERATIONS = 12


@dataclass
class Tally:
    """How many disks were looked at, and what was wrong with them."""

    states: int = 0
    wrong: list[str] = field(default_factory=list)


class Model:
    """For each key the values it may have: one that was acknowledged, or one that is being written."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, bytes | None] = {}
        self.writing: dict[str, bytes | None] = {}
        self.deleted: dict[str, list[bytes]] = {}  # blobs that a power cut may bring back

    def allowed(self, key: str) -> list[bytes | None]:
        values = [self.acknowledged.get(key)]
        if key in self.writing:
            values.append(self.writing[key])
        return values


def campaign(directory: Path, *, states: int, seed: int, disk: type[ForgetfulDisk] = ForgetfulDisk) -> Tally:
    """Cut the power before every change of seeded runs until `states` disks were rebuilt and checked.

    Two handles of one directory take turns, as two processes would.
    """
    tally, run = Tally(), 0
    while tally.states < states and not tally.wrong:
        _one_run(directory / str(run), disk, random.Random(f"{seed}/{run}"), tally)
        run += 1
    return tally


def _one_run(directory: Path, kind: type[ForgetfulDisk], rng: random.Random, tally: Tally) -> None:
    root = directory / "root"
    root.mkdir(parents=True)
    disk, model = kind(root), Model()
    stores = [LocalStore(root, disk=disk) for _ in range(2)]

    def cut() -> None:
        how = rng.choice(["all", "none", "some", "some", "some"])
        target = directory / f"cut-{disk.steps}"
        rebuild(disk.top, target, rng, how=how)
        tally.states += 1
        tally.wrong += [f"cut before step {disk.steps} ({how}): {wrong}" for wrong in _judge(target, model)]
        shutil.rmtree(target)

    disk.on_step = cut
    stores[0].prepare()
    for number in range(OPERATIONS):
        _operate(rng.choice(stores), model, rng, directory, number)
        if tally.wrong:
            return


def _operate(store: LocalStore, model: Model, rng: random.Random, directory: Path, number: int) -> None:
    """Do one operation; the model knows of it before it begins and after it was acknowledged."""
    key = f"t/{rng.choice('ab')}/v/{rng.randrange(3)}.json"
    blob = f"t/{rng.choice('ab')}/b/{rng.randrange(3)}/0"
    body = b"%d:" % number + rng.randbytes(rng.randrange(1, 200))
    now = model.acknowledged.get(key)
    kind = rng.choice(["write", "write", "put", "delete"])
    if kind == "write":
        model.writing = {key: body}
        if now is None:
            store.create(key, body)
        else:
            store.swap(key, body, etag=hashlib.sha256(now).hexdigest())
        model.acknowledged[key] = body
    elif kind == "put" and model.acknowledged.get(blob) is None:
        path = directory / "source"
        path.write_bytes(body)
        model.writing = {blob: body}
        store.put_blob(blob, path, FileEntry("source", len(body), hashlib.sha256(body).hexdigest()))
        model.acknowledged[blob] = body
    elif kind == "delete" and model.acknowledged.get(blob) is not None:
        # Deleting is not made durable: a blob that comes back after a power cut is garbage again.
        model.writing = {blob: None}
        store.delete_blobs([blob])
        model.deleted.setdefault(blob, []).append(model.acknowledged.pop(blob) or b"")
    model.writing = {}


def _judge(root: Path, model: Model) -> list[str]:
    """Open the disk and compare every key, and every name that is listed, with the model."""
    store, wrong = LocalStore(root, disk=Disk()), []
    listed = {blob.key: blob.size for blob in store.blobs("")}
    for key in sorted(model.acknowledged.keys() | model.writing.keys() | listed.keys()):
        found = _read(store, key, listed.get(key, 0))
        if found not in model.allowed(key) and not ("/b/" in key and _is_old_blob(found, model, key)):
            wrong.append(
                f"{key}: {len(found) if found is not None else 'nothing'} bytes, none that were written"
            )
        if (found is None) != (key not in listed):
            wrong.append(f"{key}: listed {key in listed}, readable {found is not None}")
    return wrong


def _is_old_blob(found: bytes | None, model: Model, key: str) -> bool:
    """A deleted blob may come back, whole."""
    return model.acknowledged.get(key) is None and found is not None and found in model.deleted.get(key, [])


def _read(store: LocalStore, key: str, size: int) -> bytes | None:
    try:
        return b"".join(map(bytes, read_blob(store, key, size_bytes=size)))
    except KeyAbsentError:
        return None
