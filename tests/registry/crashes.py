"""Every command dies at every store call, before and after it takes effect; then it is run again.

After each death nothing acknowledged may be missing, `fsck` may find no damage, and the repeated command must end in
the same state as one that never died.
"""

import dataclasses
import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraplex_registry.errors import RegistryError
from loraplex_registry.format import layout
from loraplex_registry.format.record import LEASE_S, PendingRecord
from loraplex_registry.lifecycle import repair
from loraplex_registry.refs import AdapterRef
from loraplex_registry.storage.store import Store
from tests.registry.flaky_store import CrashError, FlakyStore
from tests.registry.lab import Lab

ORDERS = AdapterRef.parse("acme/orders")
PROD = AdapterRef.parse("acme/orders@prod")
HOWS = ("crash before", "crash after")


@dataclass(frozen=True)
class Scenario:
    """A command with the state it starts from.

    Attributes:
        prepare: makes the state before.
        command: what dies.
        readable: references that must be readable whatever happens, at every moment.
        outcome: what each reference must give in the end: (version, content) or None.
    """

    name: str
    prepare: Callable[[Lab, Store], None]
    command: Callable[[Lab, Store], Any]
    readable: tuple[str, ...]
    outcome: dict[str, tuple[int, int] | None]


def _two(lab: Lab, store: Store) -> None:
    lab.push(store, ORDERS, 0, tag="prod")
    lab.push(store, ORDERS, 1)


def _two_tagged_twice(lab: Lab, store: Store) -> None:
    _two(lab, store)
    lab.tag(store, ORDERS, 2, "canary")


def _garbage(lab: Lab, store: Store) -> None:
    """Two good versions, a deleted one, an aborted push, an expired push and blobs without record."""
    _two(lab, store)
    lab.push(store, ORDERS, 2)
    lab.delete(store, ORDERS, 3)
    for version, pid in ((4, "4" * 32), (5, "5" * 32)):
        with lab.contents[3].path(lab.contents[3].files[0]) as path:
            key = layout.adapter_prefix(ORDERS) + layout.blob_name(version, pid, 0)
            store.put_blob(key, path, lab.contents[3].files[0])
    record = PendingRecord("4" * 32, "dead", int(lab.now.timestamp()) - 2 * LEASE_S, LEASE_S)
    store.create(layout.version_key(ORDERS, 4), record.to_bytes())


def _damaged(lab: Lab, store: Store) -> None:
    _two(lab, store)
    found = [blob.key for blob in store.blobs(layout.blobs_prefix(ORDERS)) if blob.key.startswith("1~")]
    store.delete_blobs([layout.blobs_prefix(ORDERS) + key for key in found])


def _mend(lab: Lab, store: Store) -> Any:
    good = repair.from_directory(lab.pulled(0))
    return repair.mend_version(store, AdapterRef.parse("acme/orders@1"), good)


SCENARIOS = (
    Scenario(
        "publish",
        lambda lab, store: None,
        lambda lab, store: lab.push(store, ORDERS, 0, tag="prod"),
        (),
        {"acme/orders@prod": (-1, 0), "acme/orders": (-1, 0)},
    ),
    Scenario(
        "publish a second, moving a tag",
        _two,
        lambda lab, store: lab.push(store, ORDERS, 2, tag="prod"),
        ("acme/orders@prod", "acme/orders@1", "acme/orders@2"),
        {"acme/orders@prod": (-1, 2), "acme/orders@1": (1, 0), "acme/orders@2": (2, 1)},
    ),
    Scenario(
        "publish a named version",
        _two,
        lambda lab, store: lab.push(store, ORDERS, 3, version=7),
        ("acme/orders@prod", "acme/orders@2"),
        {"acme/orders@7": (7, 3), "acme/orders@prod": (1, 0)},
    ),
    Scenario(
        "tag",
        _two,
        lambda lab, store: lab.tag(store, ORDERS, 2, "prod"),
        ("acme/orders@prod", "acme/orders@1", "acme/orders@2"),
        {"acme/orders@prod": (2, 1)},
    ),
    Scenario(
        "untag",
        _two,
        lambda lab, store: lab.untag(store, ORDERS, "prod"),
        ("acme/orders@1", "acme/orders@2"),
        {"acme/orders@prod": None, "acme/orders@1": (1, 0)},
    ),
    Scenario(
        "delete",
        _two,
        lambda lab, store: lab.delete(store, ORDERS, 2),
        ("acme/orders@prod", "acme/orders@1"),
        {"acme/orders@2": None, "acme/orders@prod": (1, 0), "acme/orders": (1, 0)},
    ),
    Scenario(
        "delete with force",
        _two_tagged_twice,
        lambda lab, store: lab.delete(store, ORDERS, 2, force=True),
        ("acme/orders@prod", "acme/orders@1"),
        {"acme/orders@2": None, "acme/orders@canary": None, "acme/orders@prod": (1, 0)},
    ),
    Scenario(
        "collect garbage",
        _garbage,
        lambda lab, store: lab.gc(store, ahead_s=86400.0),
        ("acme/orders@prod", "acme/orders@1", "acme/orders@2"),
        {"acme/orders@prod": (1, 0), "acme/orders@2": (2, 1), "acme/orders@3": None},
    ),
)

MEND = Scenario(
    "mend",
    _damaged,
    _mend,
    ("acme/orders@2",),
    {"acme/orders@prod": (1, 0), "acme/orders@1": (1, 0), "acme/orders@2": (2, 1)},
)
"""Starts from damage, so `fsck` is clean only at the end."""


def points(scenario: Scenario, lab: Lab, new_store: Callable[[], Store]) -> int:
    """Return how many store calls the command makes."""
    store = new_store()
    scenario.prepare(lab, store)
    counting = FlakyStore(store)
    scenario.command(lab, counting)
    return len(counting.calls)


def die(scenario: Scenario, lab: Lab, store: Store, *, at: int, how: str) -> None:
    """Let the command die at one call, check, run it again, check again."""
    lab = dataclasses.replace(lab)
    scenario.prepare(lab, store)
    try:
        scenario.command(lab, FlakyStore(store, at=at, how=how))
    except CrashError:
        pass
    else:
        raise AssertionError(f"{scenario.name} did not die at call {at}")
    where = f"{scenario.name}, {how} {at}"
    for text in scenario.readable:
        lab.read(store, AdapterRef.parse(text))
    if scenario is not MEND:
        _require_clean(lab, store, where)
    _again(scenario, lab, store)
    _require_clean(lab, store, where + ", again")
    for text, wanted in scenario.outcome.items():
        found = lab.read_or_none(store, AdapterRef.parse(text))
        # -1: any version, for a number that a death may have used up.
        matches = found is not None and wanted is not None and wanted[0] in {-1, found[0]}
        assert found == wanted or (matches and found[1] == wanted[1]), f"{where}: {text} is {found}"
    _require_no_leftovers(lab, store, where)


def _again(scenario: Scenario, lab: Lab, store: Store) -> None:
    try:
        scenario.command(lab, store)
    except RegistryError as error:
        if "being pushed" not in error.message:
            raise
        lab.now += dt.timedelta(seconds=LEASE_S + 2)  # the dead push's lease ends
        scenario.command(lab, store)


def _require_clean(lab: Lab, store: Store, where: str) -> None:
    report = lab.fsck(store)
    assert not report.damaged, f"{where}: {report.findings}"


def _require_no_leftovers(lab: Lab, store: Store, where: str) -> None:
    lab.now += dt.timedelta(days=1)
    lab.gc(store, ahead_s=86400.0)
    report = lab.fsck(store)
    assert not report.damaged, f"{where}: {report.findings}"
    assert report.counts.get("orphan_blobs", 0) == 0, where


def run(lab: Lab, new_store: Callable[[], Store], scenario: Scenario) -> int:
    """Die at every call in both ways; return the number of deaths."""
    total = points(scenario, lab, new_store)
    for how in HOWS:
        for at in range(total):
            die(scenario, lab, new_store(), at=at, how=how)
    return total * len(HOWS)
