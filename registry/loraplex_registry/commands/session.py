"""One run of a command: its arguments, the settings they override, the terminal, and the forms an answer may take."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from ..encryption.key_providers import KeyRing
from ..errors import ConflictError, RegistryError, SettingsError, StoreError
from ..lifecycle.tag_state import TagState, read_tag_state
from ..lifecycle.tagging import TagMove
from ..progress import ProgressBar
from ..refs import AdapterRef
from ..registry import Registry, utc_now
from ..settings import Settings, load_settings, state_directory
from ..signing import Signer, load_signer
from ..storage.root_marker import require_writable
from ..storage.store import Store, open_store
from ..trust.marks import FileMarks, Mark, marks_directory
from ..trust.verdict import TrustPolicy, VerifiedManifest
from ..trust.verifier import Verifier

WRITING: Final = frozenset(
    {"push", "tag", "untag", "rm", "gc", "revoke", "attest", "resign", "rewrap", "shred", "import"}
)
"""Commands that refuse a storage whose conditional writes were not proven; `fsck` may always mend."""

PUBLISHING: Final = frozenset({"push", "import"})
"""Commands that may begin a registry in a directory that is not there yet."""

Result = tuple[dict[str, Any], list[str]]
"""A command's answer: what `--json` prints, and the lines for people."""


@dataclass
class Listing:
    """An answer that is printed while it is being found, so that its length costs no memory and no waiting.

    With `--json` it is one object: the `head`, then a list called `name` of all items, then what `tail` returns. An
    error in the middle ends the list and becomes the member `error`: still one object. With `--jsonl` every item is
    an object of its own on a line. Else it is the `headings` and one `line` per item.

    Attributes:
        entry: what an item is in the list of `--json`; default the item itself.
        empty: what people are told, beside the output, when there is no item.
        last: the last line for people.
    """

    head: dict[str, Any]
    name: str
    items: Iterable[dict[str, Any]]
    line: Callable[[dict[str, Any]], str]
    entry: Callable[[dict[str, Any]], Any] = dict
    tail: Callable[[], dict[str, Any]] = dict
    headings: str = ""
    empty: str = ""
    last: str = ""

    def write(self, out: TextIO, *, form: str) -> int:
        """Print the answer and return the exit code.

        Args:
            out: where.
            form: "json", "jsonl", "text" or "quiet".

        Raises:
            RegistryError: what went wrong while nothing that would spoil an object was printed.
        """
        if form == "json":
            return self._write_object(out)
        empty = True
        for item in self.items if form != "quiet" else ():
            if form == "jsonl":
                out.write(json.dumps(item) + "\n")
            else:
                out.write((self.headings + "\n" if empty and self.headings else "") + self.line(item) + "\n")
            empty = False
        if form == "text" and self.last:
            out.write(self.last + "\n")
        out.flush()
        if empty and form == "text" and self.empty:
            print(f"registry: {self.empty}", file=sys.stderr)
        return 0

    def _write_object(self, out: TextIO) -> int:
        items = iter(self.items)
        first = next(items, None)  # an error before the first item is reported like that of any command
        out.write(json.dumps({**self.head, self.name: []})[:-2])
        try:
            for number, item in enumerate([] if first is None else itertools.chain([first], items)):
                out.write(", " * bool(number) + json.dumps(self.entry(item)))
            code, after = 0, self.tail()
        except RegistryError as error:
            reason = {"code": error.code, "message": error.message, "retryable": error.retryable}
            code, after = error.exit_code, {"error": reason}
        members = "".join(f", {json.dumps(key)}: {json.dumps(value)}" for key, value in after.items())
        out.write(f"]{members}}}\n")
        out.flush()
        return code


Answer = Result | Listing


@dataclass(frozen=True)
class Session:
    """One run of the command: its arguments, the settings they override, and the terminal."""

    arguments: argparse.Namespace
    settings: Settings
    environment: Mapping[str, str]
    stderr: TextIO
    memo: dict[str, Store] = field(default_factory=dict, repr=False)

    @classmethod
    def begin(cls, arguments: argparse.Namespace, environment: Mapping[str, str], stderr: TextIO) -> Session:
        """Read the settings file and lay the command line over it."""
        names = ("registry", "endpoint_url", "region", "policy", "key")
        given = {name: getattr(arguments, name, None) for name in names}
        return cls(arguments, load_settings(environment).overridden(**given), environment, stderr)

    def store(self) -> Store:
        """Return the storage that is set; for a command that writes, only if it may be written to."""
        if "store" not in self.memo:
            url = self.settings.require("registry", option="--registry")
            store = open_store(url, endpoint_url=self.settings.endpoint_url, region=self.settings.region)
            if self.arguments.command in PUBLISHING:
                store.prepare()
            if self.arguments.command in WRITING:
                require_writable(store)
            self.memo["store"] = store
        return self.memo["store"]

    def registry(self) -> Registry:
        """Return the registry that is set."""
        return Registry(self.store(), keys=KeyRing.parse(self.settings.encryption_key))

    @contextlib.contextmanager
    def progress(self) -> Iterator[ProgressBar]:
        """Yield a progress bar for a terminal; it draws nothing with `--quiet` or elsewhere."""
        bar = ProgressBar(
            self.stderr, enabled=not getattr(self.arguments, "quiet", False), environment=self.environment
        )
        try:
            yield bar
        finally:
            bar.close()

    def signer(self) -> Signer:
        """Return the signer of the key that is set.

        Raises:
            SettingsError: none is set, or it cannot be read.
        """
        return self._load(self.settings.require("key", option="--key"))

    def signers(self) -> list[Signer]:
        """Return the signers of every `--key`, in order; of the key that is set when there is none.

        Raises:
            SettingsError: as `signer`.
        """
        named = getattr(self.arguments, "keys", None)
        return [self._load(key) for key in named] if named else [self.signer()]

    def _load(self, key: str) -> Signer:
        return load_signer(key, self.passphrase(self.environment.get("LORAPLEX_KEY_PASSPHRASE_FILE")))

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
        from ..lifecycle.audit import AuditLog

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

    def policy(self) -> TrustPolicy:
        """Return the trust policy that is set."""
        return TrustPolicy.load(self.settings.require("policy", option="--policy"))

    def ref(self, text: str) -> AdapterRef:
        """Return a reference; a name without tenant gets the tenant of the settings."""
        if "/" not in text.partition("@")[0]:
            text = f"{self.settings.require('tenant', option='the tenant: TENANT/' + text[:80])}/{text}"
        return AdapterRef.parse(text)

    def verified(self, text: str) -> tuple[Registry, VerifiedManifest]:
        """Resolve and verify a reference."""
        registry = self.registry()
        return registry, self.verifier(registry).verify(self.ref(text))

    def verifier(self, registry: Registry) -> Verifier:
        """Return what decides whether an adapter may be used, by the policy that is set and what was seen before."""
        return Verifier(registry, self.policy(), marks=self.marks(registry), refresh_s=0)

    def marks(self, registry: Registry) -> FileMarks:
        """Return what was seen of a registry before, kept in the user's state directory."""
        return FileMarks(marks_directory(state_directory(self.environment), registry.url))

    def tag_to_move(self, ref: AdapterRef, tag: str) -> TagState | None:
        """Return a tag as stored, None if it never was, unless its statement is older than one seen here.

        Whoever moved such a tag would sign a second statement of a generation that is taken, which readers refuse.

        Raises:
            RollbackError: somebody put an older statement back, or took the tag away.
        """
        registry, state = self.registry(), read_tag_state(self.store(), ref, tag)
        if not self.settings.policy:
            return state
        taggers = self.policy().rule_for(ref.tenant, ref.adapter).tag_rule(tag).taggers or ()
        statement = None if state is None else state.statement
        mark = Mark(0, "", ()) if statement is None else Mark(statement.generation, statement.sha256, ())
        self.marks(registry).seen(ref.tenant).advanced(
            f"{ref.adapter}@{tag}", mark, utc_now(), {item.key.keyid for item in taggers}
        )
        return state

    def passphrase(self, path: str | None) -> str | None:
        """Return the first line of a passphrase file, None without one. A passphrase is never an argument."""
        if not path:
            return None
        try:
            with Path(path).open(encoding="utf-8") as file:
                line = file.readline(4096).rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"Passphrase file {path} cannot be read.") from error
        if not line:
            raise SettingsError(f"Passphrase file {path} is empty.")
        return line


def verified_result(verified: VerifiedManifest) -> dict[str, Any]:
    """Return what commands print about a verified version."""
    return {
        "ref": str(verified.ref),
        "version": verified.ref.version,
        "digest": verified.digest,
        "keyid": verified.keyid,
        "scope": verified.scope,
        "tag": verified.tag,
        "tag_generation": verified.tag_generation,
        "rank": verified.manifest.lora.rank,
        "base_digest": verified.manifest.base_model.digest,
        "size_bytes": verified.manifest.size_bytes,
        "warnings": list(verified.warnings),
    }
