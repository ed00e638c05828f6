"""Traces of calls as a collector gets them: a real one, which takes OTLP over HTTP, behind a real server."""

import asyncio
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import aiohttp
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from loraplex_client import AdapterNotFoundError
from loraplex_protos.v1 import generation_pb2 as gpb
from loraplex_protos.v1 import generation_pb2_grpc
from loraplex_server.config import TracingSettings
from loraplex_server.errors import ConfigError
from loraplex_server.observability import observing, tracing
from loraplex_server.observability.journey import TraceParent, parse_traceparent
from tests.server.conftest import Shop
from tests.server.rig import FOUR, running

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.services: set[str] = set()
        self.url = ""

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            said = {item.key: item.value.string_value for item in resource.resource.attributes}
            self.services.add(said["service.name"])
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def root(self, reason: str = "") -> Span:
        [root] = [s for s in self.spans if s.kind == Span.SPAN_KIND_SERVER and s.status.message == reason]
        return root

    def children(self, root: Span) -> dict[str, Span]:
        return {span.name: span for span in self.spans if span.parent_span_id == root.span_id}


def attributes(span: Span) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if value.HasField("array_value"):
            return [plain(one) for one in value.array_value.values]
        return getattr(value, value.WhichOneof("value"))

    return {item.key: plain(item.value) for item in span.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def test_a_call_is_one_trace_from_the_caller_to_the_last_token(shop: Shop) -> None:
    digest = shop.publish("acme/orders", tag="prod").digest
    with collecting() as collector:
        async with running(shop, tracing={"endpoint": collector.url}) as rig:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.app.port}") as channel:
                call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(
                    gpb.GenerateRequest(
                        adapter="acme/orders@prod",
                        text="tell nobody",
                        sampling=gpb.SamplingParams(max_tokens=4),
                    ),
                    metadata=[("traceparent", f"00-{TRACE}-{PARENT}-01")],
                )
                messages = [message async for message in call]
            base = rig.engine.base.digest
        root = collector.root()
        assert collector.services == {"loraplex"}
        assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
        assert root.name == "loraplex.v1.GenerationService/Generate"
        said = attributes(root)
        assert said["loraplex.tenant"] == "acme"
        assert said["loraplex.adapter.digest"] == digest == messages[0].header.adapter_digest
        assert said["loraplex.base.digest"] == base
        assert said["gen_ai.request.model"] == "acme/orders@prod"
        assert said["gen_ai.operation.name"] == "text_completion"
        assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (11, 4)
        assert said["gen_ai.response.finish_reasons"] == ["length"]
        stages = collector.children(root)
        assert list(stages) == ["resolve", "queue", "adapter", "engine"]
        moments = [(s.start_time_unix_nano, s.end_time_unix_nano) for s in stages.values()]
        assert moments == sorted(moments), "one after the other"
        assert root.start_time_unix_nano <= moments[0][0]
        assert moments[-1][1] <= root.end_time_unix_nano
        assert [event.name for event in stages["adapter"].events] == ["fetch", "check", "load"]
        assert [event.name for event in stages["engine"].events] == ["first_token"]
        assert b"tell nobody" not in b"".join(collector.bodies)


async def test_a_failed_call_shows_its_reason_and_the_stage_it_failed_in(shop: Shop) -> None:
    with collecting() as collector:
        async with running(shop, tracing={"endpoint": collector.url}) as rig, rig.client() as client:
            with pytest.raises(AdapterNotFoundError):
                await client.generate("x", adapter="acme/absent", sampling=FOUR)
        root = collector.root("ADAPTER_NOT_FOUND")
        assert attributes(root)["error.type"] == "ADAPTER_NOT_FOUND"
        [(name, stage)] = collector.children(root).items()
        assert (name, stage.status.message) == ("resolve", "ADAPTER_NOT_FOUND")


async def test_http_calls_are_traced_too_and_a_caller_may_choose_not_to_be(shop: Shop) -> None:
    with collecting() as collector:
        server = {"http_listen": "127.0.0.1:0"}
        async with running(shop, server=server, tracing={"endpoint": collector.url}) as rig:
            address = f"http://127.0.0.1:{rig.app.http_port}/v1/completions"
            body = {"model": "sim", "prompt": "x", "max_tokens": 2}
            async with aiohttp.ClientSession() as http:
                for flags in ("01", "00"):
                    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
                    async with http.post(address, json=body, headers=headers) as answer:
                        assert answer.status == 200
        root = collector.root()
        assert root.trace_id.hex() == TRACE
        assert list(collector.children(root)) == ["queue", "engine"]


async def test_sampling_nothing_sends_nothing(shop: Shop) -> None:
    with collecting() as collector:
        tracing = {"endpoint": collector.url, "sample_ratio": 0.0}
        async with running(shop, tracing=tracing) as rig, rig.client() as client:
            await client.generate("x", sampling=FOUR)
        assert collector.spans == []


async def test_a_collector_that_never_answers_harms_no_call_and_does_not_hold_the_end_up(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "CLOSE_S_MAX", 0.2)
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        async with running(shop, tracing={"endpoint": url}) as rig:
            async with rig.client() as client:
                assert (await client.generate("x", sampling=FOUR)).text
            started = loop.time()
        assert loop.time() - started < tracing.EXPORT_S_MAX - 1


def test_tracing_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "loraplex_server.observability.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"pip install 'loraplex\[tracing\]'"):
        observing.make_tracing(TracingSettings(endpoint="http://127.0.0.1:9/v1/traces"))
    assert observing.make_tracing(TracingSettings()) is None


def test_a_traceparent_is_read_as_the_standard_says() -> None:
    assert parse_traceparent(f"00-{TRACE}-{PARENT}-01") == TraceParent(TRACE, PARENT, sampled=True)
    assert parse_traceparent(f"00-{TRACE}-{PARENT}-02") == TraceParent(TRACE, PARENT, sampled=False)
    assert parse_traceparent(f"cc-{TRACE}-{PARENT}-01-what-comes-later") is not None
    for wrong in (
        None,
        "",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01\n",
        f"cc-{TRACE}-{PARENT}-01-{'x' * 600}",
    ):
        assert parse_traceparent(wrong) is None, wrong


@given(st.text())
def test_whatever_a_caller_sends_as_traceparent_is_survived(text: str) -> None:
    found = parse_traceparent(text)
    assert found is None or text.isascii()
