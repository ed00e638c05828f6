"""What a trust policy says: rules, whose keys play which role in them, and what they demand beyond a signature.

- The longest scope that matches `tenant/adapter` decides alone; nothing is inherited. No scope, no trust.
- Roles are apart: `keys` (and certificates, keyless identities) sign adapters, `taggers` sign tags, `revokers` sign
  revocation lists, an attestation's `keys` sign attestations. Only `taggers` has a default: the rule's `keys`.
- Everything here is a value; `policy_file` reads it, `trust` decides with it, and neither asks the network.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import ExpiredError, PolicyRefusedError, SignatureInvalidError
from ..refs import Version
from ..signing import PublicKey

if TYPE_CHECKING:
    from ..signing.certificates import CertificateAuthority
    from ..signing.keyless import KeylessAuthority

ANY_TAG: Final = "*"
"""Name under which a rule keeps what it demands of tags it does not name."""


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A public key with the dates it counts: from (inclusive) and to (exclusive), None for open.

    `path` is the file as the policy writes it, for people.
    """

    key: PublicKey
    valid_from: dt.datetime | None = None
    valid_to: dt.datetime | None = None
    path: str = ""

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

    def __str__(self) -> str:
        begin = "" if self.valid_from is None else f" from {self.valid_from:%Y-%m-%d}"
        end = "" if self.valid_to is None else f" to {self.valid_to:%Y-%m-%d}"
        place = f" ({self.path})" if self.path else ""
        return f"{self.key.keyid[:16]}…{place}{begin}{end}"


@dataclass(frozen=True, slots=True)
class TrustedAuthority:
    """A certificate authority or a keyless issuer that names adapter signers, with the dates it counts.

    The roots are explicit in the policy; the system's root store is never asked.
    """

    authority: CertificateAuthority | KeylessAuthority
    valid_from: dt.datetime | None = None
    valid_to: dt.datetime | None = None

    def check(self, now: dt.datetime) -> None:
        """Raise ExpiredError unless `now` lies within the dates."""
        if (self.valid_from is not None and now < self.valid_from) or (
            self.valid_to is not None and now >= self.valid_to
        ):
            raise ExpiredError(f"{self} is outside the dates the policy gives it.")

    def __str__(self) -> str:
        return self.authority.name


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """What a rule allows beyond the signature; None means no limit of its own. `max_bytes` counts all files.

    Versions below `min_version` (in the order of `refs.version_order`) are refused.
    """

    max_rank: int | None = None
    max_bytes: int | None = None
    bases: tuple[str, ...] | None = None
    min_version: Version | None = None


@dataclass(frozen=True, slots=True)
class TagRule:
    """What a tag needs: signatures of `threshold` different taggers, and to be issued within `max_age_s` seconds.

    `taggers` None means the rule's own.
    """

    threshold: int = 1
    taggers: tuple[TrustedKey, ...] | None = None
    max_age_s: int | None = None


@dataclass(frozen=True, slots=True)
class RevocationRule:
    """A revocation list is needed, issued within `max_age_s` seconds; `on_stale` says what happens otherwise.

    `refuse` refuses the adapter, `warn` accepts it with a warning.
    """

    max_age_s: int
    on_stale: str = "refuse"


@dataclass(frozen=True, slots=True)
class AttestationRule:
    """An attestation that must be there: an in-toto statement of this predicate type, signed by one of the keys.

    `builder` is the builder id the predicate must name (SLSA provenance), None for any.
    """

    type: str
    keys: tuple[TrustedKey, ...]
    builder: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One scope with what it demands. Scopes: `acme/orders`, `acme/ord*`, `acme/**`, `**`.

    Attributes:
        scope: which adapters it decides about.
        keys, authorities: who may sign adapters: one signature of any of them is needed.
        limits: rank, bytes, bases, versions.
        taggers: who may sign tags.
        revokers: who may sign the tenant's revocation list; empty means that no list counts.
        tags: what single tags need; `ANY_TAG` for those not named.
        encryption: `required`, `forbidden` or `optional`.
        revocation: None when a list is checked if there is one but not demanded.
        attestations: each must be there.
        mode: `enforce`, or `audit`: refusals that `trust` lists as waivable become warnings.
    """

    scope: str
    keys: tuple[TrustedKey, ...]
    limits: PolicyLimits = field(default_factory=PolicyLimits)
    taggers: tuple[TrustedKey, ...] = ()
    revokers: tuple[TrustedKey, ...] = ()
    tags: tuple[tuple[str, TagRule], ...] = ()
    encryption: str = "optional"
    revocation: RevocationRule | None = None
    attestations: tuple[AttestationRule, ...] = ()
    mode: str = "enforce"
    authorities: tuple[TrustedAuthority, ...] = ()

    @property
    def prefix(self) -> str | None:
        """What names covered by the scope begin with; None for a scope that is one name."""
        return None if "*" not in self.scope else self.scope.rstrip("*")

    def covers(self, name: str) -> bool:
        """Say whether the scope matches `tenant/adapter`."""
        return name == self.scope if self.prefix is None else name.startswith(self.prefix)

    def key(self, keyid: str, *, name: str) -> TrustedKey:
        """Return the adapter key with this id.

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

    def tag_rule(self, tag: str) -> TagRule:
        """Return what a tag needs, its taggers filled in."""
        rules = dict(self.tags)
        rule = rules.get(tag) or rules.get(ANY_TAG) or TagRule()
        taggers = self.taggers if rule.taggers is None else rule.taggers
        return TagRule(rule.threshold, taggers, rule.max_age_s)


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """A loaded policy: rules only, everything else is denied. `digest` names the file's bytes for caches and logs."""

    rules: tuple[Rule, ...]
    digest: str = ""
    _exact: dict[str, Rule] = field(init=False, repr=False, compare=False)
    _by_prefix: dict[str, Rule] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A scan of 100,000 rules for every load would be felt; a look-up per prefix of the name is not.
        exact = {rule.scope: rule for rule in self.rules if rule.prefix is None}
        by_prefix = {rule.prefix: rule for rule in self.rules if rule.prefix is not None}
        object.__setattr__(self, "_exact", exact)
        object.__setattr__(self, "_by_prefix", by_prefix)

    @classmethod
    def load(cls, path: str | Path) -> TrustPolicy:
        """Read a policy file and the keys it names (paths relative to the file).

        Raises:
            PolicyRefusedError: absent, damaged, an unknown key, a key file that cannot be read. There is no fallback.
        """
        from .policy_file import read_policy

        return read_policy(Path(path))

    def rule_for(self, tenant: str, adapter: str) -> Rule:
        """Return the one rule that decides about `tenant/adapter`.

        Raises:
            PolicyRefusedError: no rule covers it.
        """
        matches = self.matching(f"{tenant}/{adapter}")
        if not matches:
            raise PolicyRefusedError(
                f"No rule of the trust policy covers {tenant}/{adapter}; add one for {tenant}/**."
            )
        return matches[0]

    def matching(self, name: str) -> list[Rule]:
        """Return every rule whose scope matches `tenant/adapter`, the one that decides first."""
        found = [self._exact[name]] if name in self._exact else []
        prefixes = (name[:length] for length in range(len(name), -1, -1))
        return found + [self._by_prefix[prefix] for prefix in prefixes if prefix in self._by_prefix]

    def rules_of(self, tenant: str) -> list[Rule]:
        """Return the rules that can decide about an adapter of a tenant, in the order of the file."""
        return [rule for rule in self.rules if rule.scope == "**" or rule.scope.startswith(f"{tenant}/")]


def keys_of(trusted: Sequence[TrustedKey]) -> dict[str, TrustedKey]:
    """Return keys by their id."""
    return {item.key.keyid: item for item in trusted}
