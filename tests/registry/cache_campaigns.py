"""Campaigns against the cache, in any size: tests/registry runs them short, tests/reliability long."""

import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from loraplex_registry.delivery.cache import Cache
from loraplex_registry.delivery.handoff import hand_off
from loraplex_registry.delivery.private_dirs import remove_tree
from loraplex_registry.errors import RegistryError
from loraplex_registry.registry import Registry
from loraplex_registry.trust.verdict import VerifiedManifest
from loraplex_registry.validation.base import BaseModel

ROOT = Path(__file__).parents[2]
WEIGHTS = "adapter_model.safetensors"


def digest_of(number: int) -> str:
    """A digest for an entry that is only a number."""
    return f"sha256:{number:064x}"


def body_of(number: int, size: int) -> bytes:
    """The bytes that belong to it."""
    return random.Random(number).randbytes(size)


def maker(number: int, size: int, *, pause_s: float = 0.0, made: Path | None = None):
    """A `make` that writes the entry in four steps and leaves a mark beside the cache each time it runs."""

    def make(place: Path) -> Path:
        if made is not None:
            (made / f"{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
        work = place / "work"
        work.mkdir(mode=0o700)
        body = body_of(number, size)
        with (work / "data").open("wb") as file:
            for start in range(0, size, max(1, size // 4)):
                file.write(body[start : start + max(1, size // 4)])
                file.flush()
                time.sleep(pause_s / 4)
        (work / "data").chmod(0o444)
        work.chmod(0o555)
        return work

    return make


def user(root: str, made: str, *, seed: int, numbers: int, size: int, rounds: int, cap: int) -> None:
    """One user of a shared cache: takes entries at random, checks every byte, holds some for a while."""
    rng = random.Random(seed)
    cache = Cache(root, max_bytes=cap, wait_s=30)
    for _ in range(rounds):
        number = rng.randrange(numbers)
        with cache.obtain(
            digest_of(number), size_bytes=size, make=maker(number, size, pause_s=0.002, made=Path(made))
        ) as lease:
            time.sleep(rng.random() * 0.003)
            with lease.open("data") as file:
                body = file.read()
            assert body == body_of(number, size), "an entry is not complete"
            assert (lease.path / "data").read_bytes() == body, "a leased entry was evicted"


USER = """
import sys
sys.path.insert(0, {root!r})
from tests.registry.cache_campaigns import user
user({cache!r}, {made!r}, seed={seed}, numbers=6, size=4000, rounds=100000, cap=12000)
"""


def start_user(cache: Path, made: Path, *, seed: int) -> "subprocess.Popen[bytes]":
    """Start a user that never ends in a process of its own."""
    code = USER.format(root=str(ROOT), cache=str(cache), made=str(made), seed=seed)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


def kill_campaign(place: Path, *, kills: int, seed: int) -> Counter[str]:
    """Kill users of one cache at random moments; after each kill every entry is complete and the cache works."""
    rng, found = random.Random(seed), Counter()
    root, made = place / "cache", place / "made"
    made.mkdir()
    cache = Cache(root, max_bytes=12_000, wait_s=10)
    users = [start_user(root, made, seed=rng.randrange(1 << 30)) for _ in range(2)]
    try:
        until = time.monotonic() + 20
        while len(list(made.iterdir())) < 10 and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(kills):
            time.sleep(rng.random() * 0.03)
            index = rng.randrange(len(users))
            assert users[index].poll() is None, users[index].stderr.read().decode()  # type: ignore[union-attr]
            users[index].send_signal(signal.SIGKILL)
            users[index].wait()
            users[index].stderr.close()  # type: ignore[union-attr]
            found["kills"] += 1
            check_entries(cache, found)
            number = rng.randrange(6)
            with cache.obtain(digest_of(number), size_bytes=4000, make=maker(number, 4000)) as lease:
                assert (lease.path / "data").read_bytes() == body_of(number, 4000)
            users[index] = start_user(root, made, seed=rng.randrange(1 << 30))
    finally:
        for one in users:
            one.kill()
            one.wait()
            one.stderr.close()  # type: ignore[union-attr]
    cache.prune()
    left = sorted(path.name for path in root.iterdir())
    found["temporaries left"] = sum(name.startswith(".tmp-") for name in left)
    found["bytes over the cap"] = max(0, sum(entry.size_bytes for entry in cache.entries()) - 12_000)
    return found


def check_entries(cache: Cache, found: Counter[str]) -> None:
    """Every entry that can be leased holds exactly its bytes."""
    for entry in cache.entries():
        lease = cache.lease(entry.digest)
        if lease is None:
            continue
        with lease, lease.open("data") as file:
            number = int(entry.digest[7:], 16)
            assert file.read() == body_of(number, 4000), f"{entry.digest} is incomplete"
            found["entries checked"] += 1


class Attacker:
    """Another process of the same user that swaps, renames, rewrites and relinks whatever lies in a cache."""

    def __init__(self, root: Path, evil: bytes, *, seed: int) -> None:
        self._root = root
        self._evil = evil
        self._rng = random.Random(seed)
        self._number = 0
        self.attacks: Counter[str] = Counter()

    def run(self, stop) -> None:
        """Attack until told to stop."""
        ways = [
            *(self._rewrite, self._rewrite_and_back, self._mapped, self._relink, self._relink_and_back),
            *(self._swap_directory, self._swap_directory_and_back),
        ]
        while not stop.is_set():
            time.sleep(self._rng.random() * 0.002)
            with contextlib.suppress(OSError, ValueError):  # what it aims at may be gone
                targets = [
                    path
                    for pattern in ("sha256-*", ".tmp-*/sha256-*", ".tmp-*/fetch/*", ".tmp-*")
                    for path in self._root.glob(pattern)
                ]
                if targets:
                    attack = self._rng.choice(ways)
                    attack(self._rng.choice(targets))
                    self.attacks[attack.__name__.strip("_")] += 1

    def _name(self) -> str:
        self._number += 1
        return f"evil-{os.getpid()}-{threading.get_ident()}-{self._number}"

    def _rewrite(self, directory: Path) -> None:
        file = directory / WEIGHTS
        file.chmod(0o600)
        with file.open("r+b") as out:
            out.write(self._evil)

    def _rewrite_and_back(self, directory: Path) -> None:
        file = directory / WEIGHTS
        good = file.read_bytes()
        file.chmod(0o600)
        for body in (self._evil, good):
            with file.open("r+b") as out:
                out.write(body)
            time.sleep(self._rng.random() * 0.001)

    def _mapped(self, directory: Path) -> None:
        import mmap

        file = directory / WEIGHTS
        file.chmod(0o600)
        with file.open("r+b") as out, mmap.mmap(out.fileno(), 0) as view:
            view[: len(self._evil)] = self._evil

    def _plant(self, directory: Path) -> Path:
        path = directory / self._name()
        path.write_bytes(self._evil)
        return path

    def _relink(self, directory: Path) -> None:
        directory.chmod(0o700)
        os.replace(self._plant(directory), directory / WEIGHTS)

    def _relink_and_back(self, directory: Path) -> None:
        directory.chmod(0o700)
        kept = directory / self._name()
        planted = self._plant(directory)
        os.rename(directory / WEIGHTS, kept)
        os.rename(planted, directory / WEIGHTS)
        time.sleep(self._rng.random() * 0.001)
        os.replace(kept, directory / WEIGHTS)
        directory.chmod(0o500)

    def _decoy(self, directory: Path) -> Path:
        decoy = directory.with_name(self._name())
        decoy.mkdir(mode=0o700)
        self._plant(decoy).rename(decoy / WEIGHTS)
        config = directory / "adapter_config.json"
        (decoy / config.name).write_bytes(config.read_bytes())
        return decoy

    def _swap_directory(self, directory: Path) -> None:
        decoy = self._decoy(directory)
        os.rename(directory, directory.with_name(self._name()))
        os.rename(decoy, directory)

    def _swap_directory_and_back(self, directory: Path) -> None:
        decoy, kept = self._decoy(directory), directory.with_name(self._name())
        directory.parent.chmod(0o700)
        os.rename(directory, kept)
        os.rename(decoy, directory)
        time.sleep(self._rng.random() * 0.001)
        os.rename(directory, decoy)
        os.rename(kept, directory)


def _attack_process(root: Path, evil: bytes, seed: int, stop) -> None:
    Attacker(root, evil, seed=seed).run(stop)


def swap_campaign(
    registry: Registry,
    verified: VerifiedManifest,
    base: BaseModel,
    root: Path,
    *,
    evil: bytes,
    rounds: int,
    seed: int,
    sealed: bool = True,
) -> Counter[str]:
    """Load while a thread and a process meddle with the cache; count what an engine would have gone on to serve."""
    found: Counter[str] = Counter()
    signed = verified.manifest.file(WEIGHTS).sha256
    cache = Cache(root, wait_s=10)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    thread = threading.Thread(target=Attacker(root, evil, seed=seed).run, args=(stop,))
    process = context.Process(target=_attack_process, args=(root, evil, seed + 1, stop))
    thread.start()
    process.start()
    try:
        for _ in range(rounds):
            found["rounds"] += 1
            try:
                handoff = hand_off(registry, verified, cache, base=base, sealed=sealed)
            except RegistryError:
                found["refused before the engine"] += 1
                continue
            try:
                wrong = _engine_reads(handoff.staged.path) != signed
                found["engine read something else"] += wrong
                handoff.confirm()
                found["served wrong" if wrong else "served right"] += 1
            except (RegistryError, OSError):
                found["refused after the engine"] += 1
            finally:
                handoff.close()
    finally:
        stop.set()
        thread.join()
        process.join()
        for path in root.glob("evil-*"):
            remove_tree(path)
    return found


def _engine_reads(path: Path) -> str:
    """Read as an engine does: by path, in no hurry."""
    time.sleep(0.001)
    return hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()
