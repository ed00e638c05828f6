"""References: how an adapter, a version or a tag is written, and nothing else.

```
acme/orders                      the newest committed version
acme/orders@prod                 the version the tag `prod` points to
acme/orders@3                    version 3
acme/orders@1.2.0-rc.1           version 1.2.0-rc.1 (Semantic Versioning 2.0.0, without build metadata)
acme/orders@sha256:<64 hex>      the version whose manifest has this digest
```

Laws: `AdapterRef.parse(str(ref)) == ref`; no name can hold a path separator, `..`, a NUL or an upper-case letter, so
names may be used to build keys and paths. A tag begins with a letter and a version with a digit, so that neither can
be read as the other. `version_order` is a total order: semver precedence, an integer N standing just before N.0.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from .errors import InvalidReferenceError

NAME_LENGTH_MAX: Final = 64
"""Longest tenant, adapter or tag name, in characters."""

VERSION_MAX: Final = 999_999_999
"""Largest version number, and largest number within a semantic version."""

VERSION_LENGTH_MAX: Final = 64
"""Longest semantic version, in characters."""

Version = int | str
"""A version's name: a whole number of 1 to VERSION_MAX, or a semantic version as text."""

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_TAG = re.compile(r"[a-z](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_PART = r"(?:0|[1-9][0-9]{0,8})"
_IDENTIFIER = rf"(?:{_PART}|[0-9]*[a-z-][0-9a-z-]*)"
# Build metadata is left out: semver gives it no precedence, so two versions would be equal and yet differ.
_SEMVER = re.compile(
    rf"(?P<major>{_PART})\.(?P<minor>{_PART})\.(?P<patch>{_PART})"
    rf"(?:-(?P<pre>{_IDENTIFIER}(?:\.{_IDENTIFIER})*))?(?<!-)"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME_RULE = (
    f"use 1 to {NAME_LENGTH_MAX} of a-z 0-9 . _ - , beginning and ending with a letter or digit, without '..'"
)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A checked reference: tenant, adapter and at most one of tag, version, digest."""

    tenant: str
    adapter: str
    tag: str | None = None
    version: Version | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        check_name("tenant", self.tenant)
        check_name("adapter", self.adapter)
        if sum(selector is not None for selector in (self.tag, self.version, self.digest)) > 1:
            raise InvalidReferenceError(
                f"{self.name} is given more than one of tag, version and digest; keep one."
            )
        if self.tag is not None:
            check_tag(self.tag)
        if self.version is not None:
            check_version(self.version)
        if self.digest is not None:
            check_digest(self.digest)

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Return the reference written as `tenant/adapter`, optionally followed by `@tag`, `@version` or `@digest`.

        Raises:
            InvalidReferenceError: the text does not follow the grammar.
        """
        path, at, selector = text.partition("@")
        tenant, slash, adapter = path.partition("/")
        if not slash or (at and not selector):
            raise InvalidReferenceError(
                f"{_shown(text)} is not a reference; write tenant/adapter, tenant/adapter@tag, "
                "tenant/adapter@3 or tenant/adapter@sha256:<digest>."
            )
        if not at:
            return cls(tenant, adapter)
        if selector.startswith("sha256:"):
            return cls(tenant, adapter, digest=selector)
        if selector[0].isdigit():
            return cls(tenant, adapter, version=parse_version(selector))
        return cls(tenant, adapter, tag=selector)

    @property
    def name(self) -> str:
        """`tenant/adapter`, without selector."""
        return f"{self.tenant}/{self.adapter}"

    def __str__(self) -> str:
        selector = self.tag or self.digest or self.version
        return self.name if selector is None else f"{self.name}@{selector}"


def check_name(kind: str, name: str) -> None:
    """Raise InvalidReferenceError when `name` may not name a tenant or an adapter (`kind` says which)."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidReferenceError(f"{kind} name {_shown(name)} is not allowed; {_NAME_RULE}.")


def check_tag(tag: str) -> None:
    """Raise InvalidReferenceError when `tag` may not be a tag."""
    if not _TAG.fullmatch(tag) or ".." in tag:
        raise InvalidReferenceError(
            f"tag {_shown(tag)} is not allowed; begin with a letter and {_NAME_RULE}."
        )


def parse_version(text: str) -> Version:
    """Return the version written as `3` or `1.2.0-rc.1`; `str()` of the result is `text` again.

    Raises:
        InvalidReferenceError: the text is neither.
    """
    if _NUMBER.fullmatch(text):
        return int(text)
    check_version(text)
    return text


def check_version(version: Version) -> None:
    """Raise InvalidReferenceError when `version` is neither within 1..VERSION_MAX nor a semantic version.

    Semantic versions are those of https://semver.org (2.0.0) in lower case, without build metadata, of at most
    VERSION_LENGTH_MAX characters.
    """
    if isinstance(version, str):
        if len(version) > VERSION_LENGTH_MAX or not _SEMVER.fullmatch(version):
            raise InvalidReferenceError(
                f"version {_shown(version)} is neither a whole number without leading zero nor a semantic version "
                "like 1.2.0 or 1.2.0-rc.1."
            )
    elif isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION_MAX:
        raise InvalidReferenceError(f"version {_shown(str(version))} is not within 1 to {VERSION_MAX}.")


def version_order(version: Version) -> tuple[object, ...]:
    """Return a sort key: semver precedence (section 11 of the specification), N just before N.0.0-… and N.0.0."""
    if isinstance(version, int):
        return (version, 0, 0, -1, ())
    match = _SEMVER.fullmatch(version)
    if match is None:
        raise InvalidReferenceError(f"version {_shown(version)} is not a semantic version.")
    numbers = tuple(int(match[name]) for name in ("major", "minor", "patch"))
    if match["pre"] is None:
        return (*numbers, 1, ())
    # Numeric identifiers sort below others and by value; a longer list sorts above its own beginning.
    identifiers = tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in match["pre"].split(".")
    )
    return (*numbers, 0, identifiers)


def check_digest(digest: str) -> None:
    """Raise InvalidReferenceError when `digest` is not `sha256:` and 64 lower-case hex digits."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidReferenceError(
            f"digest {_shown(digest)} is not sha256: followed by 64 lower-case hex digits."
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
