"""Mixed operations on S3 through the fault proxy, checked against a dict; the short and the long test share this."""

import hashlib
import itertools
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplex_registry.errors import (
    KeyAbsentError,
    KeyConflictError,
    StoreError,
    StoreRefusedError,
    StoreUnavailableError,
)
from loraplex_registry.format.manifest import FileEntry
from loraplex_registry.storage.store import Item, Store, open_store, write_conditionally
from tests.registry.sure_store import SureStore
from tests.sim import s3_proxy
from tests.sim.s3_proxy import Request, S3Proxy

KEYS = 24
BLOB_BYTES = 40_000
ATTEMPTS_MAX = 5


@dataclass
class Tally:
    """What came of a campaign."""

    operations: int = 0
    right: int = 0
    refused: int = 0
    unknown: int = 0
    requests: int = 0
    attempts_max: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def merge(self, other: "Tally") -> None:
        """Add another worker's."""
        self.operations += other.operations
        self.right += other.right
        self.refused += other.refused
        self.unknown += other.unknown
        self.requests += other.requests
        self.attempts_max = max(self.attempts_max, other.attempts_max)
        self.faults += other.faults
        self.kinds += other.kinds
        self.wrong += other.wrong


def campaign(
    place: str,
    target_port: int,
    directory: Path,
    *,
    operations: int,
    rate: float,
    seed: int,
    workers: int = 1,
) -> Tally:
    """Run `operations` in all, by `workers` with a proxy and a root below `place` each.

    The same seed gives each worker the same operations and the same faults.
    """
    found = [Tally() for _ in range(workers)]
    failed: list[BaseException] = []

    def run(number: int) -> None:
        scratch = directory / f"worker-{number}"
        scratch.mkdir()
        try:
            with s3_proxy.running(target_port) as proxy:
                worker = _Worker(f"{place}/{number}", proxy, scratch, f"{seed}/{number}")
                proxy.use(s3_proxy.seeded(seed * 1000 + number, rate))
                for _ in range(operations // workers):
                    worker.step()
                worker.finish()
                found[number] = worker.tally
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    total = Tally()
    for one in found:
        total.merge(one)
    return total


UNCLEAR = frozenset(
    {
        s3_proxy.LOST_REQUEST,
        s3_proxy.LOST_REPLY,
        s3_proxy.RESET,
        s3_proxy.TRUNCATED,
        s3_proxy.ERROR_500,
        s3_proxy.ERROR_500_APPLIED,
        s3_proxy.ERROR_503,
    }
)
"""Faults after which a client cannot know whether its write took place."""


def wrong_repetitions(requests: list[Request]) -> list[str]:
    """Return what is wrong about the requests of one operation: nothing after a refusal, no write after a 412.

    One request after a 403 is right: reading back what an earlier write of the same operation may have done. When the
    reply to a conditional PUT was lost, the object not found, and the second PUT refused, the first may still have
    arrived meanwhile; "refused" would then be a false answer, and only a GET of that object can tell. It writes
    nothing, and if it is refused as well nothing may follow. A PUT after a 403 is wrong whatever came before.
    """
    found = []
    for index, one in enumerate(requests):
        later = requests[index + 1 :]
        if one.status == 403 and any(not _reads_back(other, one, requests[:index]) for other in later):
            found.append(f"a refused {one.method} was followed by {[other.method for other in later]}")
        if one.status == 412 and any(other.method == "PUT" for other in later):
            found.append("a write was sent again after a 412")
    return found


def _reads_back(request: Request, refused: Request, earlier: list[Request]) -> bool:
    """Say whether `request` clears up a conditional write that went out before the same write was `refused`."""
    return (
        (request.method, request.path) == ("GET", refused.path)
        and refused.conditional
        and any(one.conditional and one.path == refused.path and one.fault in UNCLEAR for one in earlier)
    )


class _WrongError(Exception):
    """An answer that the model does not allow."""


class _Worker:
    """One root, its model, and operations chosen by a seed."""

    def __init__(self, url: str, proxy: S3Proxy, scratch: Path, seed: str) -> None:
        self.tally = Tally()
        self._url = url
        self._plain = open_store(url, endpoint_url=proxy.url)
        self._store: Store = SureStore(self._plain)
        self._proxy = proxy
        self._scratch = scratch
        self._rng = random.Random(seed)
        self._serial = itertools.count()
        self._objects: dict[str, Item] = {}
        self._old: dict[str, str] = {}  # an etag each object had before
        self._blobs: dict[str, bytes] = {}

    def step(self) -> None:
        """Do one operation and judge its answer."""
        name = self._rng.choice(
            ("create", "create", "swap", "swap", "swap_stale", "get", "get", "changed", "put", "read", "read",
             "children", "list", "delete")
        )  # fmt: skip
        before, unknown = len(self._proxy.requests), self.tally.unknown
        self.tally.operations += 1
        self.tally.kinds[name] += 1
        try:
            getattr(self, f"_{name}")()
            self.tally.right += 1
        except StoreRefusedError as error:
            self._judge_refusal(name, error, self._proxy.requests[before:])
        except _WrongError as error:
            self.tally.wrong.append(f"operation {self.tally.operations}: {name}: {error}")
        except StoreError as error:
            self.tally.wrong.append(
                f"operation {self.tally.operations}: {name}: {type(error).__name__} {error}"
            )
        requests = self._proxy.requests[before:]
        self._judge_requests(name, requests)
        # "I do not know" is an answer only when the storage would not let us look, or failed at every attempt.
        faults = [one.fault for one in requests if one.fault]
        if (
            self.tally.unknown > unknown
            and s3_proxy.ERROR_403 not in faults
            and len(faults) < ATTEMPTS_MAX - 1
        ):
            self.tally.wrong.append(f"operation {self.tally.operations}: {name}: unknown, after {faults}")

    def finish(self) -> None:
        """Compare everything that is stored with the model, past the proxy."""
        self.tally.requests = len(self._proxy.requests)
        self.tally.faults = Counter(one.fault for one in self._proxy.requests if one.fault)
        store = open_store(self._url)
        stored = {blob.key: blob.size for blob in store.blobs("")}
        wanted = {key: len(item.body) for key, item in self._objects.items()}
        wanted |= {key: len(body) for key, body in self._blobs.items()}
        if stored != wanted:
            self.tally.wrong.append(f"what is stored differs: {sorted(stored.items() ^ wanted.items())[:5]}")
        for key, item in self._objects.items():
            if store.get(key, limit_bytes=1000) != item:
                self.tally.wrong.append(f"{key} differs in the end")

    def _judge_refusal(self, name: str, error: StoreError, requests: list[Request]) -> None:
        """A refusal is right when a request of this operation was refused."""
        if any(one.fault == s3_proxy.ERROR_403 for one in requests):
            self.tally.refused += 1
            self.tally.right += 1
        else:
            self.tally.wrong.append(f"{name} refused without reason: {error}")

    def _judge_requests(self, name: str, requests: list[Request]) -> None:
        """At most ATTEMPTS_MAX equal requests in a row, and nothing sent again that must not be."""
        runs = itertools.groupby(requests, key=lambda one: (one.method, one.target))
        attempts = max((len(list(run)) for _, run in runs), default=0)
        writes = sum(one.conditional for one in requests)
        self.tally.attempts_max = max(self.tally.attempts_max, attempts, writes)
        self.tally.wrong += [f"{name}: {complaint}" for complaint in wrong_repetitions(requests)]

    def _create(self) -> None:
        key, body = self._key(), self._body()
        self._write(key, body, None)

    def _swap(self) -> None:
        key, body = self._key(), self._body()
        item = self._objects.get(key)
        self._write(key, body, item.etag if item else '"never"')

    def _swap_stale(self) -> None:
        key = self._key()
        if key in self._old:
            self._write(key, self._body(), self._old[key])

    def _write(self, key: str, body: bytes, etag: str | None) -> None:
        """Write and compare the answer with the model; an honest "unknown" is cleared up by reading."""
        before = self._objects.get(key)
        due = before is None if etag is None else before is not None and before.etag == etag
        try:
            new = write_conditionally(self._plain, key, body, etag=etag)
        except KeyConflictError:
            _want(not due, f"{key}: told that it lost, but nobody else writes")
            return
        except StoreUnavailableError as error:
            _want(error.ambiguous, f"{key}: gave up although nothing was unclear: {error}")
            self.tally.unknown += 1
            new = self._clear_up(key, body)
            if not new:
                return
        _want(due, f"{key}: was written although its condition did not hold")
        if before is not None:
            self._old[key] = before.etag
        self._objects[key] = Item(body, new)

    def _clear_up(self, key: str, body: bytes) -> str:
        """Return the etag when the write took place; look past the proxy."""
        try:
            item = open_store(self._url).get(key, limit_bytes=1000)
        except KeyAbsentError:
            return ""
        return item.etag if item.body == body else ""

    def _get(self) -> None:
        key = self._key()
        try:
            found: Item | None = self._store.get(key, limit_bytes=1000)
        except KeyAbsentError:
            found = None
        _want(found == self._objects.get(key), f"{key}: got {found}")

    def _changed(self) -> None:
        key = self._key()
        item = self._objects.get(key)
        etag = self._rng.choice([item.etag if item else '"x"', self._old.get(key, '"y"')])
        try:
            found = self._store.changed(key, etag=etag, limit_bytes=1000)
        except KeyAbsentError:
            _want(item is None, f"{key}: said to be absent")
            return
        _want(found == (None if item and item.etag == etag else item), f"{key}: changed to {found}")

    def _put(self) -> None:
        key, body = self._blob_key(), self._rng.randbytes(self._rng.randrange(BLOB_BYTES))
        if key in self._blobs:
            body = self._blobs[key]  # a key has one content for ever
        path = self._scratch / "blob"
        path.write_bytes(body)
        try:
            self._store.put_blob(key, path, FileEntry("blob", len(body), hashlib.sha256(body).hexdigest()))
        except StoreRefusedError:
            # Refused at a repetition, after a reply was lost: it may be there. Whoever pushes would send it again.
            self._proxy_free_put(key, path, body)
            raise
        self._blobs[key] = body

    def _proxy_free_put(self, key: str, path: Path, body: bytes) -> None:
        entry = FileEntry("blob", len(body), hashlib.sha256(body).hexdigest())
        open_store(self._url).put_blob(key, path, entry)
        self._blobs[key] = body

    def _read(self) -> None:
        key = self._blob_key()
        body = self._blobs.get(key)
        size = len(body) if body is not None else 10
        start = self._rng.randrange(size) if size else 0
        length = self._rng.randint(1, size - start) if size else 0
        try:
            pieces = self._store.read_range(key, start=start, length=length, size_bytes=size)
            found = b"".join(map(bytes, pieces))
        except KeyAbsentError:
            _want(body is None, f"{key}: said to be absent")
            return
        _want(body is not None and found == body[start : start + length], f"{key}: other bytes")

    def _children(self) -> None:
        after = self._rng.choice(["", self._key().rpartition("/")[2]])
        names = sorted(key.removeprefix("t/v/") for key in self._objects if key.startswith("t/v/"))
        found = list(self._store.children("t/v/", after=after))
        _want(found == [name for name in names if name > after], f"listed {found}")

    def _list(self) -> None:
        wanted = sorted((key.removeprefix("t/b/"), len(body)) for key, body in self._blobs.items())
        found = [(blob.key, blob.size) for blob in self._store.blobs("t/b/")]
        _want(found == wanted, f"listed {found}")

    def _delete(self) -> None:
        keys = self._rng.sample([self._blob_name(number) for number in range(KEYS)], 3)
        try:
            self._store.delete_blobs(keys)
        except StoreRefusedError:
            open_store(self._url).delete_blobs(keys)  # refused at a repetition: some may be gone
            for key in keys:
                self._blobs.pop(key, None)
            raise
        for key in keys:
            self._blobs.pop(key, None)

    def _key(self) -> str:
        return f"t/v/{self._rng.randrange(KEYS * 4):03d}.json"

    def _blob_key(self) -> str:
        return self._blob_name(self._rng.randrange(KEYS))

    def _blob_name(self, number: int) -> str:
        return f"t/b/{number:02d}"

    def _body(self) -> bytes:
        return b"%d %032x" % (next(self._serial), self._rng.getrandbits(128))


def _want(good: bool, complaint: Any) -> None:
    if not good:
        raise _WrongError(str(complaint))
