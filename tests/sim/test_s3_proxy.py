"""The fault proxy does to requests what it is told, and the same for the same seed."""

import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.sim import s3_proxy
from tests.sim.s3_proxy import Request, S3Proxy


class Target:
    """A server that counts requests and answers each with 1,000 bytes; the second equal PUT gets 412."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        target = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                again = self.command == "PUT" and f"PUT {self.path}" in target.seen
                target.seen.append(f"{self.command} {self.path}")
                self.send_response(412 if again else 200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"x" * 1000)

            do_GET = do_PUT = answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    yield target
    target.server.shutdown()
    target.server.server_close()


@pytest.fixture
def proxy(target: Target) -> Iterator[S3Proxy]:
    with s3_proxy.running(target.server.server_port) as proxy:
        yield proxy


def ask(proxy: S3Proxy, method: str = "GET", path: str = "/a", **headers: str) -> tuple[int, bytes] | str:
    """Return status and body, or the name of the failure."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    try:
        connection.request(method, path, body=b"body" if method == "PUT" else None, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fault", "answer", "reached"),
    [
        (None, (200, b"x" * 1000), 1),
        (s3_proxy.DELAY, (200, b"x" * 1000), 1),
        (s3_proxy.LOST_REQUEST, "RemoteDisconnected", 0),
        (s3_proxy.LOST_REPLY, "RemoteDisconnected", 1),
        (s3_proxy.RESET, "ConnectionResetError", 1),
        (s3_proxy.TRUNCATED, "IncompleteRead", 1),
        (s3_proxy.ERROR_500, 500, 0),
        (s3_proxy.ERROR_500_APPLIED, 500, 1),
        (s3_proxy.ERROR_503, 503, 0),
        (s3_proxy.ERROR_409, 409, 0),
        (s3_proxy.ERROR_403, 403, 0),
    ],
)
def test_each_fault_is_what_its_name_says(
    fault: str | None, answer: object, reached: int, target: Target, proxy: S3Proxy
) -> None:
    proxy.use(s3_proxy.script(fault))
    got = ask(proxy)
    assert (got[0] if isinstance(answer, int) else got) == answer
    assert len(target.seen) == reached
    assert ask(proxy) == (200, b"x" * 1000)
    assert [request.fault for request in proxy.requests] == [fault, None]


def test_a_request_that_was_sent_twice_is_told_that_it_lost(target: Target, proxy: S3Proxy) -> None:
    proxy.use(s3_proxy.script(s3_proxy.ERROR_412_APPLIED))
    assert ask(proxy, "PUT", "/k", **{"If-None-Match": "*"})[0] == 412
    assert target.seen == ["PUT /k", "PUT /k"]


def test_a_seed_repeats_itself_and_keeps_its_rate() -> None:
    plain, conditional = Request("GET", "/", False), Request("PUT", "/", True)
    one = [s3_proxy.seeded(7, 0.05)(number, conditional) for number in range(20_000)]
    assert one == [s3_proxy.seeded(7, 0.05)(number, conditional) for number in range(20_000)]
    assert one != [s3_proxy.seeded(8, 0.05)(number, conditional) for number in range(20_000)]
    counts = Counter(one)
    assert 900 <= 20_000 - counts[None] <= 1_100
    assert set(counts) == {None, *s3_proxy.ALL}
    others = {s3_proxy.seeded(7, 1.0)(number, plain) for number in range(1_000)}
    assert others == set(s3_proxy.ALL) - {s3_proxy.ERROR_409, s3_proxy.ERROR_412_APPLIED}
