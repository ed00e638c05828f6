"""The stock OpenSSF Model Signing command, from a virtual environment of its own.

It is `$LORAPLEX_MODEL_SIGNING`, or `.venv-interop/bin/model_signing` in the repository; `make setup` installs it from
`scripts/requirements-interop.txt`. `run` starts it as anybody would. `quick` has it run by a process that has imported
it already and forks for every call: the same code with the same arguments, without the half second of imports.
"""

import atexit
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

_SERVER = """
import io, json, os, runpy, sys
sys.argv = [sys.argv[1]]
import model_signing._cli
from model_signing import hashing, signing, verifying
for line in sys.stdin:
    words = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.argv[1:] = words
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ending:
            code = ending.code or 0
            if not isinstance(code, int):
                print(code)
                code = 1
        except BaseException as error:
            print(type(error).__name__, error)
            code = 1
        sys.stdout.flush()
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, said]), flush=True)
"""


def command() -> Path:
    """The command's path."""
    named = os.environ.get("LORAPLEX_MODEL_SIGNING")
    path = Path(named) if named else ROOT / ".venv-interop" / "bin" / "model_signing"
    if not path.is_file():
        pytest.fail("model_signing is not installed; run `make setup` or set LORAPLEX_MODEL_SIGNING")
    return path


def run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command and return what it did."""
    return _run([str(command()), *map(str, words)], cwd)


def quick(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a forked process; what it wrote to either stream is in `stdout`."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([str(word) for word in words]) + "\n")
    server.stdin.flush()
    answer: list[Any] = json.loads(server.stdout.readline())
    return subprocess.CompletedProcess(words, answer[0], answer[1], "")


def python(script: str, *words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script with the library the command is made of."""
    return _run([str(_python()), "-c", script, *map(str, words)], cwd)


def _python() -> Path:
    return command().parent / "python"


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [_python(), "-c", _SERVER, command()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(None),
    )
    atexit.register(server.kill)
    return server


def _run(words: list[str], cwd: Path | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=cwd, env=_environment(cwd), capture_output=True, text=True, timeout=120, check=False
    )


def _environment(home: Path | None) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home or "/nonexistent"),
        "PYTHONPATH": str(ROOT / "registry"),
    }
