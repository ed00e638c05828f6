"""What happened to one call, and when: written while it runs, read when it has ended by the access log and by tracing.

A journey holds names, numbers and moments; never a prompt, an answer or a credential.
"""

import re
import time
from dataclasses import dataclass, field
from typing import Final

PHASES_MAX: Final = 16
"""Moments of an adapter's load that are noted for one call."""

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_TRACEPARENT_CHARS_MAX: Final = 512


@dataclass(frozen=True)
class TraceParent:
    """The caller's place in a trace, as W3C Trace Context writes it: hexadecimal ids, and whether it is sampled."""

    trace_id: str
    span_id: str
    sampled: bool


def parse_traceparent(text: str | None) -> TraceParent | None:
    """Read the header `traceparent` (W3C Trace Context, level 1); None for what is absent or wrong."""
    if text is None or len(text) > _TRACEPARENT_CHARS_MAX:
        return None
    found = _TRACEPARENT.fullmatch(text)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceParent(trace_id, span_id, sampled=bool(int(flags, 16) & 1))


@dataclass(slots=True, kw_only=True)
class Journey:
    """See the module. Moments are of `time.monotonic()`, in seconds.

    Attributes:
        method: full name of the RPC, or of the one that an HTTP request stands for.
        arrived_unix_ns: the same moment as `arrived`, in nanoseconds since 1970.
        parent: the caller's place in a trace.
        who: "tenant/name" of the caller, "-" before that is known.
        tenant: who is served, and pays.
        reason: "OK", "CANCELLED", or the reason of the error.
        operation: "chat" or "text_completion" for a generation, "embeddings" for vectors, else "".
        model: what was asked for: an adapter reference, or the base model's name.
        adapter: "tenant/adapter@sha256:<hex>" that answered, "" for the base model.
        finish_reasons: of each completion of a generation that came to its end.
        stages: what the call was doing from each moment on; a stage ends where the next begins.
        phases: what a load was doing from each moment on, while this call waited for it.
        first_token: when it came.
        ended: when all was over.
    """

    method: str
    call_id: str = ""
    arrived: float = field(default_factory=time.monotonic)
    arrived_unix_ns: int = field(default_factory=time.time_ns)
    parent: TraceParent | None = None
    who: str = "-"
    tenant: str = ""
    reason: str = "OK"
    operation: str = ""
    model: str = ""
    base_digest: str = ""
    adapter: str = ""
    adapter_digest: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    stages: list[tuple[str, float]] = field(default_factory=list)
    phases: list[tuple[str, float]] = field(default_factory=list)
    first_token: float | None = None
    ended: float | None = None

    @property
    def over(self) -> float:
        """When the call ended; when it arrived, while it has not."""
        return self.arrived if self.ended is None else self.ended

    def enter(self, stage: str) -> None:
        """Begin a stage: "resolve", "queue", "adapter" or "engine"; of several completions the first one's count."""
        if all(stage != seen for seen, _ in self.stages):
            self.stages.append((stage, time.monotonic()))

    def progress(self, phase: str, _done: int, _total: int) -> None:
        """Note the moment a phase of a load begins; fit to be a `versions.Progress`, for any thread."""
        if len(self.phases) < PHASES_MAX and all(phase != seen for seen, _ in self.phases):
            self.phases.append((phase, time.monotonic()))

    def spans(self) -> list[tuple[str, float, float]]:
        """Return each stage with its begin and its end. For a journey that has ended."""
        ends = [*(began for _, began in self.stages[1:]), self.over]
        return [(name, began, end) for (name, began), end in zip(self.stages, ends, strict=False)]

    def seconds_in(self, stage: str) -> float | None:
        """Return how long a stage took; None when it was not reached. For a journey that has ended."""
        return next((end - began for name, began, end in self.spans() if name == stage), None)
