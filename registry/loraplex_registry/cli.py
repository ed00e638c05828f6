"""The `registry` command: parses the command line and turns results and errors into text, JSON and exit codes.

Exit codes: 0 done, 1 a fault of this program, 2 usage or settings, 3 not found, 4 conflict, 5 verification failed,
6 refused by the policy, 7 storage or network, 8 damage found, 130 interrupted. With `--json` one JSON object is
printed, on errors too. No colour is ever used.

Nothing heavy is imported before a command runs, so `registry --version` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from . import output
from .commands.options import common_options
from .errors import RegistryError

if TYPE_CHECKING:
    from .commands.session import Answer

COMMANDS: Final = {
    "init": "make a key, a policy, settings and a registry",
    "doctor": "race writers against the storage: can it be trusted?",
    "keys": "signing keys",
    "policy": "check the trust policy, and explain its verdicts",
    "push": "check, sign and publish an adapter directory",
    "import": "publish an export, or a PEFT directory with other files in it",
    "manifest": "write the manifest of a directory that another tool is to sign",
    "attest": "attach a signed statement to a version",
    "resign": "sign again, with the current key, what an older key signed",
    "resolve": "print the verified digest a reference means now",
    "pull": "verify a version and write it to a new directory",
    "verify": "check signature, policy and every byte",
    "show": "print what is known about a version",
    "ls": "list tenants, a tenant's adapters, or an adapter's versions and tags",
    "export": "write a version as an OCI image layout",
    "tag": "make a tag point to a version",
    "log": "list every move of a tag",
    "untag": "make a tag point to nothing",
    "revoke": "put a version or a key on the signed revocation list",
    "rm": "delete a version",
    "gc": "find and remove blobs that no version refers to",
    "fsck": "check that everything published can be read, and mend it",
    "rewrap": "wrap data keys with another key-encryption key",
    "shred": "make a tenant's encrypted adapters unreadable for ever",
    "audit": "verify and print the log of what was done",
    "cache": "list the verified adapters on this machine's disk, and make room",
    "completion": "print a completion script for bash, zsh or fish",
}
"""Every command with what it does, in the order of `registry --help`; `commands/<name>.py` holds it."""

EXIT_CODES: Final = {
    0: "done",
    1: "a fault of this program",
    2: "wrong usage or settings",
    3: "not found",
    4: "conflict: somebody else was first, or it exists with other content",
    5: "verification failed, or not an acceptable adapter",
    6: "refused by the trust policy",
    7: "storage or network; try again",
    8: "damage found",
    130: "interrupted",
}
"""What the command exits with, and when."""


class UsageFault(Exception):  # noqa: N818  (it never leaves this module as an error: it is printed)
    """A command line that cannot be read: `usage` of the parser that gave up, and why."""

    def __init__(self, usage: str, message: str) -> None:
        super().__init__(message)
        self.usage = usage
        self.message = message


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes options by their whole name only, and reports by exception.

    A script with an abbreviated option would break as soon as a second option began alike.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        hint = "" if message.endswith((".", "?")) else f"; see {self.prog} --help."
        raise UsageFault(self.format_usage(), message + hint)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Report a command or an action that is not known in one sentence instead of a list of all."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            import difflib

            near = difflib.get_close_matches(value, list(action.choices), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{self.prog} --help lists them."
            self.error(f"{self.prog} has no command {value!r}; {hint}")
        super()._check_value(action, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    output.prepare()
    as_json = "--json" in words or "--jsonl" in words
    try:
        arguments = _parse(words)
        return _run(arguments)
    except UsageFault as fault:
        if not as_json:
            print(fault.usage, end="", file=sys.stderr)
        return _fail(2, "INVALID_ARGUMENT", fault.message, as_json=as_json)
    except RegistryError as error:
        return _fail(error.exit_code, error.code, error.message, as_json=as_json, retryable=error.retryable)
    except ModuleNotFoundError as error:
        message = (
            f"the package {error.name!r} is not installed here; pip install 'loraplex[registry]' brings it"
        )
        return _fail(2, "INVALID_ARGUMENT", message, as_json=as_json)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again to complete it."
        return _fail(130, "INTERRUPTED", message, as_json=as_json, retryable=True)
    except BrokenPipeError:  # `registry ls | head`
        output.drop()
        return 0
    except output.OutputFault as fault:
        output.drop()
        message = f"The answer cannot be written ({fault}); make room and run the command again."
        return _fail(7, "STORE_UNAVAILABLE", message, as_json=False)
    except Exception as error:  # the boundary: whatever is left is a fault of ours
        if os.environ.get("LORAPLEX_TRACEBACK"):
            raise
        message = f"internal error ({type(error).__name__}: {error}); run it with LORAPLEX_TRACEBACK=1 and report it."
        return _fail(1, "INTERNAL", message, as_json=as_json)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    arguments, left = parser.parse_known_args(words)
    if left:
        command = f"registry {arguments.command}"
        raise UsageFault(f"usage: {command} …; see {command} --help\n", _unknown(left[0], arguments.command))
    return arguments


def _unknown(word: str, command: str) -> str:
    """Say that a word of the command line is not known, and which one it resembles."""
    import difflib

    if not word.startswith("-"):
        return f"{word!r} is one word too many; put quotes around a name with spaces."
    near = difflib.get_close_matches(word.partition("=")[0], _options(command), n=1)
    return f"unknown option {word}" + (f"; did you mean {near[0]}?" if near else ".")


def _options(command: str) -> list[str]:
    """Return every option of a command, those of its actions too."""
    found: list[str] = []
    parsers = [command_parser(command)]
    while parsers:
        for action in parsers.pop()._actions:
            found += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return found


def _run(arguments: argparse.Namespace) -> int:
    from .commands.session import Session

    session = Session.begin(arguments, os.environ, sys.stderr)
    answer: Answer = _module(arguments.command).run(session)
    form = next((form for form in ("jsonl", "json", "quiet") if getattr(arguments, form, False)), "text")
    out = output.plain(sys.stdout)
    if not isinstance(answer, tuple):
        return answer.write(out, form=form)
    value, lines = answer
    if form == "json":
        _print_json(value)
    elif form == "text":
        _print_lines(lines)
    out.flush()
    return 0


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value), file=output.plain(sys.stdout))


def _print_lines(lines: Iterable[str]) -> None:
    out = output.plain(sys.stdout)
    for line in lines:
        print(line, file=out)


def _fail(exit_code: int, code: str, message: str, *, as_json: bool, retryable: bool = False) -> int:
    """Report a failure in the form that was asked for; return the exit code."""
    if as_json:
        try:
            _print_json({"error": {"code": code, "message": message, "retryable": retryable}})
            sys.stdout.flush()
        except (OSError, output.OutputFault):
            output.drop()
        else:
            return exit_code
    with contextlib.suppress(OSError, output.OutputFault):  # nobody listens
        print(f"registry: {message}", file=output.plain(sys.stderr))
    return exit_code


def _module(command: str) -> Any:
    # `import` is a word of Python's own, so no module may be called by it.
    name = {"import": "import_"}.get(command, command.replace("-", "_"))
    return importlib.import_module(f".commands.{name}", __package__)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. A command's own arguments are added when its name is met."""
    parser = _Parser(
        prog="registry",
        description="Signed, versioned LoRA adapters in a bucket or a directory.",
        epilog="exit codes:\n" + "\n".join(f"  {code:<4}{meaning}" for code, meaning in EXIT_CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common_options(defaults=True)],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", action=_Commands)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of one command; imports its module and no other command's."""
    module = _module(name)
    parser = _Parser(
        prog=f"registry {name}",
        description=(module.__doc__ or "").strip().replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[] if getattr(module, "GROUP", False) else [common_options()],
    )
    module.arguments(parser)
    return parser


class _Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Imports a command only when its name is met."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None
    ) -> None:
        self.choices[values[0]] = command_parser(values[0])
        super().__call__(parser, namespace, values, option_string)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"registry (loraplex) {version('loraplex')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
