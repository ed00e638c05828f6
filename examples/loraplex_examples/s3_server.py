"""Starts a real S3 server on loopback, for the demo and the tests: `ministack`, from a virtual environment of its own.

The executable is `$LORAPLEX_MINISTACK`, or `.venv-s3/bin/ministack` in the repository. It binds every interface by
default and looks for docker; the environment given here keeps it on 127.0.0.1 and away from both.
"""

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

START_TIMEOUT_S = 30.0


@dataclass
class S3Server:
    """A running server; `environment` is what a client process needs to use it."""

    endpoint_url: str
    process: subprocess.Popen[bytes]
    environment: dict[str, str] = field(default_factory=dict)

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its `s3://` address."""
        import boto3

        boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
        ).create_bucket(Bucket=name)
        return f"s3://{name}"


def executable() -> Path | None:
    """Return the server's executable, None when it is not installed."""
    named = os.environ.get("LORAPLEX_MINISTACK")
    path = Path(named) if named else Path(__file__).parents[2] / ".venv-s3" / "bin" / "ministack"
    return path if path.is_file() else None


@contextlib.contextmanager
def running(port: int | None = None) -> Iterator[S3Server]:
    """Start the server and stop it afterwards. Keeps everything in memory."""
    path = executable()
    if path is None:
        raise FileNotFoundError("ministack is not installed; run `make setup` or set LORAPLEX_MINISTACK")
    port = port or _free_port()
    with tempfile.TemporaryDirectory(prefix="loraplex-s3-") as scratch:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": scratch,
            "TMPDIR": scratch,
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "DOCKER_HOST": "unix:///nonexistent",
            "SFTP_ENABLED": "0",
            "S3_PERSIST": "0",
            "LOG_LEVEL": "ERROR",
        }
        process = subprocess.Popen(
            [str(path)], env=environment, cwd=scratch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            _wait_for(process, port)
            yield S3Server(f"http://127.0.0.1:{port}", process, client_environment(port))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def client_environment(port: int) -> dict[str, str]:
    """Environment variables that make any AWS client talk to the server on `port`."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the S3 server ended with code {process.returncode} before it answered")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
            return
        time.sleep(0.05)
    raise TimeoutError(f"the S3 server did not listen within {START_TIMEOUT_S} s")
