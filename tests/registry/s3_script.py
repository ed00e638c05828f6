"""A loopback HTTP server that answers S3 requests by a script: for answers a healthy server never gives."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Script:
    """Answers still to be given, as (status, headers, body); `None` breaks the connection. Requests are recorded."""

    answers: list[tuple[int, dict[str, str], bytes] | None]
    requests: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


def fault(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    """An S3 error answer."""
    return status, {}, f"<Error><Code>{code}</Code><Message>no secrets here</Message></Error>".encode()


def found(body: bytes, *, total: int | None = None) -> tuple[int, dict[str, str], bytes]:
    """A good answer to a GET; with `total`, to a ranged one."""
    ranged = {} if total is None else {"Content-Range": f"bytes 0-{len(body) - 1}/{total}"}
    return 200 if total is None else 206, {"ETag": '"e"', **ranged}, body


@contextlib.contextmanager
def scripted(*answers: tuple[int, dict[str, str], bytes] | None) -> Iterator[Script]:
    """Serve the answers in order; the last one for ever."""
    script = Script(list(answers))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            script.requests.append(f"{self.command} {self.path}")
            script.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            if found is None:
                self.close_connection = True
                self.connection.close()
                return
            status, headers, body = found
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)
            if int(headers.get("Content-Length", len(body))) > len(body):
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = answer  # noqa: N815  (the library's names)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
