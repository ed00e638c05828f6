"""One line per call, as text or as JSON: who called what, how it ended, and how long each part took.

Promises: never a credential, a prompt or an answer; one call is one line, whatever names callers have: what could be
taken for another field or another line is quoted.
"""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

from loraplex_server.observability.journey import Journey

_log = logging.getLogger("loraplex.access")


class AccessLog:
    """Writes to the logger `loraplex.access`."""

    def __init__(self, kind: str) -> None:
        """Write lines of this kind, see `config.ACCESS_LOGS`."""
        self._line = {"text": _text, "json": _json}.get(kind)

    def write(self, journey: Journey, *, trace_id: str = "") -> None:
        """Write the line of a call that has ended."""
        if self._line is not None:
            _log.info("%s", self._line(_fields(journey, trace_id)))


def send_json_lines_to_stdout() -> None:
    """Have nothing but the access log on standard output, a JSON object per line; for a process of its own."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(handler)
    _log.propagate = False


def _fields(journey: Journey, trace_id: str) -> dict[str, str | int | float]:
    """Return what is known of a call; times are milliseconds."""
    times = {
        "queue_ms": journey.seconds_in("queue"),
        "adapter_ms": journey.seconds_in("adapter"),
        "first_token_ms": None if journey.first_token is None else journey.first_token - journey.arrived,
        "ms": journey.over - journey.arrived,
    }
    arrived = datetime.fromtimestamp(journey.arrived_unix_ns / 1e9, UTC)
    known: dict[str, str | int | float] = {
        "time": arrived.isoformat(timespec="milliseconds"),
        "method": journey.method,
        "who": journey.who,
        "tenant": journey.tenant,
        "reason": journey.reason,
        "call": journey.call_id,
        "model": journey.model,
        "digest": journey.adapter_digest,
        "finish": ",".join(journey.finish_reasons),
        "trace": trace_id,
    }
    fields = {name: value for name, value in known.items() if value}
    if journey.prompt_tokens:  # it came to the engine
        fields |= {"prompt_tokens": journey.prompt_tokens, "output_tokens": journey.output_tokens}
    return fields | {name: round(seconds * 1000, 1) for name, seconds in times.items() if seconds is not None}


def _json(fields: Mapping[str, str | int | float]) -> str:
    return json.dumps(fields, separators=(",", ":"))


def _text(fields: Mapping[str, str | int | float]) -> str:
    """Return name=value pairs; the time is the log's own."""
    return " ".join(f"{name}={_plain(value)}" for name, value in fields.items() if name != "time")


def _plain(value: str | float) -> str:
    text = str(value)
    is_plain = text.isprintable() and not any(sign in text for sign in ' "=')
    return text if is_plain else json.dumps(text)
