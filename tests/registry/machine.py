"""The registry against its model: random operations, lost requests and replies, crashes, collections, reopening.

A command that fails or dies is run again, as a user would, until it ends; then the model is asked what must be true.
"""

import datetime as dt
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from loraplex_registry.errors import AdapterNotFoundError, ConflictError, StoreUnavailableError
from loraplex_registry.format.record import LEASE_S
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.storage.memory import MemoryStore
from loraplex_registry.storage.store import Store, open_store
from tests.registry.flaky_store import ChaosStore, CrashError
from tests.registry.lab import CONTENTS, NOW, Lab
from tests.registry.model import Adapter, Model

NAMES = ("orders", "mails")
TAGS = ("prod", "canary")
RETRIES_MAX = 60
ANY_NAME, ANY_TAG = st.sampled_from(NAMES), st.sampled_from(TAGS)
ANY_VERSION, ANY_CONTENT = st.integers(1, 8), st.integers(0, CONTENTS - 1)


class RegistryMachine(RuleBasedStateMachine):
    """One run. `lab` and `kind` are set by `run`."""

    lab: ClassVar[Lab]
    kind: ClassVar[str] = "memory"
    operations: ClassVar[int] = 0
    crashes: ClassVar[int] = 0

    @initialize(faults=st.booleans(), seed=st.integers(0, 1 << 30))
    def begin(self, faults: bool, seed: int) -> None:
        self.model = Model()
        self.directory = tempfile.TemporaryDirectory(prefix="loraplex-model-")
        self.rng = random.Random(seed)
        self.lab.now = NOW
        self.dirty = False
        self.rate = 0.05 if faults else 0.0
        self.inner: Store = self._open()

    def _open(self) -> Store:
        if self.kind == "memory":
            return MemoryStore(clock=lambda: self.lab.now.timestamp())
        store = open_store(Path(self.directory.name, "root").as_uri())
        store.prepare()
        return store

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self._check_end()
            self.directory.cleanup()

    # --- running a command until it ends

    def run(self, command: Callable[[Store], Any]) -> tuple[Any, bool]:
        """Run a command to its end; say whether it was interrupted on the way."""
        type(self).operations += 1
        interrupted = False
        for _ in range(RETRIES_MAX):
            crash = self.rate > 0 and self.rng.random() < 0.15
            store = ChaosStore(
                self.inner, self.rng, rate=self.rate, crash_at=self.rng.randrange(8) if crash else None
            )
            try:
                return command(store), interrupted
            except CrashError:
                type(self).crashes += 1
                self.dirty = interrupted = True
            except StoreUnavailableError:
                self.dirty = interrupted = True
            except ConflictError as error:
                if not self.dirty or "being pushed" not in error.message:
                    raise
                self.lab.now += dt.timedelta(seconds=LEASE_S + 2)  # a push of ours that died is in the way
        raise AssertionError("a command did not end")

    # --- commands

    @rule(name=ANY_NAME, content=ANY_CONTENT, wanted=st.none() | ANY_VERSION, tag=st.none() | ANY_TAG)
    def push(self, name: str, content: int, wanted: int | None, tag: str | None) -> None:
        adapter = self.model.adapter(name)
        ref = AdapterRef("acme", name)
        expected = adapter.push(content, wanted)
        try:
            (outcome, move), interrupted = self.run(
                lambda store: self.lab.push(store, ref, content, version=wanted, tag=tag)
            )
        except ConflictError:
            assert expected == "conflict"
            return
        assert expected in {"new", "same"}
        version = outcome.version
        if expected == "same":
            assert not outcome.created
            assert adapter.versions[version] == content
        else:
            assert outcome.created or interrupted
            assert wanted in (None, version)
            assert version not in adapter.versions
            assert wanted is not None or version > max(adapter.versions, default=0)
            adapter.versions[version] = content
        if tag is not None:
            self._moved(adapter, tag, version, move, interrupted)

    @rule(name=ANY_NAME, version=ANY_VERSION, tag=ANY_TAG)
    def move(self, name: str, version: int, tag: str) -> None:
        adapter = self.model.adapter(name)
        expected = adapter.move(tag, version)
        try:
            done, interrupted = self.run(
                lambda store: self.lab.tag(store, AdapterRef("acme", name), version, tag)
            )
        except AdapterNotFoundError:
            assert expected == "absent"
            return
        assert expected != "absent"
        self._moved(adapter, tag, version, done, interrupted)

    @rule(name=ANY_NAME, tag=ANY_TAG)
    def untag(self, name: str, tag: str) -> None:
        adapter = self.model.adapter(name)
        done, interrupted = self.run(lambda store: self.lab.untag(store, AdapterRef("acme", name), tag))
        if done is None:
            assert tag not in adapter.tags
        else:
            self._moved(adapter, tag, None, done, interrupted)

    def _moved(self, adapter: Adapter, tag: str, version: int | None, done: Any, interrupted: bool) -> None:
        generation, target = adapter.tags.get(tag, (0, None))
        assert done.statement.version == version
        if generation and target == version:
            assert not done.moved
            assert done.statement.generation == generation
        else:
            assert done.moved or interrupted
            assert done.statement.generation == generation + 1
        adapter.tags[tag] = (done.statement.generation, version)

    @rule(name=ANY_NAME, version=ANY_VERSION, force=st.booleans())
    def delete(self, name: str, version: int, force: bool) -> None:
        adapter = self.model.adapter(name)
        expected = adapter.delete(version, force=force)
        ref = AdapterRef("acme", name)
        try:
            done, interrupted = self.run(lambda store: self.lab.delete(store, ref, version, force=force))
        except ConflictError:
            # A number that a push died on was never published either.
            assert expected == "conflict" or (expected == "absent" and version not in adapter.versions)
            return
        except AdapterNotFoundError:
            assert expected == "absent"
            return
        assert expected in {"deleted", "same"}
        assert done.deleted == (expected == "deleted") or interrupted
        adapter.versions[version] = None
        for tag in adapter.pointing(version):
            adapter.tags[tag] = (adapter.tags[tag][0] + 1, None)

    @rule(ahead_days=st.sampled_from([0, 0, 10, -10]))
    def collect(self, ahead_days: int) -> None:
        self.run(lambda store: self.lab.gc(store, ahead_s=ahead_days * 86400.0))

    @rule(hours=st.integers(1, 48))
    def wait(self, hours: int) -> None:
        self.lab.now += dt.timedelta(hours=hours)

    @rule()
    def reopen(self) -> None:
        if self.kind != "memory":
            self.inner = self._open()

    # --- looking

    @rule(name=ANY_NAME, version=ANY_VERSION)
    def read_version(self, name: str, version: int) -> None:
        ref = AdapterRef("acme", name, version=version)
        found, _ = self.run(lambda store: self.lab.read_or_none(store, ref))
        assert found == self.model.adapter(name).readable(version)

    @rule(name=ANY_NAME, tag=ANY_TAG)
    def read_tag(self, name: str, tag: str) -> None:
        ref = AdapterRef("acme", name, tag=tag)
        found, _ = self.run(lambda store: self.lab.read_or_none(store, ref))
        assert found == self.model.adapter(name).tagged(tag)

    @rule(name=ANY_NAME)
    def read_newest(self, name: str) -> None:
        adapter = self.model.adapter(name)
        found, _ = self.run(lambda store: self.lab.read_or_none(store, AdapterRef("acme", name)))
        assert found == adapter.readable(adapter.newest())

    @rule(name=ANY_NAME)
    def list_versions(self, name: str) -> None:
        ref = AdapterRef("acme", name)
        states, _ = self.run(lambda store: list(Registry(store).versions(ref)))
        adapter = self.model.adapter(name)
        listed = {state.version: state.state for state in states if state.state in {"committed", "deleted"}}
        assert listed == {
            version: "deleted" if content is None else "committed"
            for version, content in adapter.versions.items()
        }

    @invariant()
    def tags_are_as_the_model_says(self) -> None:
        for name, adapter in getattr(self, "model", Model()).adapters.items():
            for tag in adapter.tags:
                ref = AdapterRef("acme", name, tag=tag)
                assert self.lab.read_or_none(self.inner, ref) == adapter.tagged(tag)

    def _check_end(self) -> None:
        """Nothing acknowledged is lost, and a late collection leaves no byte that nothing refers to."""
        assert not self.lab.fsck(self.inner).damaged
        self.lab.now += dt.timedelta(days=3)
        ahead_s = 10 * 86400.0
        self.lab.gc(self.inner, ahead_s=ahead_s)
        report = self.lab.fsck(self.inner)
        assert not report.damaged, report.findings
        assert report.counts.get("orphan_blobs", 0) == 0
        for name, adapter in self.model.adapters.items():
            for version in adapter.versions:
                ref = AdapterRef("acme", name, version=version)
                assert self.lab.read_or_none(self.inner, ref) == adapter.readable(version)


def run(lab: Lab, *, runs: int, steps: int = 50, kind: str = "memory", fixed: bool = True) -> dict[str, int]:
    """Run the machine and return how many operations and crashes there were.

    A failing run is printed by hypothesis as the shortest list of steps that fails.
    """
    machine = type("Machine", (RegistryMachine,), {"lab": lab, "kind": kind, "operations": 0, "crashes": 0})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=steps,
            deadline=None,
            derandomize=fixed,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return {"operations": machine.operations, "crashes": machine.crashes}
