"""Reading a trust policy: one TOML file, every key known, or no policy at all.

```toml
version = 1
default = "deny"

[[rules]]
scope = "acme/**"                       # acme/orders, acme/ord*, acme/**, **: the longest match decides alone
keys = [{ path = "acme.pub", keyid = "…", from = 2026-01-01, to = 2027-01-01 }]     # who signs adapters
certificates = [{ roots = ["root.pem"], san = "ci@acme.example" }]               # or holds such a certificate
keyless = [{ trusted_root = "root.json", identity = "ci@acme.example", issuer = "https://issuer.example" }]
algorithms = ["ecdsa-p256"]             # of all keys; default ecdsa-p256 for adapters, any known one for the rest
taggers = [{ path = "release.pub" }]    # who signs tags; default: keys
revokers = [{ path = "security.pub" }]  # who signs the revocation list; default: nobody
tags = { prod = { threshold = 2, taggers = [{ path = "a.pub" }, { path = "b.pub" }], max_age = "30d" } }
encryption = "required"                 # or "forbidden"; default "optional"
limits = { max_rank = 64, max_bytes = 536870912, bases = ["sha256:…"], min_version = 3 }
revocation = { max_age = "1h", on_stale = "refuse" }    # a list is demanded; "warn" accepts and says so
attestations = [{ type = "https://slsa.dev/provenance/v1", keys = [{ path = "ci.pub" }], builder = "https://…" }]
mode = "enforce"                        # "audit": accept and report what would have been refused
```

Paths are relative to the file. Everything is read once; nothing is looked up later.
"""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from ..errors import InvalidReferenceError, PolicyRefusedError, SettingsError
from ..refs import check_digest, check_name, check_tag, check_version
from ..signing import ALGORITHMS, PublicKey, load_public_key
from .policy import (
    ANY_TAG,
    AttestationRule,
    PolicyLimits,
    RevocationRule,
    Rule,
    TagRule,
    TrustedAuthority,
    TrustedKey,
    TrustPolicy,
)

POLICY_BYTES_MAX: Final = 1 << 20
"""Longest policy file, in bytes (1 MiB)."""

RULES_MAX: Final = 100_000
"""Most rules in a policy."""

ENTRIES_MAX: Final = 64
"""Most entries of one list of a rule (keys, taggers, tags, ...)."""

_PREFIX = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RULE_KEYS: Final = (
    "scope", "keys", "certificates", "keyless", "algorithms", "taggers", "revokers", "tags", "encryption", "limits",
    "revocation", "attestations", "mode", "threshold",
)  # fmt: skip
_Item = TypeVar("_Item")


class _PolicyError(ValueError):
    """A sentence about what is wrong with the file."""


def read_policy(path: Path) -> TrustPolicy:
    """Read a policy file and every file it names.

    Raises:
        PolicyRefusedError: absent, damaged, an unknown key (the nearest is named), a value out of shape, a key file
            that cannot be read. There is no fallback: without a policy nothing is trusted.
    """
    try:
        with path.open("rb") as file:
            body = file.read(POLICY_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise PolicyRefusedError(
            f"Trust policy {path} is not there, and nothing is trusted without one; `registry init --tenant NAME` "
            "makes one, and --policy or the setting policy names another."
        ) from error
    except OSError as error:
        raise PolicyRefusedError(
            f"Trust policy {path} cannot be opened ({error.strerror}); nothing is trusted without one."
        ) from error
    try:
        return _from_toml(body, path.parent)
    except (_PolicyError, SettingsError, InvalidReferenceError) as error:
        raise PolicyRefusedError(f"Trust policy {path}: {error}") from error


def seconds(text: object) -> int | None:
    """Return the seconds written like "90s", "15m", "1h" or "30d"; None when it is nothing like that."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    return None if match is None else int(match[1]) * _SECONDS[match[2]]


def _from_toml(body: bytes, directory: Path) -> TrustPolicy:
    if len(body) > POLICY_BYTES_MAX:
        raise _PolicyError(f"is longer than {POLICY_BYTES_MAX} bytes.")
    try:
        table = tomllib.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _PolicyError(f"is not TOML ({error}); correct it there.") from error
    _known(table, ("version", "default", "rules"), "the policy")
    if type(table.get("version")) is not int or table["version"] != 1 or table.get("default") != "deny":
        raise _PolicyError('must say version = 1 and default = "deny".')
    entries = _tables(table.get("rules", []), "rules", most=RULES_MAX)
    keys = _KeyFiles(directory)
    rules = tuple(_RuleReader(entry, keys).rule() for entry in entries)
    if len({rule.scope for rule in rules}) != len(rules):
        raise _PolicyError("has two rules with the same scope; exactly one rule may decide.")
    return TrustPolicy(rules, "sha256:" + hashlib.sha256(body).hexdigest())


@dataclass
class _KeyFiles:
    """Key files named by the policy, each read once however many rules name it."""

    directory: Path
    _keys: dict[str, PublicKey] = field(default_factory=dict)

    def key(self, path: str) -> PublicKey:
        if path not in self._keys:
            self._keys[path] = load_public_key(self.directory / path)
        return self._keys[path]


class _RuleReader:
    """Reads one `[[rules]]` table; every message begins with the rule's scope."""

    def __init__(self, entry: dict[str, Any], files: _KeyFiles) -> None:
        _known(entry, _RULE_KEYS, "a rule")
        self._entry = entry
        self._files = files
        self._scope = _scope(entry.get("scope"))
        self._where = f"rule {self._scope!r}"

    def rule(self) -> Rule:
        """Return the rule."""
        if type(self._entry.get("threshold", 1)) is not int or self._entry.get("threshold", 1) != 1:
            raise self._error("threshold must be 1: an adapter has one signature; set it for tags.")
        adapter_kinds, other_kinds = self._algorithms()
        keys = self._keys(self._entry.get("keys", []), "keys", adapter_kinds)
        authorities = self._each("certificates", self._authority) + self._each("keyless", self._identity)
        if not keys and not authorities:
            raise self._error("list at least one key, certificate authority or keyless identity.")
        taggers = keys
        if "taggers" in self._entry:
            taggers = self._keys(self._entry["taggers"], "taggers", other_kinds)
        return Rule(
            scope=self._scope,
            keys=keys,
            limits=self._limits(),
            taggers=taggers,
            revokers=self._keys(self._entry.get("revokers", []), "revokers", other_kinds),
            tags=self._tags(taggers, other_kinds),
            encryption=self._choice("encryption", ("optional", "required", "forbidden")),
            revocation=self._revocation(),
            attestations=self._each("attestations", lambda item: self._attestation(item, other_kinds)),
            mode=self._choice("mode", ("enforce", "audit")),
            authorities=authorities,
        )

    def _algorithms(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the kinds of keys allowed for adapters and for everything else.

        Every Model Signing verifier reads P-256, and Ed25519 is not in its registry at all: so that alone is the
        default for adapters, while statements only we read may have any key we know.
        """
        if "algorithms" not in self._entry:
            return ALGORITHMS[:1], ALGORITHMS
        named = self._entry["algorithms"]
        if not isinstance(named, list) or not named or not all(name in ALGORITHMS for name in named):
            raise self._error(f"algorithms must be among {', '.join(ALGORITHMS)}.")
        return tuple(named), tuple(named)

    def _keys(self, value: object, what: str, kinds: tuple[str, ...]) -> tuple[TrustedKey, ...]:
        keys = tuple(self._key(item, what, kinds) for item in self._tables(value, what))
        if len({trusted.key.keyid for trusted in keys}) != len(keys):
            raise self._error(f"{what} names a key twice.")
        return keys

    def _key(self, item: dict[str, Any], what: str, kinds: tuple[str, ...]) -> TrustedKey:
        _known(item, ("path", "keyid", "from", "to"), f"{what} of {self._where}")
        path = self._text(item, "path", what)
        key = self._files.key(path)
        if item.get("keyid", key.keyid) != key.keyid:
            raise self._error(f"{path} has key id {key.keyid}, not the one stated.")
        if key.algorithm not in kinds:
            raise self._error(f"{path} is {key.algorithm}; add it to algorithms of the rule to accept it.")
        valid_from, valid_to = self._dates(item)
        return TrustedKey(key, valid_from, valid_to, path)

    def _authority(self, item: dict[str, Any]) -> TrustedAuthority:
        from ..signing.certificates import CertificateAuthority

        _known(item, ("roots", "san", "from", "to"), f"certificates of {self._where}")
        roots = [self._files.directory / path for path in self._texts(item, "roots", "certificates")]
        san = self._text(item, "san", "certificates")
        return TrustedAuthority(CertificateAuthority.load(roots, san), *self._dates(item))

    def _identity(self, item: dict[str, Any]) -> TrustedAuthority:
        from ..signing.keyless import KeylessAuthority

        _known(item, ("trusted_root", "identity", "issuer", "from", "to"), f"keyless of {self._where}")
        root = self._files.directory / self._text(item, "trusted_root", "keyless")
        identity, issuer = (self._text(item, name, "keyless") for name in ("identity", "issuer"))
        return TrustedAuthority(KeylessAuthority.load(root, identity, issuer), *self._dates(item))

    def _attestation(self, item: dict[str, Any], kinds: tuple[str, ...]) -> AttestationRule:
        _known(item, ("type", "keys", "builder"), f"attestations of {self._where}")
        keys = self._keys(item.get("keys", []), "keys of an attestation", kinds)
        if not keys:
            raise self._error("an attestation lists no key that may sign it.")
        builder = self._text(item, "builder", "attestations") if "builder" in item else None
        return AttestationRule(self._text(item, "type", "attestations"), keys, builder)

    def _tags(
        self, taggers: tuple[TrustedKey, ...], kinds: tuple[str, ...]
    ) -> tuple[tuple[str, TagRule], ...]:
        table = self._table("tags")
        if len(table) > ENTRIES_MAX:
            raise self._error(f"tags has more than {ENTRIES_MAX} entries.")
        return tuple((name, self._tag(name, item, taggers, kinds)) for name, item in table.items())

    def _tag(
        self, name: str, item: object, taggers: tuple[TrustedKey, ...], kinds: tuple[str, ...]
    ) -> TagRule:
        if name != ANY_TAG:
            check_tag(name)
        if not isinstance(item, dict):
            raise self._error(f"tags: {name} is not a table.")
        _known(item, ("threshold", "taggers", "max_age"), f"tag {name} of {self._where}")
        own = self._keys(item["taggers"], f"taggers of tag {name}", kinds) if "taggers" in item else None
        threshold, available = item.get("threshold", 1), len(taggers if own is None else own)
        if type(threshold) is not int or not 1 <= threshold <= min(available, 8):
            raise self._error(
                f"tag {name}: threshold must be 1 to {min(available, 8)}, the number of its taggers (at most 8)."
            )
        return TagRule(threshold, own, self._seconds(item, "max_age") if "max_age" in item else None)

    def _revocation(self) -> RevocationRule | None:
        if "revocation" not in self._entry:
            return None
        table = self._table("revocation")
        _known(table, ("max_age", "on_stale"), f"revocation of {self._where}")
        if not self._entry.get("revokers"):
            raise self._error("revocation demands a list, and revokers names nobody who may sign one.")
        on_stale = table.get("on_stale", "refuse")
        if on_stale not in ("refuse", "warn"):
            raise self._error('revocation: on_stale is "refuse" or "warn".')
        return RevocationRule(self._seconds(table, "max_age"), on_stale)

    def _limits(self) -> PolicyLimits:
        table = self._table("limits")
        _known(table, ("max_rank", "max_bytes", "bases", "min_version"), f"limits of {self._where}")
        for key in ("max_rank", "max_bytes"):
            if key in table and (type(table[key]) is not int or table[key] < 1):
                raise self._error(f"{key} must be a whole number of 1 or more.")
        bases = table.get("bases")
        if bases is not None and (
            not isinstance(bases, list) or not all(isinstance(base, str) for base in bases)
        ):
            raise self._error("bases is a list of digests.")
        for base in bases or []:
            check_digest(base)
        least = table.get("min_version")
        if least is not None:
            if type(least) is not int and not isinstance(least, str):
                raise self._error('min_version is a version: 3 or "1.2.0".')
            check_version(least)
        return PolicyLimits(
            table.get("max_rank"), table.get("max_bytes"), None if bases is None else tuple(bases), least
        )

    def _dates(self, item: dict[str, Any]) -> tuple[dt.datetime | None, dt.datetime | None]:
        begin, end = self._moment(item.get("from")), self._moment(item.get("to"))
        if begin is not None and end is not None and end <= begin:
            raise self._error("to must be later than from.")
        return begin, end

    def _moment(self, value: object) -> dt.datetime | None:
        if value is None:
            return None
        if isinstance(value, dt.datetime):
            if value.tzinfo is None:
                raise self._error("a time needs its zone, as in 2026-01-01T00:00:00Z.")
            return value
        if isinstance(value, dt.date):
            return dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC)
        raise self._error("from and to are dates, written 2026-01-01 without quotes.")

    def _seconds(self, table: dict[str, Any], key: str) -> int:
        found = seconds(table.get(key))
        if found is None:
            raise self._error(f'{key} must be a time like "90s", "15m", "1h" or "30d".')
        return found

    def _choice(self, key: str, values: tuple[str, ...]) -> str:
        """The first value is the default."""
        value = self._entry.get(key, values[0])
        if value not in values:
            raise self._error(f"{key} is one of {', '.join(values)}.")
        return str(value)

    def _each(self, key: str, read: Callable[[dict[str, Any]], _Item]) -> tuple[_Item, ...]:
        return tuple(read(item) for item in self._tables(self._entry.get(key, []), key))

    def _table(self, key: str) -> dict[str, Any]:
        value = self._entry.get(key, {})
        if not isinstance(value, dict):
            raise self._error(f"{key} is not a table.")
        return value

    def _tables(self, value: object, what: str) -> list[dict[str, Any]]:
        return _tables(value, f"{self._where}: {what}", most=ENTRIES_MAX)

    def _text(self, item: dict[str, Any], key: str, what: str) -> str:
        value = item.get(key)
        if not isinstance(value, str) or not value or not value.isprintable():
            raise self._error(f"an entry of {what} has no {key}.")
        return value

    def _texts(self, item: dict[str, Any], key: str, what: str) -> tuple[str, ...]:
        values = item.get(key)
        if not isinstance(values, list) or not 0 < len(values) <= ENTRIES_MAX:
            raise self._error(f"an entry of {what} has no list of {key}.")
        return tuple(self._text({key: value}, key, what) for value in values)

    def _error(self, sentence: str) -> _PolicyError:
        return _PolicyError(f"{self._where}: {sentence}")


def _scope(scope: object) -> str:
    if not isinstance(scope, str):
        raise _PolicyError("a rule has no scope.")
    tenant, _, adapter = scope.partition("/")
    if scope == "**":
        return scope
    check_name("tenant", tenant)
    if adapter != "**" and not (adapter.endswith("*") and _PREFIX.fullmatch(adapter[:-1])):
        check_name("adapter", adapter)
    return scope


def _tables(value: object, what: str, *, most: int) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _PolicyError(f"{what} is not a list of tables.")
    if len(value) > most:
        raise _PolicyError(f"{what} has more than {most} entries.")
    return value


def _known(table: dict[str, Any], keys: Sequence[str], what: str) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise _PolicyError(f"{what} has the unknown key {key[:64]!r}{hint} Known are {', '.join(keys)}.")
