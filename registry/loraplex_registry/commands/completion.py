"""`registry completion`: a script that makes a shell complete commands, options, files and references.

Load it in the shell's start-up file:
  bash   source <(registry completion bash)
  zsh    source <(registry completion zsh)      behind compinit
  fish   registry completion fish | source
"""

from __future__ import annotations

import argparse
import itertools
from typing import Final

from ..completions import SHELLS, Syntax, script, syntax_of
from ..errors import RegistryError
from .options import common_options
from .session import Result, Session

GROUP = True

REFERENCES_MAX: Final = 200
"""Most references offered at once."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="SHELL")
    for shell in SHELLS:
        actions.add_parser(shell, parents=[common_options()], help=f"print the script for {shell}")
    refs = actions.add_parser(
        "refs", parents=[common_options()], help="print the references that begin with WORD"
    )
    refs.add_argument("word", metavar="WORD", nargs="?", default="")


def run(session: Session) -> Result:
    """Print a script, or the references a word may be meant to become."""
    if session.arguments.action == "refs":
        found = _references(session, session.arguments.word)
        return {"references": found}, found
    from ..cli import COMMANDS, build_parser, command_parser

    commands = {name: syntax_of(command_parser(name), summary) for name, summary in COMMANDS.items()}
    common = Syntax("", [word for word in syntax_of(build_parser(), "").options if word.names])
    text = script(session.arguments.action, commands, common)
    return {"shell": session.arguments.action, "script": text}, text.rstrip("\n").split("\n")


def _references(session: Session, word: str) -> list[str]:
    """Return at most REFERENCES_MAX references; nothing when the registry cannot be asked.

    A name without tenant stands for the tenant of the settings, as everywhere.
    """
    path, at, _ = word.partition("@")
    tenant, slash, _ = path.partition("/")
    try:
        if at:
            found = _selectors(session, path)
        elif slash:
            found = _adapters(session, tenant, path.partition("/")[2])
        else:
            found = _tenants(session, tenant) + _adapters(
                session, session.settings.tenant, tenant, short=True
            )
    except RegistryError:  # a shell that completes has no place for errors
        return []
    return [name for name in found if name.startswith(word)][:REFERENCES_MAX]


def _tenants(session: Session, begin: str) -> list[str]:
    from ..lifecycle.listing import list_tenants

    names = list_tenants(session.store(), pattern=begin + "*")
    return [f"{name}/" for name in itertools.islice(names, REFERENCES_MAX)]


def _adapters(session: Session, tenant: str | None, begin: str, *, short: bool = False) -> list[str]:
    from ..lifecycle.listing import list_adapters

    if tenant is None:
        return []
    names = itertools.islice(list_adapters(session.store(), tenant, pattern=begin + "*"), REFERENCES_MAX)
    return list(names) if short else [f"{tenant}/{name}" for name in names]


def _selectors(session: Session, path: str) -> list[str]:
    from ..format import layout
    from ..lifecycle.listing import version_names

    ref, store = session.ref(path), session.store()
    tags = [name.removesuffix(".json") for name in store.children(layout.tags_prefix(ref))]
    return [f"{path}@{selector}" for selector in [*tags, *version_names(store, ref)]]
