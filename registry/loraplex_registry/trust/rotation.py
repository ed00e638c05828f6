"""Rotating a signing key in a trust policy: the new key counts from now, the old one until a date.

The policy is a file people write, with comments and an order of their own, so it is not written anew: in every inline
table that names the old key's file, `to` is set, and an entry for the new key is put behind it. That covers every
role the old key has (adapters, tags, revocations, attestations). The result is read back before it replaces the file; a
policy written in another way is left alone, with a message that says what to add.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .. import durable
from ..errors import PolicyRefusedError, SettingsError, what_to_do
from ..signing.keys import PublicKey, load_public_key
from .policy import Rule, TrustedKey, TrustPolicy
from .policy_file import POLICY_BYTES_MAX

_INLINE_TABLE = re.compile(r"\{[^{}\n]*\bpath\b[^{}\n]*\}")
_ENTRY_KEYS: Final = frozenset({"path", "keyid", "from", "to"})
_BARE_STRING = re.compile(r'[^"\\\x00-\x1f\x7f]*')


@dataclass(frozen=True, slots=True)
class Rotation:
    """A policy's new text, the scopes in which the new key counts now, and until when the old one does."""

    text: str
    scopes: tuple[str, ...]
    old_until: dt.datetime


def rotated(
    policy: Path, old: PublicKey, new: PublicKey, new_path: Path, *, now: dt.datetime, until: dt.datetime
) -> Rotation:
    """Return a policy with a key rotated; nothing is written but a file for a moment, beside the policy.

    Args:
        policy: the policy file.
        old: the key to be dated.
        new: the key to be added.
        new_path: the new public key's file, which exists.
        now: when the new key begins to count, with a zone; cut to the second.
        until: when the old key ceases to count; an earlier date in the policy stays.

    Raises:
        SettingsError: the policy does not list the old key, or in a way that cannot be changed safely.
        PolicyRefusedError: the policy is damaged, or would be with the new key (its algorithm is not listed).
    """
    before = TrustPolicy.load(policy)
    if not any(_has(keys, old) for rule in before.rules for keys in _roles(rule)):
        raise SettingsError(
            f"Trust policy {policy} does not list key {old.keyid[:16]}…; add the new key by hand."
        )
    if any(_has(keys, new) for rule in before.rules for keys in _roles(rule)):
        raise SettingsError(
            f"Trust policy {policy} lists key {new.keyid[:16]}… already; rotate to a new key."
        )
    relative = os.path.relpath(new_path, policy.parent)
    text = _edited(_read(policy), policy.parent, old, relative, now=now, until=until)
    after = _load_text(policy, text)
    scopes = []
    for rule, changed in zip(before.rules, after.rules, strict=True):
        for keys, new_keys in zip(_roles(rule), _roles(changed), strict=True):
            if _has(keys, old) != _has(new_keys, new):
                raise SettingsError(
                    f"Trust policy {policy} lists the old key in a way that cannot be edited here; add "
                    f"{{ path = {_quoted(relative)} }} to rule {rule.scope!r} by hand."
                )
        if any(_has(keys, new) for keys in _roles(changed)):
            scopes.append(rule.scope)
    return Rotation(text, tuple(scopes), until)


def replace_text(path: Path, text: str) -> None:
    """Replace a file by one with another text, all at once, keeping its permissions.

    Raises:
        SettingsError: it cannot be written.
    """
    try:
        mode = path.stat().st_mode & 0o777
        durable.replace(path, text.encode("utf-8"), mode=mode)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}); {what_to_do(error)}.") from error


def _edited(
    text: str, directory: Path, old: PublicKey, new_path: str, *, now: dt.datetime, until: dt.datetime
) -> str:
    def change(match: re.Match[str]) -> str:
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        entry = _entry(match[0])
        if "#" in line or entry is None or not _names(directory / entry["path"], old):
            return match[0]
        entry["to"] = min(_moment(entry.get("to", until)), until)
        return f"{_written(entry)}, {_written({'path': new_path, 'from': now})}"

    return _INLINE_TABLE.sub(change, text)


def _entry(table: str) -> dict[str, Any] | None:
    """Return an inline table that is the entry of a key, None for any other text in braces."""
    try:
        value = tomllib.loads(f"entry = {table}")["entry"]
    except ValueError:
        return None
    known = isinstance(value, dict) and value.keys() <= _ENTRY_KEYS and isinstance(value.get("path"), str)
    return value if known else None


def _names(path: Path, key: PublicKey) -> bool:
    try:
        return load_public_key(path).keyid == key.keyid
    except SettingsError:
        return False


def _moment(value: dt.datetime | dt.date) -> dt.datetime:
    if isinstance(value, dt.datetime):
        return value
    return dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC)


def _written(entry: dict[str, Any]) -> str:
    parts = []
    for key in ("path", "keyid", "from", "to"):
        value = entry.get(key)
        if isinstance(value, dt.datetime):
            parts.append(f"{key} = {value.astimezone(dt.UTC):%Y-%m-%dT%H:%M:%SZ}")
        elif value is not None:
            parts.append(f"{key} = {value.isoformat() if isinstance(value, dt.date) else _quoted(value)}")
    return "{ " + ", ".join(parts) + " }"


def _quoted(text: str) -> str:
    if not _BARE_STRING.fullmatch(text):
        raise SettingsError(
            f"The path {text[:100]!r} cannot be written into a policy; choose a plainer name."
        )
    return f'"{text}"'


def _roles(rule: Rule) -> list[tuple[TrustedKey, ...]]:
    """Return the lists of keys of a rule, one for each role."""
    tags = [tag.taggers or () for _, tag in rule.tags]
    return [rule.keys, rule.taggers, rule.revokers, *tags, *(item.keys for item in rule.attestations)]


def _has(keys: tuple[TrustedKey, ...], key: PublicKey) -> bool:
    return any(trusted.key.keyid == key.keyid for trusted in keys)


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(POLICY_BYTES_MAX + 1).decode("utf-8")


def _load_text(policy: Path, text: str) -> TrustPolicy:
    """Read a policy's text as if it stood in the policy's place."""
    try:
        with durable.beside(policy, text.encode("utf-8")) as temporary:
            try:
                return TrustPolicy.load(temporary)
            except PolicyRefusedError as error:
                reason = error.message.replace(str(temporary), str(policy))
                raise PolicyRefusedError(f"With the new key the policy would be refused. {reason}") from error
    except OSError as error:
        raise SettingsError(
            f"{policy.parent} cannot be written ({error.strerror}); {what_to_do(error)}."
        ) from error
