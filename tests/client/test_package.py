"""What the package shows, what it imports, and the `loraplex` command."""

import subprocess
import sys

import loraplex_client
from loraplex_client.types import ConnectionSettings


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "loraplex_client.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_public_names_are_those_listed_sorted_and_there() -> None:
    names = loraplex_client.__all__
    assert sorted(names, key=lambda name: (not name.isupper(), name)) == names
    assert all(hasattr(loraplex_client, name) for name in names)


def test_importing_the_client_needs_nothing_but_grpc_and_protobuf() -> None:
    heavy = "torch,vllm,boto3,botocore,transformers,numpy,loraplex_registry,loraplex_server,google.rpc"
    code = f"import sys, loraplex_client; print([m for m in '{heavy}'.split(',') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_an_api_key_never_shows_in_a_repr() -> None:
    assert "hunter2" not in repr(ConnectionSettings(target="x", api_key="hunter2"))


def test_the_command_lists_its_subcommands_and_refuses_unknown_ones() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("demo", "generate", "serve", "train"))
    assert run("--version").stdout.startswith("loraplex 0.")
    wrong = run("sreve")
    assert wrong.returncode == 2
    assert "unknown command 'sreve'" in wrong.stderr


def test_a_call_that_fails_says_why_in_one_line() -> None:
    failed = run("generate", "hello", "--server", "127.0.0.1:1", "--timeout", "2")
    assert failed.returncode == 1
    assert failed.stderr.startswith("loraplex generate: ")
    assert len(failed.stderr.strip().splitlines()) == 1
