"""Many streams at once against a server of tokens: the load of `benchmarks.frontend`, in a process of its own.

Reads one JSON order per line and answers with one JSON object per line, see `Order` and `Load`. Both clients are a
socket and as little else as will do (`benchmarks.lean_clients`), so that the servers are measured and not the clients.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Self

from benchmarks.lean_clients import GrpcConnection, HttpConnection, Stream
from loraplex_protos.v1 import generation_pb2

LOAD_S_MAX = 120.0
_VOCABULARY = 600  # prompts are token ids below this


@dataclass(frozen=True)
class Order:
    """Ask for `streams` streams of `tokens` tokens at the same moment.

    Attributes:
        protocol: "grpc" or "http".
        key: API key, "" for none.
        adapter: sent along as the adapter (gRPC) or model (HTTP).
        seed: of the prompts; another seed, other prompts, so that no prefix cache answers.
    """

    protocol: str
    port: int
    streams: int
    tokens: int
    prompt_tokens: int
    seed: int
    adapter: str = ""
    key: str = ""


@dataclass(frozen=True)
class Load:
    """What a load took.

    Attributes:
        seconds: of the wall clock, from the first request to the last end.
        first_s: to each stream's first token.
        gap_p99_s: 99th percentile of the times between one message of a stream and the next.
        messages: that tokens came in; fewer than tokens where a server joins them.
        client_cpu_s: processor seconds of this process.
    """

    seconds: float
    first_s: list[float]
    gap_p99_s: float
    messages: int
    tokens: int
    client_cpu_s: float


class LoadProcess:
    """The process that carries out orders."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stream_load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, order: Order) -> Load:
        """Have an order carried out.

        Raises:
            RuntimeError: it failed; the process's stderr says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load's process ended with status {self._process.wait()}")
        return Load(**json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def prompts(order: Order) -> list[list[int]]:
    """One prompt for each stream, all different."""
    rng = random.Random(order.seed)
    return [
        [rng.randrange(10, _VOCABULARY) for _ in range(order.prompt_tokens)] for _ in range(order.streams)
    ]


async def carry_out(order: Order) -> Load:
    """Connect, start the clock, stream everything to its end."""
    async with asyncio.timeout(LOAD_S_MAX):
        return await (_over_grpc if order.protocol == "grpc" else _over_http)(order)


async def _timed(streams: list[Stream], calls: list[Callable[[], Awaitable[None]]]) -> Load:
    """Run the calls together and account for them."""
    cpu, started = time.process_time(), time.perf_counter()
    await asyncio.gather(*(call() for call in calls))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    gaps = [later - earlier for one in streams for earlier, later in pairwise(one.arrivals)]
    return Load(
        seconds=seconds,
        first_s=[one.arrivals[0] - one.started for one in streams],
        gap_p99_s=statistics.quantiles(gaps, n=100)[98] if len(gaps) > 1 else 0.0,
        messages=sum(len(one.arrivals) for one in streams),
        tokens=sum(one.tokens for one in streams),
        client_cpu_s=cpu,
    )


async def _over_grpc(order: Order) -> Load:
    streams = [Stream() for _ in range(order.streams)]
    requests = [_grpc_request(order, prompt) for prompt in prompts(order)]
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: GrpcConnection(order.key), "127.0.0.1", order.port
    )
    try:
        await connection.ready
        asked = zip(streams, requests, strict=True)
        return await _timed(streams, [partial(connection.ask, stream, request) for stream, request in asked])
    finally:
        connection.close()


def _grpc_request(order: Order, prompt: list[int]) -> bytes:
    return generation_pb2.GenerateRequest(
        adapter=order.adapter,
        token_ids=generation_pb2.TokenIds(ids=prompt),
        sampling=generation_pb2.SamplingParams(max_tokens=order.tokens, temperature=0, ignore_eos=True),
    ).SerializeToString()


async def _over_http(order: Order) -> Load:
    loop = asyncio.get_running_loop()
    streams = [Stream() for _ in range(order.streams)]
    requests = [_http_request(order, prompt) for prompt in prompts(order)]
    connections = [
        (await loop.create_connection(partial(HttpConnection, stream), "127.0.0.1", order.port))[1]
        for stream in streams
    ]
    try:
        asked = zip(connections, requests, strict=True)
        return await _timed(streams, [partial(connection.ask, request) for connection, request in asked])
    finally:
        for connection in connections:
            connection.close()


def _http_request(order: Order, prompt: list[int]) -> bytes:
    body = {
        "model": order.adapter or "tiny",
        "prompt": prompt,
        "max_tokens": order.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    head = [
        "POST /v1/completions HTTP/1.1",
        f"Host: 127.0.0.1:{order.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    if order.key:
        head.append(f"Authorization: Bearer {order.key}")
    return "\r\n".join([*head, "", ""]).encode() + data


def main() -> None:
    """Carry out orders until standard input ends."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:  # reading blocks the loop, which has nothing to do meanwhile
            load = runner.run(carry_out(Order(**json.loads(line))))
            print(json.dumps(asdict(load)), flush=True)


if __name__ == "__main__":
    main()
