"""16 streams over 16 adapters: ours beside what else serves LoRA adapters on a CPU.

    python -m benchmarks.peers [--json] [--rounds N] [--quick] [--save] [--wrapper native|grouped]
    [--llamacpp DIR]

Peers of the bf16 base: PEFT on transformers, all rows in one batch (`adapter_names`) or one row after the other
(`set_adapter`). Peer of the base in 4 bits: llama.cpp's server, each request naming its adapter (ours in NF4). Where
llama.cpp was not built (`make llamacpp-setup`) that is said on stderr, and its lines are left out.

All of them are alive at once, and stopped while they are not asked. A round asks each in turn, a different one
first each time; ratios are taken within a round. Tokens per second count all rows, prompts included in the time.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks import options
from benchmarks.engines import Engine, EngineSpec
from benchmarks.llamacpp_peer import HOME, LlamaServer, ensure_gguf, is_built
from benchmarks.models import SHAPES, Shape, ensure_adapters, ensure_base
from benchmarks.peft_peer import PeftPeer, PeftSpec
from benchmarks.report import Measurement, as_line, as_table, save, summarize

ADAPTERS = 16
RANK = 16
PROMPT_TOKENS = 8
WARM_UP_TOKENS = 2


class Peer(Protocol):
    """A process that generates when asked."""

    started: dict[str, Any]  # what it says of itself

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Generate ``rows`` at once; the answer's ``seconds`` is the time until the last one ended."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Case:
    """One thing measured of one peer; row i uses adapter `rows[i]`."""

    name: str
    peer: str
    rows: tuple[int, ...] = tuple(range(ADAPTERS))
    serial: bool = False  # PEFT alone: one row after the other


CASES = (
    Case("ours", "ours"),
    Case("peft_mixed", "peft"),
    Case("peft_serial", "peft", rows=(0, 1), serial=True),  # one at a time: as fast as with all 16
    Case("ours_nf4", "ours_nf4"),
    Case("llamacpp", "llamacpp"),
    Case("llamacpp_one_adapter", "llamacpp", rows=(0,) * ADAPTERS),  # what it does where it may batch
)
# name, above, below, target
RATIOS = (
    ("vs_peft_mixed", "ours", "peft_mixed", 5.0),
    ("vs_peft_serial", "ours", "peft_serial", None),
    ("vs_llamacpp_16", "ours_nf4", "llamacpp", 2.0),
)


@contextlib.contextmanager
def running(
    shape: Shape, workdir: Path, *, wrapper: str, threads: int, llamacpp: Path
) -> Iterator[dict[str, Peer]]:
    """Start every peer there is, by name; they end with the block."""
    base = ensure_base(shape, workdir)
    adapters = ensure_adapters(shape, workdir, count=ADAPTERS, rank=RANK)
    directories = tuple(map(str, adapters))
    with contextlib.ExitStack() as stack:

        def started(peer: Peer) -> Peer:
            stack.callback(peer.close)
            return peer

        # Asked to compile with the pure-torch wrapper, vLLM would neither compile nor use its own fused kernels.
        ours = EngineSpec(str(base), directories, wrapper, RANK, compile=wrapper == "native")
        nf4 = replace(ours, quantization="bitsandbytes")
        peers: dict[str, Peer] = {
            "ours": started(Engine(ours, threads=threads)),
            "ours_nf4": started(Engine(nf4, threads=threads)),
            "peft": started(PeftPeer(PeftSpec(str(base), directories, threads))),
        }
        if is_built(llamacpp):
            quantized, converted = ensure_gguf(llamacpp, base, adapters)
            server = LlamaServer(llamacpp, quantized, converted, rows=ADAPTERS, threads=threads)
            peers["llamacpp"] = started(server)
        else:
            print(f"llama.cpp is absent: nothing in {llamacpp} (make llamacpp-setup)", file=sys.stderr)
        yield peers


def run_rounds(peers: dict[str, Peer], *, rounds: int, new_tokens: int) -> dict[str, list[float]]:
    """Return tokens per second by case, one value per round, after one round that is not counted."""
    rates: dict[str, list[float]] = defaultdict(list)
    cases = [case for case in CASES if case.peer in peers]
    for number in range(rounds + 1):
        turn = number % len(cases)
        for case in cases[turn:] + cases[:turn]:
            request = {"rows": case.rows, "prompt_tokens": PROMPT_TOKENS}
            request["new_tokens"] = new_tokens if number else WARM_UP_TOKENS
            if case.serial:
                request["serial"] = True
            seconds = peers[case.peer].ask(request)["seconds"]
            if number:
                rates[case.name].append(len(case.rows) * new_tokens / seconds)
            print(f"round {number}/{rounds} {case.name}: {seconds:.2f} s", file=sys.stderr)
    return rates


def summarize_rates(rates: dict[str, list[float]], prefix: str) -> list[Measurement]:
    """Return the rates and, within rounds, their ratios; only the 0.5B shape has bars to meet."""
    measurements = [summarize(f"{prefix}{name}_tok_s", values, "tok/s") for name, values in rates.items()]
    for name, above, below, target in RATIOS:
        if below in rates:
            ratios = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
            measurements.append(summarize(prefix + name, ratios, "ratio", None if prefix else target))
    return measurements


def main() -> None:
    """Parse the command line, measure, print."""
    given = _parser().parse_args()
    settings = {
        "model": given.model,
        "rounds": 2 if given.quick else given.rounds,
        "new_tokens": 6 if given.quick else 32,
        "threads": given.threads,
    }
    shape = SHAPES[given.model]
    with running(
        shape, given.workdir, wrapper=given.wrapper, threads=given.threads, llamacpp=given.llamacpp
    ) as peers:
        told = {name: peer.started for name, peer in peers.items()}
        print(told, file=sys.stderr)
        rates = run_rounds(peers, rounds=settings["rounds"], new_tokens=settings["new_tokens"])
    measurements = summarize_rates(rates, "" if shape.name == "0.5b" else f"{shape.name}_")
    print("\n".join(map(as_line, measurements)) if given.json else as_table(measurements))
    if given.save:
        save("peers", settings | {"peers": told}, measurements)


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("peers", __doc__, rounds=5)
    options.add_model(parser)
    options.add_wrapper(parser)
    parser.add_argument("--llamacpp", type=Path, default=HOME, help="where llama.cpp was built")
    return parser


if __name__ == "__main__":
    main()
