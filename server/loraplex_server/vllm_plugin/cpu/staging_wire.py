"""What server and worker say to each other about staging adapters: JSON, one object a line, over a Unix socket.

    {"n": 7, "op": "stage", "id": 3, "path": "/proc/41/fd/12/sha256-…"}   ->  {"n": 7, "bytes": 35127296}
    {"n": 8, "op": "drop", "id": 3}                                       ->  {"n": 8, "dropped": true}
    {"n": 9, "op": "list"}                                                ->  {"n": 9, "ids": [1, 2]}
    anything that is refused                                              ->  {"n": 7, "error": "…", "code": "refused"}

`n` numbers the questions of a connection and comes back with the answer; answers may overtake one another. The codes:
"refused" (these weights, this path), "busy" (too many wait), "gone" (dropped meanwhile), "failed" (anything else). A
line that is no question ends the connection. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, Literal

SOCKET_NAME: Final = "staging"
"""Name of the socket in the directory that the server makes."""

LINE_BYTES_MAX: Final = 8192
"""Longest question, its newline included."""

ANSWER_BYTES_MAX: Final = 1 << 20
"""Longest answer: a list of STAGED_MAX ids fits many times over."""

NUMBER_MAX: Final = 2**53
"""Questions and ids are below this: what every JSON reader takes exactly."""

PATH_CHARS_MAX: Final = 4096
ERROR_CHARS_MAX: Final = 500

STAGED_PREFIX: Final = "/loraplex-staged/"
"""Begins the path in a vLLM request whose adapter is staged: no such file exists, so that no step can read one."""

Operation = Literal["stage", "drop", "list"]
_KEYS: Final = {
    "stage": {"n", "op", "id", "path"},
    "drop": {"n", "op", "id"},
    "list": {"n", "op"},
}


class WireError(ValueError):
    """A line that is not of this protocol."""


@dataclass(frozen=True)
class Question:
    """One checked question; `adapter_id` is 0 and `path` "" where the operation has none."""

    n: int
    op: Operation
    adapter_id: int = 0
    path: str = ""

    def line(self) -> bytes:
        """As it is sent."""
        fields: dict[str, Any] = {"n": self.n, "op": self.op}
        if self.op != "list":
            fields["id"] = self.adapter_id
        if self.op == "stage":
            fields["path"] = self.path
        return json.dumps(fields).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Question:
        """Read a line.

        Raises:
            WireError: it is not exactly one of the questions.
        """
        found = _object(line, LINE_BYTES_MAX)
        op = found.get("op")
        if not isinstance(op, str) or found.keys() != _KEYS.get(op):
            raise WireError("not a question of this protocol")
        path = found.get("path", "")
        if not isinstance(path, str) or len(path) > PATH_CHARS_MAX or "\0" in path:
            raise WireError("path is not a path")
        number = _number(found["n"], "n")
        adapter_id = _number(found["id"], "id") if op != "list" else 0
        if op != "list" and adapter_id == 0:
            raise WireError("id counts from 1")
        return cls(number, op, adapter_id, path)  # type: ignore[arg-type]  # a key of _KEYS


def answer(n: int, **fields: object) -> bytes:
    """An answer as it is sent."""
    return json.dumps({"n": n, **fields}).encode() + b"\n"


def refusal(n: int, code: str, error: object) -> bytes:
    """An answer that says why not."""
    return answer(n, error=str(error)[:ERROR_CHARS_MAX], code=code)


def parse_answer(line: bytes) -> tuple[int, dict[str, Any]]:
    """Read an answer.

    Raises:
        WireError: it is none.
    """
    found = _object(line, ANSWER_BYTES_MAX)
    return _number(found.pop("n", None), "n"), found


def _object(line: bytes, bytes_max: int) -> dict[str, Any]:
    if len(line) > bytes_max:
        raise WireError(f"a line is longer than {bytes_max} bytes")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError("not JSON") from error
    if not isinstance(found, dict):
        raise WireError("not an object")
    return found


def _number(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < NUMBER_MAX:
        raise WireError(f"{name} is not a number from 0 to 2^53")
    return value
