"""Calls split between an adapter's tags while the server runs, and canaries that are rolled back by themselves.

        weight from the split                 worse than the stable version (judge)
    ──────────────────────▶ SHARING ─────────────────────────────────────▶ ROLLED BACK
                               ▲   the tag moves to another version, or an admin resumes   │
                               └───────────────────────────────────────────────────────────┘

Promises: a canary that cannot be resolved or brought in never fails a call: the stable version answers, and the failure
counts against the canary, unless it is the storage's; a tag that is not set gets no calls, and is looked for again
after `absent_s`; one that was rolled back gets none until its tag moves or an admin resumes it. Every server judges by
the calls it has seen itself, and forgets at a restart. Promoting a canary is moving the signed stable tag, which takes
a key that no server holds.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from loraplex_registry.errors import RegistryError, StoreUnavailableError
from loraplex_registry.refs import AdapterRef
from loraplex_server.adapters.versions import AdapterVersion
from loraplex_server.errors import AdapterNotReadyError, NotFoundError, RequestError
from loraplex_server.rollout.judge import Limits, Sample, Window, median, verdict
from loraplex_server.rollout.splits import Split, Splits, Target

_log = logging.getLogger(__name__)

VERSIONS_MAX: Final = 4096
"""Most versions whose calls are remembered; beyond it those called longest ago are forgotten."""

_K = TypeVar("_K")
_V = TypeVar("_V")
_REPLACED: Final = (
    RegistryError,
    AdapterNotReadyError,
    NotFoundError,
)  # for which the stable version is tried

Resolve = Callable[[AdapterRef], Awaitable[AdapterVersion]]


class RolloutEvents(Protocol):
    """What rollouts tell."""

    def canary_call(self, outcome: str) -> None:
        """A canary was chosen for a call that "completed", "failed", or was "replaced" by the stable version."""

    def canary_rolled_back(self) -> None:
        """A canary lost its share."""


@dataclass
class _Arm:
    """One version under one tag."""

    window: Window = field(default_factory=Window)
    rolled_back: str = ""


@dataclass(frozen=True, kw_only=True)
class ArmStatus:
    """One tag of a split as seen from outside; see Rollout in adapters.proto."""

    tag: str
    digest: str
    weight: int
    share: float
    completed: int
    failed: int
    first_token_s: float
    token_s: float
    rolled_back: str


class Pick:
    """The version that answers one call, and what becomes of it."""

    def __init__(
        self,
        rollouts: "Rollouts",
        resolve: Resolve,
        *,
        ref: AdapterRef,
        version: AdapterVersion,
        split: Split | None = None,
    ) -> None:
        self.version = version
        self._rollouts, self._resolve, self._ref, self._split = rollouts, resolve, ref, split

    @property
    def tag(self) -> str:
        """The tag that answers, where calls are split; else ""."""
        return (self._ref.tag or "") if self._split else ""

    async def instead(self, error: Exception) -> bool:
        """Take the stable version because this one could not be brought in; False when there is no other."""
        split = self._split
        if split is None or self.tag == split.stable or not isinstance(error, _REPLACED):
            return False
        self._rollouts.failed(self, error, replaced=True)
        stable = AdapterRef(self._ref.tenant, self._ref.adapter, tag=split.stable)
        self._ref, self.version = stable, await self._resolve(stable)
        return True

    def completed(self, *, first_token_s: float, token_s: float | None) -> None:
        """The call ended well; seconds to the first token, and per token after it."""
        if self._split is not None:
            self._rollouts.completed(self, first_token_s=first_token_s, token_s=token_s)

    def failed(self, error: BaseException) -> None:
        """The call ended in an error; counts when it may be the version's fault."""
        if self._split is not None:
            self._rollouts.failed(self, error, replaced=False)

    def is_canary(self) -> bool:
        """Whether another tag than the stable one answers."""
        return self._split is not None and self.tag != self._split.stable

    @property
    def split(self) -> Split:
        """The split of the call; only where there is one."""
        assert self._split is not None
        return self._split


class Rollouts:
    """See the module. All state belongs to one event loop."""

    def __init__(
        self,
        splits: Callable[[], Splits],
        limits: Limits,
        *,
        absent_s: float,
        events: RolloutEvents,
        clock: Callable[[], float],
    ) -> None:
        """Begin with nothing seen.

        Args:
            splits: returns the operator's splits as they are now.
            limits: how much worse a canary may be.
            absent_s: seconds for which a tag that is not set is not looked for again.
            events: is told of what happens.
            clock: seconds that never go back.
        """
        self._splits = splits
        self._limits = limits
        self._absent_s = absent_s
        self._events = events
        self._clock = clock
        self._arms: OrderedDict[tuple[str, str, str], _Arm] = OrderedDict()  # by adapter, tag and digest
        self._digests: OrderedDict[tuple[str, str], str] = OrderedDict()  # what a tag was last seen to mean
        self._absent: OrderedDict[tuple[str, str], float] = OrderedDict()  # tags that were not set, and when

    async def pick(self, target: Target, resolve: Resolve, *, session: str) -> Pick:
        """Return the version that answers a call.

        Args:
            target: what was asked for.
            resolve: turns a reference into a version the caller may use.
            session: calls of one session get the same tag, while it may have calls at all.

        Raises:
            NotFoundError, RegistryError: the stable version cannot be resolved; as `resolve` has it.
        """
        split = self._splits().for_call(target)
        if split is None:
            return Pick(self, resolve, ref=target.ref, version=await resolve(target.ref))
        out = {tag for tag, _ in split.weights if self._is_absent(target.ref.name, tag)}
        while True:
            tag = split.choose(f"{target.ref.name}\0{session}", without=out)
            ref = AdapterRef(target.ref.tenant, target.ref.adapter, tag=tag)
            try:
                version = await resolve(ref)
            except _REPLACED as error:
                if tag == split.stable:
                    raise
                self._unresolved(ref, error)
            else:
                _keep(self._digests, (ref.name, tag), version.digest)
                if tag == split.stable or not self._arm(ref, version.digest).rolled_back:
                    return Pick(self, resolve, ref=ref, version=version, split=split)
            out.add(tag)

    def completed(self, pick: Pick, *, first_token_s: float, token_s: float | None) -> None:
        """Count a call that ended well."""
        self._count(pick, Sample(self._clock(), False, first_token_s, token_s), "completed")

    def failed(self, pick: Pick, error: BaseException, *, replaced: bool) -> None:
        """Count a call that failed, or would have if the stable version had not answered."""
        if _is_its_fault(error):
            self._count(pick, Sample(self._clock(), True), "replaced" if replaced else "failed")

    def resume(self, ref: AdapterRef) -> None:
        """Give every tag of an adapter its share again, and begin to judge afresh."""
        for name, tag, digest in list(self._arms):
            if name == ref.name and self._arms[name, tag, digest].rolled_back:
                self._arms[name, tag, digest] = _Arm()

    async def status(self, ref: AdapterRef, resolve: Resolve) -> list[ArmStatus]:
        """Return the tags of an adapter's split, the stable one first; none where it is not split.

        Raises:
            NotFoundError, RegistryError: the stable version cannot be resolved.
        """
        split = self._splits().of(ref)
        if split is None:
            await resolve(ref)
            return []
        refs = [AdapterRef(ref.tenant, ref.adapter, tag=tag) for tag, _ in split.weights]
        found = await asyncio.gather(*map(resolve, refs), return_exceptions=True)
        if isinstance(found[0], BaseException):
            raise found[0]
        digests = ["" if isinstance(one, BaseException) else one.digest for one in found]
        arms = [
            self._arm(ref, digest) if digest else _Arm() for ref, digest in zip(refs, digests, strict=True)
        ]
        shares = _shares(
            split, [bool(digest) and not arm.rolled_back for digest, arm in zip(digests, arms, strict=True)]
        )
        return [
            self._status(tag, weight, digest, arm, share)
            for (tag, weight), digest, arm, share in zip(split.weights, digests, arms, shares, strict=True)
        ]

    def _status(self, tag: str, weight: int, digest: str, arm: _Arm, share: float) -> ArmStatus:
        arm.window.forget(self._clock() - self._limits.window_s)
        return ArmStatus(
            tag=tag,
            digest=digest,
            weight=weight,
            share=share,
            completed=len(arm.window.samples) - arm.window.failed,
            failed=arm.window.failed,
            first_token_s=median(arm.window.first_tokens()),
            token_s=median(arm.window.tokens()),
            rolled_back=arm.rolled_back,
        )

    def _unresolved(self, ref: AdapterRef, error: Exception) -> None:
        """Note a tag that is not set; one that cannot be resolved counts against the version it last meant."""
        key = (ref.name, ref.tag or "")
        if isinstance(error, NotFoundError):
            _keep(self._absent, key, self._clock())
        elif key in self._digests and _is_its_fault(error):
            self._events.canary_call("replaced")
            self._arm(ref, self._digests[key]).window.add(Sample(self._clock(), True))

    def _is_absent(self, name: str, tag: str) -> bool:
        found = self._absent.get((name, tag))
        return found is not None and self._clock() - found < self._absent_s

    def _count(self, pick: Pick, sample: Sample, outcome: str) -> None:
        version, ref = pick.version, AdapterRef(pick.version.tenant, pick.version.adapter, tag=pick.tag)
        arm = self._arm(ref, version.digest)
        arm.window.add(sample)
        if pick.is_canary():
            self._events.canary_call(outcome)
            self._judge(pick, ref, arm)

    def _judge(self, pick: Pick, ref: AdapterRef, arm: _Arm) -> None:
        stable_ref = AdapterRef(ref.tenant, ref.adapter, tag=pick.split.stable)
        stable_digest = self._digests.get((ref.name, pick.split.stable), "")
        if arm.rolled_back or stable_digest == pick.version.digest:
            return  # a promoted canary is the stable version: there is nothing better to go back to
        stable = self._arm(stable_ref, stable_digest)
        for window in (arm.window, stable.window):
            window.forget(self._clock() - self._limits.window_s)
        arm.rolled_back = verdict(stable.window, arm.window, self._limits)
        if arm.rolled_back:
            self._events.canary_rolled_back()
            _log.warning("%s (%s) is rolled back: %s", ref, pick.version.digest, arm.rolled_back)

    def _arm(self, ref: AdapterRef, digest: str) -> _Arm:
        key = (ref.name, ref.tag or "", digest)
        return _keep(self._arms, key, self._arms.get(key) or _Arm())


def _keep(found: "OrderedDict[_K, _V]", key: _K, value: _V) -> _V:
    """Put a value in as the newest, dropping the oldest beyond VERSIONS_MAX."""
    found[key] = value
    found.move_to_end(key)
    while len(found) > VERSIONS_MAX:
        found.popitem(last=False)
    return value


def _is_its_fault(error: BaseException) -> bool:
    """Whether an error may come from the version: not what the caller did, the storage, or the engine's end."""
    if isinstance(error, asyncio.CancelledError | RequestError | StoreUnavailableError):
        return False
    return isinstance(error, RegistryError | AdapterNotReadyError | TimeoutError) or not hasattr(
        error, "code"
    )


def _shares(split: Split, able: list[bool]) -> list[float]:
    weights = [weight if ok else 0 for (_, weight), ok in zip(split.weights, able, strict=True)]
    total = sum(weights)
    if not total:
        return [1.0, *([0.0] * (len(weights) - 1))]
    return [weight / total for weight in weights]
