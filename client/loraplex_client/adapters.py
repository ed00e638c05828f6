"""`loraplex adapters`: what a running server holds, and bringing adapters in and out by hand.

list, show, load, unload, pin, unpin, validate, rollout, resume. Every word has `--json`, one object per line, with the
fields of the client's dataclasses. Exit status 0, 1 with one line saying why not, 2 for wrong usage; `validate` ends
with 1 where a load would fail. The API key comes from LORAPLEX_API_KEY.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Final

from loraplex_client.client import Client
from loraplex_client.connecting import add_connection, connected
from loraplex_client.errors import LoraplexError
from loraplex_client.types import AdapterInfo, RolloutArm

_MIB: Final = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with connected(options) as client:
            return _COMMANDS[options.command](client, options)
    except LoraplexError as error:
        print(f"loraplex adapters: {error}" + (f" [{error.code}]" if error.code else ""), file=sys.stderr)
    except OSError as error:
        print(f"loraplex adapters: {error.filename}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def _list(client: Client, options: argparse.Namespace) -> int:
    _tell(options, client.list_adapters(timeout_s=options.timeout), _line)
    return 0


def _show(client: Client, options: argparse.Namespace) -> int:
    _tell(options, [client.get_adapter(options.adapter, timeout_s=options.timeout)], _line)
    return 0


def _load(client: Client, options: argparse.Namespace) -> int:
    steps = client.load_adapter(options.adapter, stage_only=options.stage_only, timeout_s=options.timeout)
    for step in steps:
        if options.json:
            print(json.dumps(asdict(step)), flush=True)
        elif step.adapter is not None:
            print(f"{step.adapter.name} is {step.adapter.state} after {step.elapsed_s:.2f} s")
        else:
            of = f" of {step.total_bytes / _MIB:.1f} MiB" if step.total_bytes else ""
            done = f"  {step.done_bytes / _MIB:.1f}{of}" if step.done_bytes else ""
            print(f"{step.elapsed_s:7.2f} s  {step.phase}{done}", flush=True)
    return 0


def _unload(client: Client, options: argparse.Namespace) -> int:
    was_there = client.unload_adapter(options.adapter, timeout_s=options.timeout)
    if options.json:
        print(json.dumps({"was_resident": was_there}))
    else:
        print(f"{options.adapter} {'has left' if was_there else 'was not there'}")
    return 0


def _pin(client: Client, options: argparse.Namespace) -> int:
    _tell(options, [client.pin_adapter(options.adapter, timeout_s=options.timeout)], _line)
    return 0


def _unpin(client: Client, options: argparse.Namespace) -> int:
    _tell(options, [client.unpin_adapter(options.adapter, timeout_s=options.timeout)], _line)
    return 0


def _validate(client: Client, options: argparse.Namespace) -> int:
    report = client.validate_adapter(options.adapter, timeout_s=options.timeout)
    if options.json:
        print(json.dumps(asdict(report)))
        return 0 if report.valid else 1
    for check in report.checks:
        why = f"  {check.reason}: {check.detail}" if check.reason else f"  {check.detail}".rstrip()
        print(f"{check.outcome.replace('_', ' '):9} {check.name}{why}")
    if report.valid:
        slot = "a slot at once" if report.slot_at_once else "no slot before a call ends"
        leaves = ", and another adapter leaves" if report.evicts else ""
        staged, reserved = report.staged_bytes / _MIB, report.slot_bytes / _MIB
        print(f"would load: {staged:.1f} MiB staged, {reserved:.1f} MiB of a slot, {slot}{leaves}")
    return 0 if report.valid else 1


def _rollout(client: Client, options: argparse.Namespace) -> int:
    return _tell_arms(options, client.get_rollout(options.adapter, timeout_s=options.timeout))


def _resume(client: Client, options: argparse.Namespace) -> int:
    return _tell_arms(options, client.resume_rollout(options.adapter, timeout_s=options.timeout))


def _tell_arms(options: argparse.Namespace, arms: Sequence[RolloutArm]) -> int:
    if not arms and not options.json:
        print(f"calls for {options.adapter} are not split here")
    _tell(options, arms, _arm_line)
    return 0


def _tell(options: argparse.Namespace, found: Iterable[Any], line: Callable[[Any], str]) -> None:
    for one in found:
        print(json.dumps(asdict(one)) if options.json else line(one), flush=True)


def _line(adapter: AdapterInfo) -> str:
    more = [f"{adapter.active_requests} running"] if adapter.active_requests else []
    more += ["pinned"] if adapter.pinned else []
    size = f"rank {adapter.rank}  {adapter.size_bytes / _MIB:.1f} MiB" if adapter.rank else ""
    return f"{adapter.state:9} {adapter.name}  version {adapter.version}  {size}  {', '.join(more)}".rstrip()


def _arm_line(arm: RolloutArm) -> str:
    if not arm.digest:
        return f"{arm.tag:12} is not set"
    seen = f"{arm.completed} completed, {arm.failed} failed"
    times = (
        f", medians {arm.first_token_s:.3g} s to the first token, {arm.token_s:.3g} s a token"
        if arm.token_s
        else ""
    )
    why = f"; rolled back: {arm.rolled_back}" if arm.rolled_back else ""
    return f"{arm.tag:12} {arm.share:4.0%} of calls (weight {arm.weight})  {arm.digest}  {seen}{times}{why}"


_COMMANDS: Final[Mapping[str, Callable[[Client, argparse.Namespace], int]]] = MappingProxyType(
    {
        "list": _list,
        "show": _show,
        "load": _load,
        "unload": _unload,
        "pin": _pin,
        "unpin": _unpin,
        "validate": _validate,
        "rollout": _rollout,
        "resume": _resume,
    }
)
_HELP: Final = {
    "list": "those on the server that this key may see",
    "show": "one, on the server or not",
    "load": "bring one in, telling each phase",
    "unload": "free its slot and memory once its calls have ended (admin)",
    "pin": "bring one in and keep it (admin)",
    "unpin": "let it be evicted again (admin)",
    "validate": "every check of a load without loading, and what one would need",
    "rollout": "how calls are split between its tags, and how its canary does",
    "resume": "give a canary that was rolled back its share again (admin)",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loraplex adapters", description=(__doc__ or "").split("\n")[0])
    words = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _HELP.items():
        word = words.add_parser(name, help=text, description=text)
        if name in ("rollout", "resume"):
            word.add_argument("adapter", help="tenant/adapter")
        elif name != "list":
            word.add_argument("adapter", help="tenant/adapter[@tag]")
        if name == "load":
            word.add_argument("--stage-only", action="store_true", help="only into memory, without a slot")
        add_connection(word)
        word.add_argument("--timeout", type=float, default=120.0, help="seconds for the whole call")
        word.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
