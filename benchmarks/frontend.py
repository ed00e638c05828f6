"""What the front end costs: our gRPC server against vLLM's own OpenAI HTTP server around the same engine.

    python -m benchmarks.frontend [--json] [--only CASE] [--rounds N] [--save] [--models DIR]

`vs_vllm`: 64 streams of 128 tokens at the same moment, tokens per second over all of them and the 99th percentile of
the time to the first token, both servers with the same engine settings, in turn. `guards`: our server on a port with
authentication, admission and metrics, and on one without, in turn. `push`: from the start of a signed push to the
first token of what it pushed. README.md has the method.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.frontend_servers import (
    ENVIRONMENT,
    OWN_ENVIRONMENT,
    TINY,
    EngineSettings,
    Server,
    ensure_tiny,
    our_server,
    vllm_server,
    write_settings,
)
from benchmarks.push_to_token import push_to_token
from benchmarks.report import Measurement, as_line, as_table, save, summarize
from benchmarks.stream_load import LoadProcess, Order

STREAMS = 64
TOKENS = 128
PROMPT_TOKENS = 16
ENGINE = EngineSettings()


@dataclass
class Rounds:
    """What the rounds of one contestant showed, one value a round."""

    tok_s: list[float] = field(default_factory=list)
    ttft_p99_s: list[float] = field(default_factory=list)
    gap_p99_s: list[float] = field(default_factory=list)  # between a stream's messages
    message_tokens: list[float] = field(default_factory=list)  # in one message, on average
    front_cpu_us: list[float] = field(default_factory=list)  # of the front end, per token
    engine_cpu_us: list[float] = field(default_factory=list)  # of the server's other processes, per token
    client_cores: list[float] = field(default_factory=list)  # processor seconds of the load per second


@dataclass
class Bench:
    """What the cases share."""

    models: Path
    place: Path
    rounds: int
    seed: int = 0

    def load(
        self, process: LoadProcess, server: Server, rounds: Rounds, *, protocol: str, port: int = 0
    ) -> None:
        """Let one server have its turn, after a short one to wake it up."""
        self.seed += 1
        order = Order(
            protocol, port or server.port, STREAMS, TOKENS, PROMPT_TOKENS, self.seed, key=server.key
        )
        with server.awake():
            process.ask(Order(**{**asdict(order), "streams": 4, "tokens": 4, "seed": -self.seed}))
            before = server.cpu_s()
            found = process.ask(order)
            after = server.cpu_s()
        if found.tokens != STREAMS * TOKENS:
            raise RuntimeError(f"{found.tokens} tokens came instead of {STREAMS * TOKENS}")
        rounds.tok_s.append(found.tokens / found.seconds)
        rounds.ttft_p99_s.append(statistics.quantiles(found.first_s, n=100, method="inclusive")[98])
        rounds.gap_p99_s.append(found.gap_p99_s)
        rounds.message_tokens.append(found.tokens / found.messages)
        rounds.front_cpu_us.append((after[0] - before[0]) / found.tokens * 1e6)
        rounds.engine_cpu_us.append((after[1] - before[1]) / found.tokens * 1e6)
        rounds.client_cores.append(found.client_cpu_s / found.seconds)


def vs_vllm(bench: Bench) -> list[Measurement]:
    """Our server, vLLM's in our environment, and vLLM's in its own, all without LoRA."""
    return against_http(bench, ENGINE, "")


def vs_vllm_lora(bench: Bench) -> list[Measurement]:
    """The same with LoRA on, our wrapper in both engines, and no call that uses an adapter."""
    return against_http(bench, replace(ENGINE, lora=True), "_lora")


def against_http(bench: Bench, engine: EngineSettings, suffix: str) -> list[Measurement]:
    """Let the servers have their turns, each round in another order."""
    base = ensure_tiny(bench.models)
    settings, key = write_settings(bench.place, base, engine)
    found = {"ours": Rounds(), "http": Rounds(), "http_own": Rounds()}
    with ExitStack() as stack:
        servers = {"ours": stack.enter_context(our_server(bench.place, settings, key))}
        servers["ours"].stop()
        for name, environment in (("http", ENVIRONMENT), ("http_own", OWN_ENVIRONMENT)):
            servers[name] = stack.enter_context(
                vllm_server(bench.place, base, engine, environment=environment)
            )
            servers[name].stop()
        process = stack.enter_context(LoadProcess())
        for number in range(bench.rounds + 1):
            names = list(servers)
            for name in names[number % 3 :] + names[: number % 3]:
                rounds = found[name] if number else Rounds()  # the first round warms up
                bench.load(process, servers[name], rounds, protocol="grpc" if name == "ours" else "http")
    ours, http, own = found.values()
    targets = (None, None) if suffix else (1.5, 0.6)
    return [
        ratio(f"tok_s_vs_vllm_http{suffix}", ours.tok_s, http.tok_s, targets[0]),
        ratio(f"ttft_p99_vs_vllm_http{suffix}", ours.ttft_p99_s, http.ttft_p99_s, targets[1]),
        ratio(f"gap_p99_vs_vllm_http{suffix}", ours.gap_p99_s, http.gap_p99_s),
        ratio(f"tok_s_vs_own_vllm_http{suffix}", ours.tok_s, own.tok_s),
        ratio(f"ttft_p99_vs_own_vllm_http{suffix}", ours.ttft_p99_s, own.ttft_p99_s),
        *(one for name, rounds in found.items() for one in details(f"{name}{suffix}", rounds)),
    ]


def engine(bench: Bench) -> list[Measurement]:
    """The same engine without a port: what no front end can exceed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.engine_alone",
        str(ensure_tiny(bench.models)),
        str(bench.rounds),
    ]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    rounds = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    return [
        summarize("engine_alone_tok_s", [one["tok_s"] for one in rounds], "tokens/s"),
        summarize("engine_alone_ttft_p99_s", [one["ttft_p99_s"] for one in rounds], "s"),
    ]


def guards(bench: Bench) -> list[Measurement]:
    """One server, through the port with authentication, admission and metrics, and through the one without."""
    base = ensure_tiny(bench.models)
    settings, key = write_settings(bench.place, base, ENGINE)
    found = {"guarded": Rounds(), "bare": Rounds()}
    with (
        our_server(bench.place, settings, key, module="benchmarks.bare_port") as server,
        LoadProcess() as process,
    ):
        server.stop()
        ports = {"guarded": server.port, "bare": server.bare_port}
        for number in range(3 * bench.rounds + 1):
            for name in sorted(ports, reverse=bool(number % 2)):
                rounds = found[name] if number else Rounds()
                bench.load(process, server, rounds, protocol="grpc", port=ports[name])
    guarded, bare = found.values()
    cost = [with_out / with_ - 1 for with_, with_out in zip(guarded.tok_s, bare.tok_s, strict=True)]
    cpu = [a - b for a, b in zip(guarded.front_cpu_us, bare.front_cpu_us, strict=True)]
    return [
        summarize("guards_cost_ratio", cost, "ratio", 0.03),
        summarize("guards_cpu_us_per_token", cpu, "us"),
        *(one for name, rounds in found.items() for one in details(name, rounds)),
    ]


def push(bench: Bench) -> list[Measurement]:
    """See `benchmarks.push_to_token`."""
    return push_to_token(bench.models, bench.rounds)


CASES: dict[str, Callable[[Bench], list[Measurement]]] = {
    "vs_vllm": vs_vllm,
    "vs_vllm_lora": vs_vllm_lora,
    "engine": engine,
    "guards": guards,
    "push": push,
}


def ratio(
    name: str, ours: Sequence[float], theirs: Sequence[float], target: float | None = None
) -> Measurement:
    """Return the median of ours / theirs within a round."""
    return summarize(name, [a / b for a, b in zip(ours, theirs, strict=True)], "ratio", target)


def details(name: str, rounds: Rounds) -> list[Measurement]:
    """What the ratios are made of, and whether the load was in the way."""
    return [
        summarize(f"{name}_tok_s", rounds.tok_s, "tokens/s"),
        summarize(f"{name}_ttft_p99_s", rounds.ttft_p99_s, "s"),
        summarize(f"{name}_gap_p99_s", rounds.gap_p99_s, "s"),
        summarize(f"{name}_tokens_per_message", rounds.message_tokens, "tokens"),
        summarize(f"{name}_front_cpu_us_per_token", rounds.front_cpu_us, "us"),
        summarize(f"{name}_engine_cpu_us_per_token", rounds.engine_cpu_us, "us"),
        summarize(f"{name}_client_cores", rounds.client_cores, "cores"),
    ]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser("benchmarks.frontend", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON lines on stdout and nothing else")
    parser.add_argument("--only", choices=list(CASES), help="run one case")
    parser.add_argument("--rounds", type=int, default=11, help="rounds after the one that warms up")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/frontend.json")
    parser.add_argument("--models", type=Path, help="keep the generated models here and reuse them")
    options = parser.parse_args()
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as scratch:
        for name, case in CASES.items():
            if options.only in (None, name):
                print(f"{name} ...", file=sys.stderr, flush=True)
                place = Path(scratch) / name
                place.mkdir()
                found += case(Bench(options.models or Path(scratch), place, options.rounds))
    print("\n".join(map(as_line, found)) if options.json else as_table(found))
    if options.save:
        settings: dict[str, Any] = {
            "only": options.only,
            "rounds": options.rounds,
            "streams": STREAMS,
            "tokens": TOKENS,
            "prompt_tokens": PROMPT_TOKENS,
            "engine": asdict(ENGINE),
            "base": asdict(TINY),
            "environment": dict(ENVIRONMENT),
        }
        save("frontend", settings, found)


if __name__ == "__main__":
    main()
