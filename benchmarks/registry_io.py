"""How fast the registry moves adapters, against tools that verify nothing, on the same server in one run.

    python -m benchmarks.registry_io [--json] [--only NAME] [--save] [--rounds-factor F]

The rivals live in `.venv-bench` (`make bench-setup`). The server is `benchmarks.s3_files`; what is downloaded lies on
disk. In each round every tool has its turn, in rotating order; ratios are taken within a round, and below 1 means that
we are faster.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.registry_world import (
    BENCH_BIN,
    BUCKET,
    HIDDEN,
    LinkingStore,
    RivalProcess,
    World,
    command_seconds,
    served,
    world,
)
from benchmarks.report import Measurement, as_line, as_table, save, summarize
from loraplex_registry.delivery import fetch
from loraplex_registry.encryption.kek_file import generate_encryption_key
from loraplex_registry.encryption.key_providers import KeyRing
from loraplex_registry.refs import AdapterRef
from loraplex_registry.registry import Registry
from loraplex_registry.storage.store import CountingStore, open_store
from loraplex_registry.validation.weights import Limits

REGISTRY_COMMAND = Path(sys.executable).with_name("registry")
MANY_ADAPTERS = 100_000
FEW_ADAPTERS = 100
SMALL_ADAPTERS = 1000
SMALL_MIB = 8
SMALL_THREADS = 32
Turn = Callable[[], float]


@dataclass
class Bench:
    """One run: the world, the rivals, and how many rounds a case gets."""

    place: World
    rivals: RivalProcess
    factor: float
    _targets: int = 0

    def rounds(self, count: int) -> int:
        """Scale a number of rounds."""
        return max(3, round(count * self.factor))

    def registry(self, root: str) -> Registry:
        """Return the registry below a root of the bucket, on the server."""
        return Registry(open_store(f"s3://{BUCKET}/{root}", endpoint_url=self.place.endpoint))

    def target(self) -> Path:
        """Return a new path on disk."""
        self._targets += 1
        return self.place.disk / f"target{self._targets}"

    def pulled(self, registry: Registry, ref: AdapterRef, keys: KeyRing | None = None) -> float:
        """Resolve, verify and fetch to a directory the engine can load; return the seconds."""
        target = self.target()
        started = time.perf_counter()
        verified = registry.verify(registry.resolve(ref), self.place.policy)
        fetch.stage(registry._store, verified, target, base=self.place.base, limits=Limits(), keys=keys)
        seconds = time.perf_counter() - started
        shutil.rmtree(target)
        return seconds

    def rival(self, tool: str, keys: list[str]) -> float:
        """Have a warm rival download objects; return the seconds."""
        target = self.target()
        seconds = self.rivals.ask(do=tool, keys=keys, target=str(target))
        shutil.rmtree(target)
        return seconds

    def aws(self, prefix: str) -> float:
        """Have the AWS command download a prefix; return the seconds of the process."""
        target = self.target()
        seconds = command_seconds(
            [BENCH_BIN / "aws", "s3", "cp", "--recursive", "--quiet", f"s3://{BUCKET}/{prefix}", target],
            self.place,
        )
        shutil.rmtree(target)
        return seconds


def in_turn(turns: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Let each have its turn in each round, a different one first each time; return the times of the rounds."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = turns[name]()
            if number:  # the first round warms up
                found[name].append(seconds)
    return found


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float], target: float) -> Measurement:
    """Return the median of ours / theirs within a round."""
    return summarize(name, [a / b for a, b in zip(ours, theirs, strict=True)], "ratio", target)


def seconds_of(prefix: str, times: dict[str, list[float]]) -> list[Measurement]:
    """Return the median time of each tool."""
    return [summarize(f"{prefix}_{name}_s", values, "s") for name, values in times.items()]


def pull_case(mib: int, rounds: int) -> Callable[[Bench], list[Measurement]]:
    """Pull and verify an adapter of this size, against the fastest that verifies nothing."""

    def measure(bench: Bench) -> list[Measurement]:
        registry = bench.registry("pulls")
        keys = [f"plain{mib}/adapter_config.json", f"plain{mib}/adapter_model.safetensors"]
        ref = AdapterRef("acme", f"a{mib}", tag="prod")
        turns: dict[str, Turn] = {
            "ours": lambda: bench.pulled(registry, ref),
            "obstore": lambda: bench.rival("obstore", keys),
            "boto3": lambda: bench.rival("boto3", keys),
        }
        times = in_turn(turns, bench.rounds(rounds))
        times["aws"] = [bench.aws(f"plain{mib}") for _ in range(3)]
        fastest = min(("obstore", "boto3"), key=lambda name: statistics.median(times[name]))
        if statistics.median(times["aws"]) < statistics.median(times[fastest]):
            raise RuntimeError("the command is the fastest: give it a turn in each round")
        name = f"pull{mib}_verify_vs_fastest"
        return [ratio(name, times["ours"], times[fastest], 1.05), *seconds_of(f"pull{mib}", times)]

    return measure


def push16(bench: Bench) -> list[Measurement]:
    """Push 16 MiB with cold processes."""
    directory = bench.place.adapter(16)
    command_seconds(
        [REGISTRY_COMMAND, "doctor"], bench.place
    )  # a bucket is probed once before the first write
    number = iter(range(10_000))
    turns: dict[str, Turn] = {
        "ours": lambda: command_seconds(
            [REGISTRY_COMMAND, "push", directory, f"acme/push{next(number)}"], bench.place
        ),
        "awscli": lambda: command_seconds(
            [
                BENCH_BIN / "aws",
                "s3",
                "cp",
                "--recursive",
                "--quiet",
                directory,
                f"s3://{BUCKET}/raw{next(number)}",
            ],
            bench.place,
        ),
    }
    times = in_turn(turns, bench.rounds(11))
    return [ratio("push16_vs_awscli", times["ours"], times["awscli"], 1.0), *seconds_of("push16", times)]


def decrypt(bench: Bench) -> list[Measurement]:
    """Pull an encrypted adapter of 64 MiB, against the same in clear."""
    registry = bench.registry("pulls")
    ring = KeyRing([f"file:{bench.place.disk}/acme.kek"])
    turns: dict[str, Turn] = {
        "encrypted": lambda: bench.pulled(registry, AdapterRef("acme", "sealed64", tag="prod"), ring),
        "clear": lambda: bench.pulled(registry, AdapterRef("acme", "a64", tag="prod")),
    }
    times = in_turn(turns, bench.rounds(9))
    found = ratio("decrypt_pull_ratio", times["encrypted"], times["clear"], 1.3)
    return [found, *seconds_of("decrypt64", times)]


def resolve(bench: Bench) -> list[Measurement]:
    """Resolve a tag, against boto3 reading the same object; and how many requests it takes."""
    import boto3

    ref = AdapterRef("acme", "a16", tag="prod")
    registry = bench.registry("pulls")
    client = boto3.client("s3", endpoint_url=bench.place.endpoint)
    key = "pulls/t/acme/a/a16/tags/prod.json"
    turns: dict[str, Turn] = {
        "ours": lambda: _mean_seconds(lambda: registry.resolve(ref), 20),
        "get": lambda: _mean_seconds(lambda: client.get_object(Bucket=BUCKET, Key=key)["Body"].read(), 20),
    }
    times = in_turn(turns, bench.rounds(25))
    store = CountingStore(open_store(f"s3://{BUCKET}/pulls", endpoint_url=bench.place.endpoint))
    Registry(store).resolve(ref)
    return [
        ratio("resolve_vs_bare_get", times["ours"], times["get"], 1.15),
        Measurement("resolve_requests", store.requests, "requests", 1.0, 1, None),
        *seconds_of("resolve", times),
    ]


def _mean_seconds(call: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def small(bench: Bench) -> list[Measurement]:
    """1,000 adapters of 8 MiB, 32 at once, against raw GETs of the same objects into files. A quarter per round."""
    registry = bench.registry("small")
    rounds = 4
    share = SMALL_ADAPTERS // rounds
    blobs = sorted(
        str(path.relative_to(bench.place.bucket))
        for path in (bench.place.bucket / "small").glob("t/acme/a/*/b/*/*")
    )
    ours, theirs = [], []

    def one(name: str) -> None:
        root = bench.target()
        verified = registry.verify(registry.resolve(AdapterRef("acme", name, tag="prod")), bench.place.policy)
        registry.fetch(verified, root, base=bench.place.base)
        shutil.rmtree(root)

    for number in range(rounds):
        part = range(number * share, (number + 1) * share)
        started = time.perf_counter()
        with ThreadPoolExecutor(SMALL_THREADS) as pool:
            list(pool.map(one, [f"s{index}" for index in part]))
        ours.append(time.perf_counter() - started)
        target = bench.target()
        theirs.append(
            bench.rivals.ask(
                do="many", keys=[blobs[i] for i in part], target=str(target), threads=SMALL_THREADS
            )
        )
        shutil.rmtree(target)
    speeds = [share / seconds for seconds in ours]
    return [
        ratio("small1000_vs_raw", theirs, ours, 0.9),
        summarize("small1000_adapters_per_s", speeds, "1/s"),
        summarize("small1000_raw_per_s", [share / seconds for seconds in theirs], "1/s"),
    ]


def cli_start(bench: Bench) -> list[Measurement]:
    """Start of the command."""
    times = [command_seconds([REGISTRY_COMMAND, "--version"], bench.place) for _ in range(bench.rounds(15))]
    return [summarize("cli_start_s", times, "s", 0.35)]


def scale(bench: Bench) -> list[Measurement]:
    """Resolve and list with 100 and with 100,000 adapters in the tenant."""
    few, many = bench.registry("few"), bench.registry("many")
    names = list(few.adapters("acme"))

    def resolving(registry: Registry) -> Turn:
        refs = [AdapterRef("acme", name, tag="prod") for name in names[:20]]
        return lambda: _mean_seconds(lambda: [registry.resolve(ref) for ref in refs], 1) / len(refs)

    def listing(registry: Registry, count: int) -> Turn:
        def list_all() -> float:
            started = time.perf_counter()
            found = sum(1 for _ in registry.adapters("acme"))
            assert found == count
            return (time.perf_counter() - started) / count

        return list_all

    resolved = in_turn({"few": resolving(few), "many": resolving(many)}, bench.rounds(15))
    listed = in_turn(
        {"few": listing(few, FEW_ADAPTERS), "many": listing(many, MANY_ADAPTERS)}, bench.rounds(5)
    )
    return [
        ratio("resolve_100k_vs_100", resolved["many"], resolved["few"], 1.2),
        ratio("list_100k_vs_100", listed["many"], listed["few"], 1.2),
        *seconds_of("list_per_item", listed),
    ]


CASES: dict[str, tuple[Callable[[Bench], list[Measurement]], tuple[str, ...]]] = {
    "push16": (push16, ()),
    "pull16": (pull_case(16, 21), ("pull16",)),
    "pull64": (pull_case(64, 13), ("pull64",)),
    "pull256": (pull_case(256, 9), ("pull256",)),
    "decrypt": (decrypt, ("pull64", "sealed64")),
    "resolve": (resolve, ("pull16",)),
    "small1000": (small, ("small",)),
    "cli_start": (cli_start, ()),
    "scale": (scale, ("scale",)),
}
"""Name of a case -> what measures it, and what it needs in the world."""


def fill(place: World, needs: set[str]) -> None:
    """Put into the world what the chosen cases need."""
    for mib in (16, 64, 256):
        if f"pull{mib}" in needs:
            place.seed("pulls", f"a{mib}", mib)
            place.plain(mib)
    if "sealed64" in needs:
        from loraplex_registry.encryption.data_keys import RingSealer

        generate_encryption_key(place.disk / "acme.kek", "acme")
        place.seed("pulls", "sealed64", 64, sealer=RingSealer(KeyRing([f"file:{place.disk}/acme.kek"])))
    if "small" in needs:
        _fill_small(place)
    if "scale" in needs:
        _fill_scale(place)


def _fill_small(place: World) -> None:
    directory = place.adapter(SMALL_MIB)
    registry = Registry(LinkingStore(place.bucket / "small"))
    for index in range(SMALL_ADAPTERS):
        ref = AdapterRef("acme", f"s{index}")
        registry.publish(directory, ref, place.signer, place.base, tag="prod")


def _fill_scale(place: World) -> None:
    """100 real adapters in both; in one of them 99,900 more that exist as keys, with the objects of the first."""
    directory = place.adapter(1)
    for root in ("few", "many"):
        registry = Registry(LinkingStore(place.bucket / root))
        for index in range(FEW_ADAPTERS):
            ref = AdapterRef("acme", f"a{index * (MANY_ADAPTERS // FEW_ADAPTERS):06}")
            registry.publish(directory, ref, place.signer, place.base, tag="prod")
    adapters = place.bucket / "many/t/acme/a"
    objects = [adapters / "a000000/tags/prod.json", adapters / "a000000/v/1.json"]
    for index in range(MANY_ADAPTERS):
        place_of = adapters / f"a{index:06}"
        if not place_of.exists():
            for found in objects:
                copy = place_of / found.parent.name
                copy.mkdir(parents=True)
                (copy / found.name).hardlink_to(found)


def measure(only: str | None, factor: float) -> list[Measurement]:
    """Run the cases and return what they found."""
    chosen = {name: case for name, case in CASES.items() if only in (None, name)}
    found: list[Measurement] = []
    with world() as place:
        fill(place, {need for _, needs in chosen.values() for need in needs})
        place.adapter(16)
        with served(place):
            rivals = RivalProcess(place)
            bench = Bench(place, rivals, factor)
            for name, (case, _) in chosen.items():
                print(f"{name} ...", file=sys.stderr, flush=True)
                found += case(bench)
            rivals.close()
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser("benchmarks.registry_io", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON lines on stdout and nothing else")
    parser.add_argument("--only", choices=list(CASES), help="run one case")
    parser.add_argument("--rounds-factor", type=float, default=1.0, help="scale the number of rounds")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/registry_io.json")
    options = parser.parse_args()
    if not (BENCH_BIN / "python").exists():
        sys.exit("The tools to compare with are not installed; run `make bench-setup` once.")
    found = measure(options.only, options.rounds_factor)
    print("\n".join(map(as_line, found)) if options.json else as_table(found))
    if options.save:
        settings: dict[str, Any] = {
            "only": options.only,
            "rounds_factor": options.rounds_factor,
            "hidden": HIDDEN,
        }
        save("registry_io", settings, found)


if __name__ == "__main__":
    main()
