"""Does this storage keep the promises the registry is built on? Found out by racing writers against it.

Some storages that speak S3 take `If-None-Match` and `If-Match`, answer 200 and ignore them, or keep them only while
writers come one at a time (versitygw#2288, rustfs#1659, mountx#19). On such a storage two publishers overwrite each
other without an error, so `registry doctor` asks before the first write, and writes are refused where a condition is
not kept. Everything is done under `probe/<random>/b/`, and removed.

A lost reply during the probe fails nothing: what counts is what was told to the writers and what stands there after.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..errors import (
    DigestMismatchError,
    KeyAbsentError,
    KeyConflictError,
    RegistryError,
    StoreError,
    StoreUnavailableError,
)
from ..format.manifest import FileEntry
from .disk import file_system, is_network_file_system
from .probe_race import race
from .probe_report import Check, ProbeReport
from .store import Store, write_conditionally

WRITERS: Final = 32
"""Writers of one race."""

ROUNDS: Final = 8
"""Races of each kind."""

READS: Final = 16
"""Writes that are read back and listed at once."""

CLOCK_SKEW_S_MAX: Final = 300.0
"""Largest difference of clocks that is not reported, in seconds."""

_BODY_BYTES_MAX: Final = 4096

CREATE: Final = "If-None-Match: *"
SWAP: Final = "If-Match"


def probe(
    store: Store, *, writers: int = WRITERS, rounds: int = ROUNDS, rng: random.Random | None = None
) -> ProbeReport:
    """Find out what a storage promises; takes about `writers * rounds * 2 + 100` requests.

    Args:
        store: the storage; `prepare` must have been called.
        writers: threads of one race, 2 to 256.
        rounds: races of each kind, at least 1.
        rng: chooses names and bodies; default the system's.

    Returns:
        The report. A promise that is not kept is a failed check, not an exception.

    Raises:
        StoreUnavailableError: the storage is down.
        StoreRefusedError: it refuses to be written to or read at all.
    """
    run = _Probe(store, writers, rounds, rng or random.SystemRandom())
    try:
        checks: list[Check] = []
        for part in (
            run.races,
            run.conditions,
            run.reads_after_writes,
            run.lists_after_writes,
            run.conditional_read,
            run.checksum,
            run.clock,
        ):
            checks += _or_alone(part)
    except BaseException:
        with contextlib.suppress(RegistryError):
            run.tidy()
        raise
    checks.append(run.tidy())
    checks += _place(store)
    return ProbeReport(tuple(checks))


class _Probe:
    """One run: the keys it used, and one method per group of checks."""

    def __init__(self, store: Store, writers: int, rounds: int, rng: random.Random) -> None:
        self._store = store
        self._writers = writers
        self._rounds = rounds
        self._rng = rng
        self._prefix = f"probe/{rng.getrandbits(64):016x}/b/"
        self._keys: list[str] = []

    def races(self) -> list[Check]:
        """Race writers on an absent and on a known state."""
        return [
            self._races(
                "create-race", CREATE, lambda key: lambda body: self._store.create(key, body), first=False
            ),
            self._races("swap-race", SWAP, self._swapper, first=True),
        ]

    def conditions(self) -> list[Check]:
        """Break each condition alone, one writer at a time."""
        key, etag = self._new_object()
        created = self._is_refused(lambda: self._store.create(key, self._body()))
        etag = self._store.get(key, limit_bytes=_BODY_BYTES_MAX).etag  # the create may have replaced it
        newer = write_conditionally(self._store, key, self._body(), etag=etag)
        stale = self._is_refused(lambda: self._store.swap(key, self._body(), etag=etag))
        absent = self._key()
        missing = self._is_refused(lambda: self._store.swap(absent, self._body(), etag=newer))
        appeared = self._exists(absent)
        return [
            _check("create-existing", created, f"a create of a key that exists is refused ({CREATE})"),
            _check("swap-stale", stale, f"a swap with the etag of an earlier state is refused ({SWAP})"),
            _check(
                "swap-missing",
                missing and not appeared,
                f"a swap of a key that is not there is refused and makes nothing ({SWAP})",
            ),
        ]

    def reads_after_writes(self) -> list[Check]:
        """Read every write at once."""
        stale = 0
        for _ in range(READS):
            key, body = self._key(), self._body()
            etag = write_conditionally(self._store, key, body, etag=None)
            stale += self._read(key) != body
            body = self._body()
            write_conditionally(self._store, key, body, etag=etag)
            stale += self._read(key) != body
        return [
            _check(
                "read-after-write",
                not stale,
                f"a read sees every earlier write ({stale} of {2 * READS} did not)",
            )
        ]

    def lists_after_writes(self) -> list[Check]:
        """List after every write."""
        missed = 0
        for _ in range(READS):
            key, _etag = self._new_object()
            missed += key.rpartition("/")[2] not in set(self._store.children(self._prefix))
        return [
            _check(
                "list-after-write",
                not missed,
                f"a listing shows every earlier write ({missed} of {READS} it did not)",
            )
        ]

    def conditional_read(self) -> list[Check]:
        """Ask for an object by the etag it has, and by one it had."""
        key, etag = self._new_object()
        same = self._store.changed(key, etag=etag, limit_bytes=_BODY_BYTES_MAX)
        body = self._body()
        newer = write_conditionally(self._store, key, body, etag=etag)
        item = self._store.changed(key, etag=etag, limit_bytes=_BODY_BYTES_MAX)
        good = same is None and item is not None and (item.body, item.etag) == (body, newer)
        return [
            _check(
                "conditional-read", good, "a read with a known etag is answered 304 exactly while it stands"
            )
        ]

    def checksum(self) -> list[Check]:
        """Upload bytes under the SHA-256 of others."""
        key = self._key()
        with tempfile.TemporaryDirectory(prefix="loraplex-probe-") as directory:
            path = Path(directory) / "blob"
            path.write_bytes(self._body())
            wrong = FileEntry("blob", path.stat().st_size, hashlib.sha256(b"").hexdigest())
            try:
                self._store.put_blob(key, path, wrong)
                verified = False
            except DigestMismatchError:
                verified = True
        good = verified and not self._exists(key)
        return [_check("checksum", good, "an upload with a wrong SHA-256 is refused", required=False)]

    def clock(self) -> list[Check]:
        """Compare the storage's clock with ours: garbage collection judges age by the storage's."""
        key, _etag = self._new_object()
        name = key.removeprefix(self._prefix)
        written = next((blob.modified_s for blob in self._store.blobs(self._prefix) if blob.key == name), 0.0)
        skew = abs(time.time() - written)
        return [
            _check(
                "clock",
                skew <= CLOCK_SKEW_S_MAX,
                f"the storage's clock and this machine's agree ({skew:.0f} s apart)",
                required=False,
            )
        ]

    def tidy(self) -> Check:
        """Delete everything that was written."""
        try:
            self._store.delete_blobs(self._keys)
            left = sum(self._exists(key) for key in self._keys[:READS])
            left += sum(1 for _ in self._store.blobs(self._prefix))
            detail = f"deleted blobs are gone at once ({left} stayed)"
        except StoreError as error:
            left, detail = 1, f"blobs can be deleted ({error.code}; some stay under {self._prefix})"
        return _check("delete", not left, detail, required=False)

    def _races(
        self, name: str, condition: str, writer: Callable[[str], Callable[[bytes], object]], *, first: bool
    ) -> Check:
        wrong: list[str] = []
        for _ in range(self._rounds):
            key = self._key()
            if first:
                write_conditionally(self._store, key, self._body(), etag=None)
            bodies = [self._body() for _ in range(self._writers)]
            won, unknown = race(writer(key), bodies)
            found = self._read(key)
            if len(won) > 1:
                wrong.append(f"{len(won)} of {self._writers} writers won")
            elif won and found != won[0]:
                wrong.append("the object is not the winner's")
            elif found not in bodies:
                if unknown:
                    raise StoreUnavailableError(f"{self._store.url} lost {unknown} writes; try again.")
                wrong.append("no writer won")
        good = f"{self._rounds} of {self._rounds} races had one winner among {self._writers} ({condition})"
        bad = f"{condition} is not kept in {len(wrong)} of {self._rounds} races: {', '.join(sorted(set(wrong)))}"
        return Check(name, not wrong, bad if wrong else good)

    def _swapper(self, key: str) -> Callable[[bytes], object]:
        etag = self._store.get(key, limit_bytes=_BODY_BYTES_MAX).etag
        return lambda body: self._store.swap(key, body, etag=etag)

    def _is_refused(self, write: Callable[[], object]) -> bool:
        """Say whether a write that must fail does. One whose reply is lost is sent again: it must fail as well."""
        for _ in range(5):
            try:
                write()
            except KeyConflictError:
                return True
            except StoreUnavailableError as error:
                if not error.ambiguous:
                    raise
                continue
            return False
        raise StoreUnavailableError(f"{self._store.url} kept losing replies; try again.")

    def _new_object(self) -> tuple[str, str]:
        key = self._key()
        return key, write_conditionally(self._store, key, self._body(), etag=None)

    def _key(self) -> str:
        key = f"{self._prefix}{len(self._keys)}"
        self._keys.append(key)
        return key

    def _body(self) -> bytes:
        return b'{"fmt":1,"probe":"%032x"}' % self._rng.getrandbits(128)

    def _read(self, key: str) -> bytes | None:
        try:
            return self._store.get(key, limit_bytes=_BODY_BYTES_MAX).body
        except KeyAbsentError:
            return None

    def _exists(self, key: str) -> bool:
        return self._read(key) is not None


def _or_alone(part: Callable[[], list[Check]]) -> list[Check]:
    """Run some checks. They write to keys nobody else knows, so a writer that is told it lost was lied to."""
    try:
        return part()
    except (KeyConflictError, KeyAbsentError) as error:
        return [_check("alone", False, f"a writer alone keeps what it wrote ({error.message.rstrip('.')})")]


def _check(name: str, ok: bool, promise: str, *, required: bool = True) -> Check:
    return Check(name, ok, promise if ok else f"It does not hold that {promise}.", required)


def _place(store: Store) -> list[Check]:
    """Look at the file system below a local store."""
    root = getattr(store, "root", None)
    if not isinstance(root, Path):
        return []
    kind = file_system(root)
    return [
        _check(
            "file-system",
            not is_network_file_system(kind),
            f"the directory is on a local file system ({kind}); locks of a network one do not hold across machines",
            required=False,
        )
    ]
