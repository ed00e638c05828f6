"""A registry as the settings describe it: storage, keys, what was seen of it, audit log, and one way to publish.

Everybody who publishes for a user does it by `ConfiguredRegistry.publish`: `registry push`, `registry import` and the
trainer. So what the settings demand (encryption, the audit log, the check that a tag was not put back) is demanded of
all of them, and a further demand needs one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .encryption.key_providers import KeyRing
from .errors import ConflictError, SettingsError, StoreError
from .format.record import CommittedRecord
from .lifecycle.resuming import Resumables, Told
from .lifecycle.tag_state import TagState, read_tag_state
from .lifecycle.tagging import TagMove
from .refs import AdapterRef
from .registry import Published, Registry, utc_now
from .settings import Settings, state_directory
from .signing import Signer, load_signer
from .storage.store import Store, open_store
from .trust.marks import FileMarks, Mark, marks_directory
from .trust.verdict import TrustPolicy
from .trust.verifier import Verifier
from .validation.base import BaseModel

PASSPHRASE_CHARS_MAX: Final = 4096
"""Longest passphrase, in characters."""


@dataclass(frozen=True, kw_only=True)
class ConfiguredRegistry:
    """The registry that settings name, with everything they say about it. Nothing is contacted before it is used.

    Attributes:
        settings: what is set.
        environment: where the user's directories are; see `settings`.
    """

    settings: Settings
    environment: Mapping[str, str]
    memo: dict[str, Store] = field(default_factory=dict, init=False, repr=False)

    def store(self) -> Store:
        """Return the storage that is set; opened once."""
        if "store" not in self.memo:
            self.memo["store"] = self.opened()
        return self.memo["store"]

    def opened(self) -> Store:
        """Open the storage that is set."""
        return open_configured(self.settings, self.settings.require("registry", option="--registry"))

    def registry(self) -> Registry:
        """Return the registry that is set, with its encryption keys."""
        return Registry(self.store(), keys=KeyRing.parse(self.settings.encryption_key))

    def policy(self) -> TrustPolicy:
        """Return the trust policy that is set."""
        return TrustPolicy.load(self.settings.require("policy", option="--policy"))

    def ref(self, text: str) -> AdapterRef:
        """Return a reference; a name without tenant gets the tenant of the settings."""
        if "/" not in text.partition("@")[0]:
            text = f"{self.settings.require('tenant', option='the tenant: TENANT/' + text[:80])}/{text}"
        return AdapterRef.parse(text)

    def marks(self, registry: Registry) -> FileMarks:
        """Return what was seen of a registry before, kept in the user's state directory."""
        return FileMarks(marks_directory(state_directory(self.environment), registry.url))

    def resumables(self, told: Told | None = None) -> Resumables:
        """Return the user's interrupted uploads, kept in the state directory; `told` hears what is gone on with."""
        return Resumables(state_directory(self.environment) / "uploads", told=told)

    def load_signer(self, key: str, *, passphrase_file: str | None = None) -> Signer:
        """Return the signer of a private key.

        Args:
            key: a file, or a key service's address.
            passphrase_file: its first line opens the key; default the one that LORAPLEX_KEY_PASSPHRASE_FILE names.

        Raises:
            SettingsError: the key or the passphrase cannot be read.
        """
        named = passphrase_file or self.environment.get("LORAPLEX_KEY_PASSPHRASE_FILE")
        return load_signer(key, read_passphrase(named))

    def publish(
        self,
        directory: str | Path,
        ref: AdapterRef,
        signers: Sequence[Signer],
        base: BaseModel,
        *,
        action: str = "push",
        tag: str | None = None,
        **options: Any,
    ) -> Published:
        """Publish as `Registry.publish` does: encrypted where a key is set, and told in the audit log where that is on.

        Args:
            directory: the adapter.
            ref: tenant and adapter; it may name a tag or a version as well.
            signers: the first signs the version, all of them the tag; none for what was signed elsewhere, which then
                is not in the log, because an entry needs a signature.
            base: the base model it was trained on.
            action: what the log calls it, `push` or `import`.
            tag: moved to the version after the commit.
            options: the other arguments of `Registry.publish`.

        Raises:
            RollbackError: the tag as stored is older than one seen here; nothing was written.
            RevokedError: a tag is to be moved, and the key is revoked (nothing was written) or the version is, which
                was published before; the tag is left alone.
            ConflictError, StoreError: as `Registry.publish`, and `record`.
            Others: as `Registry.publish`.
        """
        self.store().prepare()  # a directory that is not there yet may begin with this
        if moved := tag or ref.tag:
            self.tag_to_move(ref, moved)
            self._require_taggable(ref, signers, options)
        options.setdefault("resumables", self.resumables())
        done = self.registry().publish(directory, ref, signers, base, tag=tag, **options)
        if signers and done.created:
            self.record(action, f"{ref.name}@{done.version}", signers[0], digest=done.digest)
        for kind in done.attested:
            signer = options["statements"][0].signer
            self.record("attest", f"{ref.name}@{done.version}", signer, digest=done.digest, type=kind[:100])
        if signers and done.tag_moved:
            self.record(
                "tag",
                f"{ref.name}@{done.tag}",
                signers[0],
                version=done.version,
                generation=done.tag_generation,
                digest=done.digest,
            )
        return done

    def require_unrevoked(self, ref: AdapterRef, record: CommittedRecord) -> None:
        """Refuse a version that its tenant's revocation list names, or whose key it does, when a policy is set.

        Raises:
            RevokedError, RollbackError, SignatureInvalidError, ExpiredError: see `Verifier.require_unrevoked`.
        """
        if self.settings.policy:
            self._lists().require_unrevoked(ref, record)

    def _require_taggable(self, ref: AdapterRef, signers: Sequence[Signer], options: dict[str, Any]) -> None:
        """Refuse what no tag may point to: at once by its key, and by its digest as soon as that is known."""
        if not self.settings.policy:
            return
        lists = self._lists()
        if signers and options.get("signed") is None:
            lists.require_key_unrevoked(ref, signers[0].keyid)
        options["allow_tag"] = lists.require_unrevoked

    def _lists(self) -> Verifier:
        registry = self.registry()
        return Verifier(registry, self.policy(), marks=self.marks(registry))

    def record(self, action: str, subject: str, signer: Signer, **detail: object) -> None:
        """Add an entry to the audit log of the subject's tenant, when the settings say so.

        Args:
            action: one of `audit.ACTIONS`.
            subject: what it was done to, as `acme/orders@3`.
            signer: whose key did it.
            detail: short facts; those that are None are left out.

        Raises:
            ConflictError, StoreUnavailableError, StoreRefusedError: it was done, but is not in the log; the sentence
                says so, and `registry audit verify --reconcile` finds it.
        """
        if self.settings.audit != "on":
            return
        from .lifecycle.audit import AuditLog

        texts = {name: str(value) for name, value in detail.items() if value is not None}
        try:
            AuditLog(self.store(), subject.partition("/")[0]).append(
                action, subject, signer, utc_now(), detail=texts
            )
        except (ConflictError, StoreError) as error:
            raise type(error)(
                f"{action} of {subject} is done, but could not be recorded: {error.message}"
            ) from error

    def record_move(self, action: str, subject: str, move: TagMove, signers: Sequence[Signer]) -> None:
        """Add the move of a tag to the audit log, when there was one; see `record`."""
        if move.moved:
            statement = move.statement
            digest = f"sha256:{statement.manifest_sha256}" if statement.manifest_sha256 else None
            self.record(
                action,
                subject,
                signers[0],
                version=statement.version,
                generation=statement.generation,
                digest=digest,
            )

    def tag_to_move(self, ref: AdapterRef, tag: str) -> TagState | None:
        """Return a tag as stored, None if it never was, unless its statement is older than one seen here.

        Whoever moved such a tag would sign a second statement of a generation that is taken, which readers refuse.

        Raises:
            RollbackError: somebody put an older statement back, or took the tag away.
        """
        state = read_tag_state(self.store(), ref, tag)
        self.require_newest(ref, tag, state)
        return state

    def require_newest(self, ref: AdapterRef, tag: str, state: TagState | None) -> None:
        """Refuse a tag as it was read, None for one that is not there, when it is older than one seen here.

        Raises:
            RollbackError: somebody put an older statement back, or took the tag away.
            PolicyRefusedError: the policy that is set has no rule for the adapter.
        """
        if not self.settings.policy:
            return
        taggers = self.policy().rule_for(ref.tenant, ref.adapter).tag_rule(tag).taggers or ()
        statement = None if state is None else state.statement
        mark = Mark(0, "", ()) if statement is None else Mark(statement.generation, statement.sha256, ())
        self.marks(self.registry()).seen(ref.tenant).advanced(
            f"{ref.adapter}@{tag}", mark, utc_now(), {item.key.keyid for item in taggers}
        )


def open_configured(settings: Settings, url: str) -> Store:
    """Return the store at an address, spoken to as the settings say. Touches neither disk nor network.

    Raises:
        InvalidReferenceError: see `open_store`.
    """
    return open_store(url, endpoint_url=settings.endpoint_url, region=settings.region, options=settings.s3)


def read_passphrase(path: str | None) -> str | None:
    """Return the first line of a passphrase file, None without one. A passphrase is never an argument.

    Raises:
        SettingsError: it cannot be read, or its first line is empty.
    """
    if not path:
        return None
    try:
        with Path(path).open(encoding="utf-8") as file:
            line = file.readline(PASSPHRASE_CHARS_MAX).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"Passphrase file {path} cannot be read.") from error
    if not line:
        raise SettingsError(f"Passphrase file {path} is empty.")
    return line
