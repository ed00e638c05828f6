"""How calls are split between tags: `prod=95,canary=5`, the stable tag first. Pure.

A call's session decides its tag by weighted rendezvous hashing (Schindelhauer and Schomaker, "Weighted distributed hash
tables", SPAA 2005): each tag draws a number from the session's name, and the best draw by weight wins.

Laws: the same session gets the same tag, on every server; each tag gets its share of sessions; a weight that grows only
moves sessions to its tag, and one that shrinks only moves sessions away from it; `Split.parse(str(split)) == split`.
"""

import hashlib
import math
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex_registry.errors import InvalidReferenceError
from loraplex_registry.refs import AdapterRef, check_name, check_tag
from loraplex_server.errors import ConfigError

TAGS_MAX: Final = 8
"""Most tags of one split."""

WEIGHT_MAX: Final = 1_000_000
"""Greatest weight of a tag."""

_WEIGHT = re.compile(r"0|[1-9][0-9]{0,6}")


@dataclass(frozen=True)
class Split:
    """Tags with their weights of 0 to WEIGHT_MAX, one of them above 0. The first tag is the stable one."""

    weights: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        tags = [tag for tag, _ in self.weights]
        if not 1 <= len(tags) <= TAGS_MAX or len(set(tags)) != len(tags):
            raise InvalidReferenceError(f"A split names 1 to {TAGS_MAX} different tags.")
        for tag in tags:
            check_tag(tag)
        if not all(0 <= weight <= WEIGHT_MAX for _, weight in self.weights) or not self.total:
            raise InvalidReferenceError(f"Weights are 0 to {WEIGHT_MAX}, and one of them is above 0.")

    @classmethod
    def parse(cls, text: str) -> "Split":
        """Return the split written as `prod=95,canary=5`.

        Raises:
            InvalidReferenceError: it is not written so.
        """
        weights = []
        for part in text.split(",", TAGS_MAX):
            tag, equals, weight = part.strip().partition("=")
            if not equals or not _WEIGHT.fullmatch(weight):
                raise InvalidReferenceError(
                    f"{text[:80]!r} is not a split; write tags with whole weights, such as prod=95,canary=5."
                )
            weights.append((tag, int(weight)))
        return cls(tuple(weights))

    @property
    def stable(self) -> str:
        """The first tag: what the others are measured against, and what answers where they cannot."""
        return self.weights[0][0]

    @property
    def total(self) -> int:
        """Sum of the weights."""
        return sum(weight for _, weight in self.weights)

    def choose(self, session: str, *, without: Collection[str] = ()) -> str:
        """Return the tag of a session.

        Args:
            session: of any length; the adapter's name belongs into it, so that adapters are split independently.
            without: tags that get nothing; the stable one gets what would be nobody's.
        """
        able = [(tag, weight) for tag, weight in self.weights if weight and tag not in without]
        if not able:
            return self.stable
        return max(able, key=lambda arm: arm[1] / -math.log(_draw(session, arm[0])))[0]

    def __str__(self) -> str:
        return ",".join(f"{tag}={weight}" for tag, weight in self.weights)


@dataclass(frozen=True)
class Target:
    """What a caller asked for: an adapter, as it stands or split between its tags. `ref` has no tag with a split."""

    ref: AdapterRef
    split: Split | None = None

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Return the reference, or the split written as `tenant/adapter@prod=95,canary=5`.

        Raises:
            InvalidReferenceError: it is neither.
        """
        path, _, selector = text.partition("@")
        if "=" not in selector:
            return cls(AdapterRef.parse(text))
        return cls(AdapterRef.parse(path), Split.parse(selector))

    def __str__(self) -> str:
        return str(self.ref) if self.split is None else f"{self.ref.name}@{self.split}"


class Splits:
    """The operator's splits: of one adapter, of a tenant's adapters, of all.

    They count for calls that name the stable tag, `tenant/adapter@prod`; a call for a version, a digest or another tag
    is never split.
    """

    def __init__(self, by_name: Mapping[str, Split]) -> None:
        self._by_name = by_name

    @classmethod
    def parse(cls, body: bytes, *, origin: Path) -> "Splits":
        """Read a file of `"tenant/adapter" = "prod=95,canary=5"` lines; also `"tenant/*"` and `"*"`.

        Raises:
            ConfigError: it is not TOML of that form; names the line's key and the file.
        """
        try:
            document = tomllib.loads(body.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{origin}: not valid TOML: {error}") from error
        by_name = {}
        for name, text in document.items():
            try:
                _check_scope(name)
                by_name[name] = Split.parse(text if isinstance(text, str) else repr(text))
            except InvalidReferenceError as error:
                raise ConfigError(f"{origin}: {name!r}: {error.message}") from error
        return cls(by_name)

    def of(self, ref: AdapterRef) -> Split | None:
        """Return the split of an adapter; None when it has none. The closest name counts."""
        for name in (ref.name, f"{ref.tenant}/*", "*"):
            if name in self._by_name:
                return self._by_name[name]
        return None

    def for_call(self, target: Target) -> Split | None:
        """Return how one call is split; None when it is not."""
        if target.split is not None or target.ref.tag is None:
            return target.split
        split = self.of(target.ref)
        return split if split is not None and split.stable == target.ref.tag else None


def _check_scope(name: str) -> None:
    tenant, slash, adapter = name.partition("/")
    if name != "*":
        check_name("tenant", tenant)
        if not slash:
            raise InvalidReferenceError('write "tenant/adapter", "tenant/*" or "*".')
        if adapter != "*":
            check_name("adapter", adapter)


def _draw(session: str, tag: str) -> float:
    """Return a number above 0 and below 1 that follows from both names and from nothing else."""
    digest = hashlib.sha256(f"{tag}\0{session}".encode(errors="surrogatepass")).digest()
    return (int.from_bytes(digest[:6]) + 0.5) / 2**48
