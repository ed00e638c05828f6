"""Readers that stop reading: what the server keeps for them, and what their neighbours feel."""

import asyncio
import contextlib
import time
from dataclasses import dataclass

import grpc

from loraplex_client import AsyncClient, LoraplexError, Sampling
from loraplex_protos.v1 import generation_pb2, generation_pb2_grpc
from loraplex_server.identity.api_keys import make_key
from tests.server.campaigns.load import p99
from tests.server.conftest import Shop
from tests.server.process import ServerProcess, serving, write_settings

BATCH = 16  # fewer than there are stalled readers
CONTEXT = 20_000  # tokens: far more than the network holds for a reader that does not read


@dataclass
class Stalled:
    """99th percentile of a neighbour's calls in seconds, alone and beside; the server's growth for each reader."""

    alone_s: float
    beside_s: float
    bytes_each: float
    held: int
    accounted: bool
    left: dict[str, float]


async def stalled_readers(shop: Shop, *, readers: int, calls: int, settle_s: float = 2.0) -> Stalled:
    """So many readers of long answers read one message and then nothing; a neighbour goes on calling."""
    stalled_key, stalled_entry = make_key("stalled", "acme")
    polite_key, polite_entry = make_key("polite", "globex")
    (shop.root / "keys.toml").write_text(stalled_entry + polite_entry)
    settings = write_settings(
        shop, model={"batch_requests": BATCH}, auth={"keys": "keys.toml"}, limits={"requests_max": 1000}
    )
    with serving(settings, context=CONTEXT) as server:
        async with (
            AsyncClient(server.target, api_key=polite_key, timeout_s=2) as polite,
            grpc.aio.insecure_channel(server.target) as channel,
        ):
            alone = await _latencies(polite, calls)
            before = server.rss_bytes()
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = generation_pb2.GenerateRequest(
                text="x", sampling=generation_pb2.SamplingParams(max_tokens=CONTEXT - 10)
            )
            metadata = (("authorization", f"Bearer {stalled_key}"),)
            streams = [stub.Generate(request, metadata=metadata, timeout=300) for _ in range(readers)]
            await asyncio.sleep(settle_s)
            beside = await _latencies(polite, calls)
            grown = server.rss_bytes() - before
            held = int(server.metrics().total("loraplex_requests_in_flight"))
            for stream in streams:
                stream.cancel()
            left = await _left(server)
            ended = sum(server.metrics().outcomes().values())
    return Stalled(p99(alone), p99(beside), grown / readers, held, ended == readers + 2 * calls, left)


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
