"""The trust policy: whose signature counts for which adapter. Pure decisions; the files are read once, in `load`.

Rules, in the order they are applied by `verify`:

1. the longest scope that matches `tenant/adapter` decides alone; no scope, no trust (there is no default but deny);
2. the bundle must name a key that rule lists, be signed by it, and `now` must lie within the key's dates;
3. the manifest must be the signed one, and its tenant, adapter and version must be the ones asked for;
4. the signed files are exactly the manifest and the files it lists, and the record stores those;
5. a tag must be a statement signed under the same rule for the same digest;
6. the base digest, and the rule's limits on rank, bytes and bases.

`VerifiedManifest` can only be made here, so a function that takes one cannot be handed unverified bytes.
"""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .errors import (
    BaseMismatchError,
    DigestMismatchError,
    ExpiredError,
    InvalidReferenceError,
    PolicyRefusedError,
    RankTooLargeError,
    SettingsError,
    SignatureInvalidError,
)
from .lora_config import CONFIG_NAME
from .manifest import Manifest
from .record import CommittedRecord
from .refs import AdapterRef, check_digest, check_name
from .signing import ALGORITHMS, PublicKey, bundle_keyid, envelope_keyid, load_public_key, verify_bundle
from .tags import TagObject, verify_tag
from .weights import MANIFEST_NAME, WEIGHTS_NAME

POLICY_BYTES_MAX: Final = 1 << 20
"""Longest policy file, in bytes (1 MiB)."""

RULES_MAX: Final = 100_000
"""Most rules in a policy."""

_PREFIX = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PROOF = object()


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A public key with the dates it counts: from (inclusive) and to (exclusive), None for open."""

    key: PublicKey
    valid_from: dt.datetime | None = None
    valid_to: dt.datetime | None = None

    def check(self, now: dt.datetime) -> None:
        """Raise ExpiredError unless `now` lies within the dates."""
        if self.valid_from is not None and now < self.valid_from:
            raise ExpiredError(
                f"Key {self.key.keyid[:16]}… counts only from {self.valid_from:%Y-%m-%d}; see the policy."
            )
        if self.valid_to is not None and now >= self.valid_to:
            raise ExpiredError(
                f"Key {self.key.keyid[:16]}… counted until {self.valid_to:%Y-%m-%d}; sign again with a current key."
            )


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """What a rule allows beyond the signature; None means no limit of its own. `max_bytes` counts all files."""

    max_rank: int | None = None
    max_bytes: int | None = None
    bases: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One scope with its keys. Scopes: `acme/orders`, `acme/ord*`, `acme/**`, `**`."""

    scope: str
    keys: tuple[TrustedKey, ...]
    limits: PolicyLimits = field(default_factory=PolicyLimits)

    def specificity(self, name: str) -> tuple[bool, int] | None:
        """Return how closely the scope matches `tenant/adapter` (larger is closer), None when it does not."""
        literal = self.scope.rstrip("*")
        exact = literal == self.scope
        matches = name == literal if exact else name.startswith(literal)
        return (exact, len(literal)) if matches else None

    def key(self, keyid: str, *, name: str) -> TrustedKey:
        """Return the key with this id.

        Raises:
            SignatureInvalidError: the rule does not list it.
        """
        for trusted in self.keys:
            if trusted.key.keyid == keyid:
                return trusted
        raise SignatureInvalidError(
            f"{name} is signed with key {keyid[:16]}…, which the policy rule {self.scope!r} does not list; "
            "sign it with a listed key or add the key to the policy."
        )


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """A loaded policy: rules only, everything else is denied. `digest` names the file's bytes for caches and logs."""

    rules: tuple[Rule, ...]
    digest: str = ""

    @classmethod
    def load(cls, path: str | Path) -> TrustPolicy:
        """Read a policy file and the public keys it names (paths relative to the file).

        Raises:
            PolicyRefusedError: absent, damaged, an unknown key, a key file that cannot be read. There is no fallback.
        """
        place = Path(path)
        try:
            with place.open("rb") as file:
                body = file.read(POLICY_BYTES_MAX + 1)
        except OSError as error:
            raise PolicyRefusedError(
                f"Trust policy {place} cannot be opened ({error.strerror}); nothing is trusted without one."
            ) from error
        try:
            return cls._from_toml(body, place.parent)
        except (_PolicyError, SettingsError, InvalidReferenceError) as error:
            raise PolicyRefusedError(f"Trust policy {place}: {error}") from error

    @classmethod
    def _from_toml(cls, body: bytes, directory: Path) -> TrustPolicy:
        if len(body) > POLICY_BYTES_MAX:
            raise _PolicyError(f"is longer than {POLICY_BYTES_MAX} bytes.")
        try:
            table = tomllib.loads(body.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _PolicyError(f"is not TOML ({error}).") from error
        _known(table, {"version", "default", "rules"}, "the policy")
        if type(table.get("version")) is not int or table["version"] != 1 or table.get("default") != "deny":
            raise _PolicyError('must say version = 1 and default = "deny".')
        entries = _tables(table.get("rules", []), "rules")
        rules = tuple(_rule(entry, directory) for entry in entries[:RULES_MAX])
        scopes = [rule.scope for rule in rules]
        if len(set(scopes)) != len(entries):
            raise _PolicyError("has two rules with the same scope, or too many; exactly one rule may decide.")
        return cls(rules, "sha256:" + hashlib.sha256(body).hexdigest())

    def rule_for(self, tenant: str, adapter: str) -> Rule:
        """Return the one rule that decides about `tenant/adapter`.

        Raises:
            PolicyRefusedError: no rule covers it.
        """
        name = f"{tenant}/{adapter}"
        matches = [
            (closeness, rule) for rule in self.rules if (closeness := rule.specificity(name)) is not None
        ]
        if not matches:
            raise PolicyRefusedError(f"No rule of the trust policy covers {name}; add one for {tenant}/**.")
        return max(matches, key=lambda match: match[0])[1]


@dataclass(frozen=True, slots=True)
class VerifiedManifest:
    """Proof that a version may be used: made by `verify` alone.

    Attributes:
        ref: tenant, adapter and version (never a tag).
        manifest: the signed manifest.
        record: where its files are.
        keyid: id of the key that signed it.
        scope: the policy rule that decided.
        tag, tag_generation: the tag it was reached by, if any.
    """

    ref: AdapterRef
    manifest: Manifest
    record: CommittedRecord
    keyid: str
    scope: str
    tag: str | None = None
    tag_generation: int | None = None
    _proof: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self._proof is not _PROOF:
            raise TypeError("a VerifiedManifest is made by trust.verify only")

    @property
    def digest(self) -> str:
        """The version's identity, `sha256:…`."""
        return self.record.digest


def verify(
    ref: AdapterRef,
    *,
    version: int,
    record: CommittedRecord,
    tag: TagObject | None,
    policy: TrustPolicy,
    now: dt.datetime,
    base_digest: str | None = None,
) -> VerifiedManifest:
    """Decide whether a record may be used for `ref`; the rules are listed at the top of this module.

    Args:
        ref: what was asked for.
        version: the version the record was found under.
        record: as read from the store, unverified.
        tag: as read from the store, unverified; needed when `ref` has a tag.
        policy: the trust policy.
        now: the time to judge key dates by, with a time zone.
        base_digest: the base that will serve it; None to accept any.

    Raises:
        PolicyRefusedError, SignatureInvalidError, ExpiredError, DigestMismatchError, RankTooLargeError,
        BaseMismatchError: the rule that failed, in that order of checks.
    """
    rule = policy.rule_for(ref.tenant, ref.adapter)
    trusted = rule.key(bundle_keyid(record.bundle), name=str(ref))
    signed = verify_bundle(record.bundle, trusted.key)
    trusted.check(now)
    manifest = _signed_manifest(record, signed)
    _check_binding(manifest, ref, version)
    _check_files(manifest, signed, record)
    generation = None if ref.tag is None else _check_tag(ref, tag, rule, now)
    _check_limits(manifest, rule, base_digest)
    return VerifiedManifest(
        ref=AdapterRef(ref.tenant, ref.adapter, version=version),
        manifest=manifest,
        record=record,
        keyid=trusted.key.keyid,
        scope=rule.scope,
        tag=ref.tag,
        tag_generation=generation,
        _proof=_PROOF,
    )


def _signed_manifest(record: CommittedRecord, signed: dict[str, str]) -> Manifest:
    if signed.get(MANIFEST_NAME) != record.digest.removeprefix("sha256:"):
        raise DigestMismatchError(f"{MANIFEST_NAME} differs from the signed one; publish the adapter again.")
    return Manifest.from_bytes(record.manifest_bytes)


def _check_binding(manifest: Manifest, ref: AdapterRef, version: int) -> None:
    if (manifest.tenant, manifest.adapter, manifest.version) != (ref.tenant, ref.adapter, version):
        raise SignatureInvalidError(
            f"What lies under {ref.name}@{version} was signed as "
            f"{manifest.tenant}/{manifest.adapter}@{manifest.version}; "
            "a signature counts for its own tenant, adapter and version only."
        )
    if ref.digest is not None and ref.digest != manifest.digest:
        raise DigestMismatchError(f"{ref} was asked for, {manifest.digest} was found.")


def _check_files(manifest: Manifest, signed: dict[str, str], record: CommittedRecord) -> None:
    listed = {file.name: file.sha256 for file in manifest.files}
    own = {MANIFEST_NAME: manifest.digest.removeprefix("sha256:")}
    if MANIFEST_NAME in listed or listed | own != signed:
        raise SignatureInvalidError(
            "The signed files are not exactly those the manifest lists; sign it again."
        )
    if not {CONFIG_NAME, WEIGHTS_NAME} <= listed.keys():
        raise SignatureInvalidError(
            f"The manifest lacks {CONFIG_NAME} or {WEIGHTS_NAME}; publish the adapter again."
        )
    if [file.name for file in record.files] != [file.name for file in manifest.files]:
        raise DigestMismatchError(
            "The record stores other files than were signed; publish the adapter again."
        )
    for stored, wanted in zip(record.files, manifest.files, strict=True):
        if (stored.size, stored.sha256) != (wanted.size, wanted.sha256):
            raise DigestMismatchError(
                f"{stored.name} differs from the signed digest; get or publish it again."
            )


def _check_tag(ref: AdapterRef, tag: TagObject | None, rule: Rule, now: dt.datetime) -> int:
    if tag is None:
        raise SignatureInvalidError(f"{ref} was resolved without a tag statement; resolve it again.")
    trusted = rule.key(envelope_keyid(tag.envelope), name=f"the tag {ref}")
    statement = verify_tag(tag, trusted.key, ref=ref)
    trusted.check(now)
    return statement.generation


def _check_limits(manifest: Manifest, rule: Rule, base_digest: str | None) -> None:
    name, limits = f"{manifest.tenant}/{manifest.adapter}@{manifest.version}", rule.limits
    base = manifest.base_model
    if base_digest is not None and base.digest != base_digest:
        raise BaseMismatchError(
            f"{name} was made for base {base.name} {base.digest[:19]}…, this base is {base_digest[:19]}…; "
            "serve the base it was trained on or train it again."
        )
    if limits.max_rank is not None and manifest.lora.rank > limits.max_rank:
        raise RankTooLargeError(f"{name} has rank {manifest.lora.rank}, the policy allows {limits.max_rank}.")
    if limits.max_bytes is not None and manifest.size_bytes > limits.max_bytes:
        raise PolicyRefusedError(
            f"{name} has {manifest.size_bytes} bytes, the policy allows {limits.max_bytes}."
        )
    if limits.bases is not None and base.digest not in limits.bases:
        raise PolicyRefusedError(
            f"{name} is for base {base.digest[:19]}…, which the policy rule {rule.scope!r} does not list."
        )


class _PolicyError(ValueError):
    """A sentence about what is wrong with the file."""


def _rule(entry: dict[str, Any], directory: Path) -> Rule:
    _known(entry, {"scope", "keys", "limits", "threshold", "algorithms"}, "a rule")
    scope = _scope(entry.get("scope"))
    if type(entry.get("threshold", 1)) is not int or entry.get("threshold", 1) != 1:
        raise _PolicyError(f"rule {scope!r}: threshold must be 1.")
    algorithms = entry.get("algorithms", [ALGORITHMS[0]])
    if not isinstance(algorithms, list) or not all(name in ALGORITHMS for name in algorithms):
        raise _PolicyError(f"rule {scope!r}: algorithms must be among {', '.join(ALGORITHMS)}.")
    keys = tuple(
        _trusted_key(item, directory, algorithms, scope) for item in _tables(entry.get("keys", []), "keys")
    )
    if not keys or len({trusted.key.keyid for trusted in keys}) != len(keys):
        raise _PolicyError(f"rule {scope!r}: list at least one key, each once.")
    return Rule(scope, keys, _limits(entry.get("limits", {}), scope))


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


def _trusted_key(entry: dict[str, Any], directory: Path, algorithms: list[str], scope: str) -> TrustedKey:
    _known(entry, {"path", "keyid", "from", "to"}, f"a key of rule {scope!r}")
    if not isinstance(entry.get("path"), str):
        raise _PolicyError(f"rule {scope!r}: a key has no path.")
    key = load_public_key(directory / entry["path"])
    if entry.get("keyid", key.keyid) != key.keyid:
        raise _PolicyError(f"rule {scope!r}: {entry['path']} has key id {key.keyid}, not the one stated.")
    if key.algorithm not in algorithms:
        raise _PolicyError(
            f"rule {scope!r}: {entry['path']} is {key.algorithm}; add it to algorithms of the rule to accept it."
        )
    return TrustedKey(key, _moment(entry.get("from"), scope), _moment(entry.get("to"), scope))


def _moment(value: object, scope: str) -> dt.datetime | None:
    if value is None:
        return None
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            raise _PolicyError(f"rule {scope!r}: a time needs its zone, as in 2026-01-01T00:00:00Z.")
        return value
    if isinstance(value, dt.date):
        return dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC)
    raise _PolicyError(f"rule {scope!r}: from and to are dates, written 2026-01-01 without quotes.")


def _limits(table: object, scope: str) -> PolicyLimits:
    if not isinstance(table, dict):
        raise _PolicyError(f"rule {scope!r}: limits is not a table.")
    _known(table, {"max_rank", "max_bytes", "bases"}, f"limits of rule {scope!r}")
    for key in ("max_rank", "max_bytes"):
        if key in table and (type(table[key]) is not int or table[key] < 1):
            raise _PolicyError(f"rule {scope!r}: {key} must be a whole number of 1 or more.")
    bases = table.get("bases")
    if bases is not None and (
        not isinstance(bases, list) or not all(isinstance(base, str) for base in bases)
    ):
        raise _PolicyError(f"rule {scope!r}: bases is a list of digests.")
    for base in bases or []:
        check_digest(base)
    return PolicyLimits(
        table.get("max_rank"), table.get("max_bytes"), None if bases is None else tuple(bases)
    )


def _tables(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _PolicyError(f"{what} is not a list of tables.")
    return value


def _known(table: dict[str, Any], keys: Iterable[str], what: str) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, list(keys), n=1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            raise _PolicyError(
                f"{what} has the unknown key {key!r}{hint}?"
                if near
                else f"{what} has the unknown key {key!r}."
            )
