"""References: how an adapter, a version or a tag is written, and nothing else.

```
acme/orders                      the newest committed version
acme/orders@prod                 the version the tag `prod` points to
acme/orders@3                    version 3
acme/orders@sha256:<64 hex>      the version whose manifest has this digest
```

Laws: `AdapterRef.parse(str(ref)) == ref`; no name can hold a path separator, `..`, a NUL or an upper-case letter, so
names may be used to build keys and paths. A tag begins with a letter, so that it can never be read as a version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from .errors import InvalidReferenceError

NAME_LENGTH_MAX: Final = 64
"""Longest tenant, adapter or tag name, in characters."""

VERSION_MAX: Final = 999_999_999
"""Largest version number."""

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_TAG = re.compile(r"[a-z](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
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
    version: int | None = None
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
            if not _VERSION.fullmatch(selector):
                raise InvalidReferenceError(
                    f"version {_shown(selector)} is not a whole number without leading zero."
                )
            return cls(tenant, adapter, version=int(selector))
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


def check_version(version: int) -> None:
    """Raise InvalidReferenceError when `version` is not within 1..VERSION_MAX."""
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION_MAX:
        raise InvalidReferenceError(f"version {_shown(str(version))} is not within 1 to {VERSION_MAX}.")


def check_digest(digest: str) -> None:
    """Raise InvalidReferenceError when `digest` is not `sha256:` and 64 lower-case hex digits."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidReferenceError(
            f"digest {_shown(digest)} is not sha256: followed by 64 lower-case hex digits."
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
