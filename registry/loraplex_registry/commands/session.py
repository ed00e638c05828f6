"""One run of a command: its arguments, the settings they override, the terminal, and the forms an answer may take."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TextIO

from ..configured import ConfiguredRegistry, read_passphrase
from ..errors import RegistryError
from ..progress import ProgressBar
from ..registry import Registry
from ..settings import load_settings
from ..signing import Signer
from ..storage.root_marker import require_writable
from ..storage.store import Store
from ..trust.verdict import VerifiedManifest
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


@dataclass(frozen=True, kw_only=True)
class Session(ConfiguredRegistry):
    """One run of the command: its arguments, the registry of the settings they override, and the terminal."""

    arguments: argparse.Namespace
    stderr: TextIO

    @classmethod
    def begin(cls, arguments: argparse.Namespace, environment: Mapping[str, str], stderr: TextIO) -> Session:
        """Read the settings file and lay the command line over it."""
        names = ("registry", "endpoint_url", "region", "policy", "key")
        given = {name: getattr(arguments, name, None) for name in names}
        settings = load_settings(environment).overridden(**given)
        return cls(arguments=arguments, settings=settings, environment=environment, stderr=stderr)

    def opened(self) -> Store:
        """Open the storage that is set; for a command that writes, only if it may be written to."""
        store = super().opened()
        if self.arguments.command in PUBLISHING:
            store.prepare()
        if self.arguments.command in WRITING:
            require_writable(store)
        return store

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
        return self.load_signer(self.settings.require("key", option="--key"))

    def signers(self) -> list[Signer]:
        """Return the signers of every `--key`, in order; of the key that is set when there is none.

        Raises:
            SettingsError: as `signer`.
        """
        named = getattr(self.arguments, "keys", None)
        return [self.load_signer(key) for key in named] if named else [self.signer()]

    def verified(self, text: str) -> tuple[Registry, VerifiedManifest]:
        """Resolve and verify a reference."""
        registry = self.registry()
        return registry, self.verifier(registry).verify(self.ref(text))

    def verifier(self, registry: Registry) -> Verifier:
        """Return what decides whether an adapter may be used, by the policy that is set and what was seen before."""
        return Verifier(registry, self.policy(), marks=self.marks(registry), refresh_s=0)

    def passphrase(self, path: str | None) -> str | None:
        """Return the first line of a passphrase file; see `configured.read_passphrase`."""
        return read_passphrase(path)


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
