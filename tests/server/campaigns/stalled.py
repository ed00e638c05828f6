"""Readers that stop reading: what the server keeps for them, and what their neighbours feel."""

import asyncio
import contextlib
import time
from dataclasses import dataclass

from benchmarks.lean_clients import GrpcConnection, Stream
from loraplex_client import AsyncClient, LoraplexError, Sampling
from loraplex_protos.v1 import generation_pb2
from loraplex_server.identity.api_keys import make_key
from tests.server.campaigns.load import p99
from tests.server.conftest import Shop
from tests.server.process import ServerProcess, serving, write_settings

BATCH = 16  # fewer than there are stalled readers
TOKENS = 2_000  # of each answer
WINDOW = 512  # bytes of an answer that a stalled reader takes


@dataclass
class Stalled:
    """What readers that do not read did.

    Attributes:
        alone_s, beside_s: 99th percentile of a neighbour's calls, in seconds.
        expired: calls of the neighbour that had no answer within two seconds.
        bytes_each: the server's growth for each reader.
        held: calls in flight when the neighbour had been answered.
        accounted: whether the metrics give every call one outcome.
        left: calls in flight and waiting after the readers hung up.
    """

    alone_s: float
    beside_s: float
    expired: int
    bytes_each: float
    held: int
    accounted: bool
    left: dict[str, float]


async def stalled_readers(shop: Shop, *, readers: int, calls: int) -> Stalled:
    """So many readers take the beginning of a long answer and then nothing; a neighbour goes on calling."""
    stalled_key, stalled_entry = make_key("stalled", "acme")
    polite_key, polite_entry = make_key("polite", "globex")
    (shop.root / "keys.toml").write_text(stalled_entry + polite_entry)
    settings = write_settings(
        shop, model={"batch_requests": BATCH}, auth={"keys": "keys.toml"}, limits={"requests_max": 1000}
    )
    with serving(settings, context=TOKENS + 10) as server:
        async with AsyncClient(server.target, api_key=polite_key, timeout_s=2) as polite:
            alone = await _latencies(polite, calls)
            before = server.rss_bytes()
            connection, streams = await _stop_reading(server, stalled_key, readers)
            await _until_generated(server, readers)
            beside = await _latencies(polite, calls)
            grown = server.rss_bytes() - before
            held = int(server.metrics().total("loraplex_requests_in_flight"))
            connection.close()
            await asyncio.gather(*streams, return_exceptions=True)
            left = await _left(server)
            outcomes = server.metrics().outcomes()
    return Stalled(
        alone_s=p99(alone),
        beside_s=p99(beside),
        expired=outcomes["expired"],
        bytes_each=grown / readers,
        held=held,
        accounted=sum(outcomes.values()) == readers + 2 * calls,
        left=left,
    )


async def _stop_reading(
    server: ServerProcess, key: str, readers: int
) -> tuple[GrpcConnection, list["asyncio.Task[None]"]]:
    """Ask for answers over a connection that takes `WINDOW` bytes of each."""
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: GrpcConnection(key, window=WINDOW), "127.0.0.1", server.port
    )
    await connection.ready
    request = generation_pb2.GenerateRequest(
        text="x", sampling=generation_pb2.SamplingParams(max_tokens=TOKENS)
    ).SerializeToString()
    return connection, [asyncio.create_task(connection.ask(Stream(), request)) for _ in range(readers)]


async def _until_generated(server: ServerProcess, readers: int) -> None:
    """Wait until the engine has generated every token; five seconds at most, for it might wait for readers."""
    for _ in range(50):
        if server.metrics().total("loraplex_generated_tokens_total", "acme") >= readers * TOKENS:
            return
        await asyncio.sleep(0.1)


async def _latencies(client: AsyncClient, calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        with contextlib.suppress(LoraplexError):  # it took as long as it took: the time tells
            await client.generate("x", sampling=Sampling(max_tokens=20))
        found.append(time.perf_counter() - started)
    return found


async def _left(server: ServerProcess) -> dict[str, float]:
    """What is still there, five seconds after the readers hung up at most."""
    for _ in range(50):
        page = server.metrics()
        left = {name: page.total(f"loraplex_requests_{name}") for name in ("in_flight", "waiting")}
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    return left
