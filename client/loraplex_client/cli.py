"""The `loraplex` command: finds its subcommands among the installed parts, and `loraplex generate`.

Subcommands are entry points of the group "loraplex.commands", so that the client alone installs a command
that says what is missing, and never imports the server or the trainer itself.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

from loraplex_client.connecting import add_connection, connected
from loraplex_client.errors import LoraplexError
from loraplex_client.types import (
    ChatMessage,
    Completion,
    Form,
    JsonSchema,
    OneOf,
    Prompt,
    Regex,
    Sampling,
)

GROUP = "loraplex.commands"
SUMMARIES = {
    "adapters": "what a running server holds; load, pin, validate, roll out",
    "demo": "watch the whole product work on this machine",
    "generate": "call a running server",
    "serve": "hold one base model and serve tenants' adapters over gRPC",
    "train": "train an adapter, and publish it signed",
}
# Which extra brings the packages a command needs.
EXTRAS = {"demo": "registry,server,trainer,cpu", "serve": "server,cpu", "train": "trainer"}


def main(arguments: Sequence[str] | None = None) -> int:
    """`loraplex COMMAND ...`: gives the command's exit status; 2 for an unknown command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {point.name: point for point in entry_points(group=GROUP)}
    if words and words[0] == "--version":
        print(f"loraplex {version('loraplex')}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(_usage(commands))
        return 0 if words else 2
    if words[0] not in commands:
        print(f"loraplex: unknown command {words[0]!r}\n\n{_usage(commands)}", file=sys.stderr)
        return 2
    run = _load(commands[words[0]])
    return 1 if run is None else run(words[1:])


def _load(point: EntryPoint) -> Callable[[Sequence[str]], int] | None:
    try:
        command: Callable[[Sequence[str]], int] = point.load()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(point.name, point.name)
        print(
            f"loraplex {point.name}: the package {error.name!r} is not installed here; "
            f"pip install 'loraplex[{extra}]' brings it",
            file=sys.stderr,
        )
        return None
    return command


def _usage(commands: dict[str, EntryPoint]) -> str:
    rows = [f"  {name:<10} {SUMMARIES.get(name, '')}".rstrip() for name in sorted(commands)]
    return "\n".join(
        [
            "usage: loraplex COMMAND ...",
            "",
            "commands:",
            *rows,
            "",
            "`loraplex COMMAND --help` tells more; adapters are kept with the `registry` command.",
        ]
    )


def generate_main(arguments: Sequence[str] | None = None) -> int:
    """`loraplex generate`: exit status 0, or 1 with one line saying why not."""
    options = _generate_parser().parse_args(arguments)
    prompt: Prompt = options.prompt if options.raw else (ChatMessage("user", options.prompt),)
    try:
        sampling = _sampling(options)
        with connected(options) as client:
            stream = client.stream(
                prompt,
                adapter=options.adapter,
                sampling=sampling,
                timeout_s=options.timeout,
                session=options.session,
                request_id=options.request_id,
            )
            one = not options.json and (options.n or 1) == 1
            for piece in stream:
                if one:
                    print(piece.text, end="", flush=True)
            print("" if one else _told(stream.completion, as_json=options.json))
    except LoraplexError as error:
        print(f"loraplex generate: {error}" + (f" [{error.code}]" if error.code else ""), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"loraplex generate: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _sampling(options: argparse.Namespace) -> Sampling:
    """Read how tokens are chosen; raises OSError for a schema that cannot be read."""
    form: Form | None = None
    if options.json_schema:
        form = JsonSchema(Path(options.json_schema).read_text(encoding="utf-8", errors="replace"))
    elif options.regex is not None:
        form = Regex(options.regex)
    elif options.choice:
        form = OneOf(tuple(options.choice))
    return Sampling(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        n=options.n,
        logprobs=options.logprobs,
        form=form,
    )


def _told(completion: Completion, *, as_json: bool) -> str:
    if as_json:
        return json.dumps(asdict(completion))
    return "\n".join(f"[{index}] {choice.text}" for index, choice in enumerate(completion.choices))


def _generate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraplex generate",
        description="Generate text with a tenant's adapter. The API key comes from LORAPLEX_API_KEY.",
    )
    parser.add_argument("prompt", help="sent as a chat message of the user")
    parser.add_argument(
        "--adapter", default="", help="tenant/adapter[@tag]; without it the base model answers"
    )
    add_connection(parser)
    parser.add_argument("--raw", action="store_true", help="send the prompt as it is, without chat template")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--session", default="", help="calls of one session get the same tag of a split")
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--seed", type=int)
    parser.add_argument("-n", type=int, help="completions of the prompt, 1 to 16")
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="with --json: of each token and of the K likeliest"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that this schema describes")
    form.add_argument("--regex", help="the answer matches this regular expression")
    form.add_argument(
        "--choice", action="append", metavar="TEXT", help="the answer is one of these; repeat it"
    )
    parser.add_argument("--request-id", default="", help="the same id and content again get the same answer")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for the whole call")
    parser.add_argument("--json", action="store_true", help="print the whole completion as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
