"""The `registry` command: parses the command line and turns errors into sentences and exit codes.

Exit codes: 0 done, 2 usage or settings, 3 not found, 4 conflict, 5 verification failed, 6 refused by the policy,
7 storage or network (try again), 8 damage found. With `--json` one JSON object is printed, on errors too.

Nothing heavy is imported before a command runs, so `registry --version` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from .errors import RegistryError

REFERENCE_HELP = (
    "tenant/adapter, with @tag, @3 or @sha256:… after it; the tenant may be left out when settings name one"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        result, lines = _run(arguments)
    except RegistryError as error:
        if arguments.json:
            reason = {"code": error.code, "message": error.message, "retryable": error.retryable}
            print(json.dumps({"error": reason}))
        else:
            print(f"registry: {error.message}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(
            f"registry: the package {error.name!r} is not installed here; pip install 'loraplex[registry]' brings it",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("registry: interrupted; run the same command again to complete it.", file=sys.stderr)
        return 130
    return _print(json.dumps(result) if arguments.json else "\n".join(lines))


def _print(text: str) -> int:
    try:
        if text:
            print(text, flush=True)
    except BrokenPipeError:  # `registry ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from . import commands

    return commands.COMMANDS[arguments.command](commands.Session.begin(arguments, os.environ, sys.stderr))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="registry", description="Signed, versioned LoRA adapters in a bucket or a directory."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _common_options()
    _add_init(commands, common)
    _add_keys(commands, common)
    push = commands.add_parser("push", parents=[common], help="check, sign and publish an adapter directory")
    push.add_argument(
        "directory", metavar="DIR", help="adapter_config.json and adapter_model.safetensors, as PEFT saves"
    )
    push.add_argument(
        "ref", metavar="REF", nargs="?", help=f"{REFERENCE_HELP}; default: your tenant, the directory's name"
    )
    push.add_argument("--tag", help="move this tag to the version")
    push.add_argument(
        "--base", help="base model directory or base card; default: base_model.json in DIR, then settings"
    )
    push.add_argument("--key", help="private key file")
    pull = commands.add_parser(
        "pull", parents=[common], help="verify a version and write it to a new directory"
    )
    pull.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    pull.add_argument("directory", metavar="DIR", help="must not exist, or be empty")
    verify = commands.add_parser("verify", parents=[common], help="check signature, policy and every byte")
    verify.add_argument("target", metavar="REF|DIR", help=f"a pulled directory, or {REFERENCE_HELP}")
    resolve = commands.add_parser(
        "resolve", parents=[common], help="print the verified digest a reference means now"
    )
    resolve.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    show = commands.add_parser("show", parents=[common], help="print what is known about a version")
    show.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    ls = commands.add_parser(
        "ls", parents=[common], help="list tenants, a tenant's adapters, or an adapter's versions"
    )
    ls.add_argument("scope", metavar="TENANT[/ADAPTER]", nargs="?")
    return parser


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--registry", help="file:///path or s3://bucket/prefix; default $LORAPLEX_REGISTRY, then settings"
    )
    common.add_argument("--endpoint-url", help="S3 server other than AWS; default $AWS_ENDPOINT_URL")
    common.add_argument("--region", help="AWS region")
    common.add_argument("--policy", help="trust policy file")
    common.add_argument("--json", action="store_true", help="print one JSON object")
    return common


def _add_init(commands: Any, common: argparse.ArgumentParser) -> None:
    init = commands.add_parser("init", parents=[common], help="make a key, a policy, settings and a registry")
    init.add_argument("--tenant", required=True, help="whose adapters you publish")


def _add_keys(commands: Any, common: argparse.ArgumentParser) -> None:
    keys = commands.add_parser("keys", help="signing keys")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    gen = actions.add_parser(
        "gen", parents=[common], help="make a key pair: FILE and FILE with the suffix .pub"
    )
    gen.add_argument(
        "file", metavar="FILE", help="private key to write (PKCS#8 PEM, mode 0600); must not exist"
    )
    gen.add_argument(
        "--algorithm", default="ecdsa-p256", help="ecdsa-p256 (default), ecdsa-p384, ecdsa-p521, ed25519"
    )
    gen.add_argument("--passphrase-file", help="encrypt the private key with the first line of this file")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"registry (loraplex) {version('loraplex')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
