"""The real command is killed at random moments, two at a time; then everything is looked at and run again."""

import json
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplex_registry.errors import AdapterNotFoundError
from loraplex_registry.lifecycle.fsck import check
from loraplex_registry.lifecycle.fsck_adapter import Depth
from loraplex_registry.lifecycle.gc import collect
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry, utc_now
from loraplex_registry.storage.store import Store, open_store
from loraplex_registry.trust.verdict import TrustPolicy
from tests.registry.lab import CONTENTS, Lab
from tests.registry.shell import COMMAND, Shell

NAMES = ("orders", "mails")
WAIT_S = 60.0


@dataclass
class Attempt:
    """One run of the command that may be killed."""

    words: tuple[str, ...]
    process: "subprocess.Popen[str]"
    kill_at: float
    killed: bool = False
    answer: dict[str, Any] | None = None


@dataclass
class Household:
    """A user's home with a registry in it, and what was acknowledged to its user."""

    shell: Shell
    store: Store
    policy: TrustPolicy
    directories: list[Path]
    rng: random.Random
    pushed: dict[str, str] = field(default_factory=dict)  # reference of a version -> digest
    condemned: set[str] = field(default_factory=set)  # versions that somebody tried to delete
    kills: int = 0
    survivors: int = 0
    durations: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(cls, place: Path, seed: int) -> "Household":
        """Make a home, a key, a registry and a few adapters."""
        home = place / "home"
        home.mkdir(parents=True)
        shell = Shell(home, {})
        made = shell.json("init", "--tenant", "acme")
        lab = Lab.build(place / "lab")
        directories = [lab.pulled(number) for number in range(CONTENTS)]
        policy = TrustPolicy.load(made["policy"])
        return cls(shell, open_store(made["registry"]), policy, directories, random.Random(seed))

    def round(self) -> None:
        """Run two commands at once, kill them, look, and run again what was killed."""
        attempts = [self._start(self._words()) for _ in range(2)]
        for attempt in sorted(attempts, key=lambda one: one.kill_at):
            self._end(attempt)
        self._look()
        for attempt in attempts:
            if attempt.killed:
                done = self.shell.run(*attempt.words, "--json")
                self._require_completed(attempt.words, done)
                self._note(attempt.words, json.loads(done.stdout))
        self._look()

    def finish(self) -> None:
        """Collect the garbage of all the dead; nothing that counts goes with it."""
        week_s = 7 * 86400.0
        collect(self.store, apply=True, grace_s=0.0, now_s=time.time() + week_s)
        self._look()
        left = check(self.store, Depth(utc_now())).counts
        assert left["orphan_blobs"] == 0, left

    def _words(self) -> tuple[str, ...]:
        name = f"acme/{self.rng.choice(NAMES)}"
        version = f"{name}@{self.rng.randrange(1, 6)}"
        return self.rng.choice(
            [
                ("push", str(self.rng.choice(self.directories)), name, "--tag", "prod"),
                ("push", str(self.rng.choice(self.directories)), name, "--tag", "prod"),
                ("tag", version, "canary"),
                ("rm", version, "--force"),
                ("gc", "--apply", "--grace", "0"),
            ]
        )

    def _start(self, words: tuple[str, ...]) -> Attempt:
        if words[0] == "rm":
            self.condemned.add(words[1])
        process = subprocess.Popen(
            [COMMAND, *words, "--json"],
            cwd=self.shell.home,
            env=self.shell.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # The last part of a run is where the store is used; the first is Python starting.
        moment = self.rng.uniform(0.3, 1.15) * self.durations.get(words[0], 0.5)
        return Attempt(words, process, time.monotonic() + moment)

    def _end(self, attempt: Attempt) -> None:
        started = time.monotonic()
        try:
            out, _ = attempt.process.communicate(timeout=max(0.0, attempt.kill_at - time.monotonic()))
            attempt.answer = json.loads(out)
            self.survivors += 1
            self._note(attempt.words, attempt.answer)
        except subprocess.TimeoutExpired:
            attempt.process.send_signal(signal.SIGKILL)
            out, _ = attempt.process.communicate(timeout=WAIT_S)
            attempt.killed = attempt.process.returncode == -signal.SIGKILL
            self.kills += attempt.killed
            if not attempt.killed:
                self._note(attempt.words, json.loads(out))
        took = time.monotonic() - started
        known = self.durations.get(attempt.words[0], 0.5)
        # Killed too soon every time, a command would never be met at its work: aim later then, and back when it ended.
        self.durations[attempt.words[0]] = (
            min(3.0, known * 1.05) if attempt.killed else max(0.2, min(known, took + 0.3))
        )

    def _note(self, words: tuple[str, ...], answer: dict[str, Any]) -> None:
        """Remember what was acknowledged."""
        if words[0] == "push" and "error" not in answer:
            self.pushed[f"{words[2]}@{answer['version']}"] = answer["digest"]

    def _require_completed(self, words: tuple[str, ...], done: "subprocess.CompletedProcess[str]") -> None:
        # What was never there cannot be tagged or deleted; all else must end well.
        allowed = {"push": {0}, "gc": {0}, "tag": {0, 3}, "rm": {0, 3, 4}}[words[0]]
        assert done.returncode in allowed, (words, done.returncode, done.stdout, done.stderr)

    def _look(self) -> None:
        """Nothing is damaged, and every version that was acknowledged is there, verified, unless it was deleted."""
        report = check(self.store, Depth(utc_now(), deep=True), workers=1)
        assert not report.damaged, report.findings
        registry = Registry(self.store)
        for text, digest in self.pushed.items():
            try:
                resolved = registry.resolve(AdapterRef.parse(text))
            except AdapterNotFoundError:
                assert text in self.condemned, f"{text} is lost"
                continue
            assert registry.verify(resolved, self.policy).digest == digest, f"{text} changed"


def run(place: Path, *, kills: int, seed: int) -> Household:
    """Kill the command so many times; return what happened."""
    household = Household.build(place, seed)
    rounds = 0
    while household.kills < kills:
        household.round()
        rounds += 1
        assert rounds < 20 * kills + 20, f"seed {seed}: the commands cannot be killed"
    household.finish()
    return household
