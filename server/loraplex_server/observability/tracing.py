"""Journeys of calls as OpenTelemetry traces. The only module that knows OpenTelemetry; imported only when it is on.

A call is one span of kind SERVER, a child of the caller's span when the call brought a W3C `traceparent`, with a child
span for each stage: `resolve`, `queue`, `adapter`, with the phases of the load as events, and `engine`, with the event
`first_token`. They are made when the call has ended, from the moments its journey noted, so a call costs nothing while
it runs. Names are those of the semantic conventions for RPC and generative AI where there are any; ours begin with
`loraplex.`. No prompt, no answer, no credential.

Spans wait in a queue of SPANS_MAX for a thread that sends them; when the collector does not keep up they are dropped.
"""

import os
from threading import Thread
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    format_trace_id,
)
from opentelemetry.util.types import AttributeValue

from loraplex_server.config import TracingSettings
from loraplex_server.observability.journey import Journey, TraceParent

SPANS_MAX: Final = 2048
EXPORT_S_MAX: Final = 5.0
"""Seconds that sending a batch may take."""

CLOSE_S_MAX: Final = 5.0
"""Seconds that sending the rest may take at the end."""


class Tracing:
    """See the module."""

    def __init__(self, processor: SpanProcessor, *, sample_ratio: float) -> None:
        """Give spans to a processor.

        Args:
            processor: takes the spans of sampled traces.
            sample_ratio: share of the traces that begin here which are sampled, 0 to 1; a caller's choice counts for
                its own traces.
        """
        sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        named = {} if os.environ.get(OTEL_SERVICE_NAME) else {SERVICE_NAME: "loraplex"}
        resource = Resource.create(named)
        self._provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("loraplex_server")

    @classmethod
    def from_settings(cls, settings: TracingSettings) -> "Tracing":
        """Send spans by OTLP over HTTP; headers and certificates come from OTEL_EXPORTER_OTLP_* of the environment."""
        exporter = OTLPSpanExporter(endpoint=settings.endpoint, timeout=EXPORT_S_MAX)
        processor = BatchSpanProcessor(exporter, max_queue_size=SPANS_MAX)
        return cls(processor, sample_ratio=settings.sample_ratio)

    def record(self, journey: Journey) -> str:
        """Make the spans of a call that has ended; return its trace id in hexadecimal."""
        root = self._tracer.start_span(
            journey.method.lstrip("/"),
            context=_context(journey.parent),
            kind=SpanKind.SERVER,
            attributes=_attributes(journey),
            start_time=_unix_ns(journey, journey.arrived),
        )
        if root.is_recording():
            self._stages(root, journey)
        if journey.reason != "OK":
            root.set_status(Status(StatusCode.ERROR, journey.reason))
        root.end(_unix_ns(journey, journey.over))
        return format_trace_id(root.get_span_context().trace_id)

    def close(self) -> None:
        """Send what waits and stop; blocks for CLOSE_S_MAX at most, what was not sent then is lost."""
        closing = Thread(target=self._provider.shutdown, name="close tracing", daemon=True)
        closing.start()
        closing.join(CLOSE_S_MAX)

    def _stages(self, root: Span, journey: Journey) -> None:
        context, stages = trace.set_span_in_context(root), journey.spans()
        for number, (name, began, ended) in enumerate(stages):
            span = self._tracer.start_span(name, context=context, start_time=_unix_ns(journey, began))
            for event, moment in _events(name, journey):
                span.add_event(event, timestamp=_unix_ns(journey, moment))
            if journey.reason != "OK" and number == len(stages) - 1:  # where it failed
                span.set_status(Status(StatusCode.ERROR, journey.reason))
            span.end(_unix_ns(journey, ended))


def _context(parent: TraceParent | None) -> Context:
    if parent is None:
        return Context()
    context = SpanContext(
        trace_id=int(parent.trace_id, 16),
        span_id=int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT),
    )
    return trace.set_span_in_context(NonRecordingSpan(context), Context())


def _events(stage: str, journey: Journey) -> list[tuple[str, float]]:
    if stage in ("resolve", "adapter"):
        phases = ("resolve", "verify") if stage == "resolve" else ("fetch", "check", "load")
        return [(phase, moment) for phase, moment in journey.phases if phase in phases]
    if stage == "engine" and journey.first_token is not None:
        return [("first_token", journey.first_token)]
    return []


def _attributes(journey: Journey) -> dict[str, AttributeValue]:
    service, _, method = journey.method.lstrip("/").rpartition("/")
    found: dict[str, AttributeValue] = {
        "rpc.system.name": "grpc",
        "rpc.method": f"{service}/{method}",
        "loraplex.call": journey.call_id,
        "loraplex.caller": journey.who,
        "loraplex.tenant": journey.tenant,
        "loraplex.adapter": journey.adapter,
        "loraplex.adapter.digest": journey.adapter_digest,
        "loraplex.base.digest": journey.base_digest,
        "error.type": "" if journey.reason == "OK" else journey.reason,
        "gen_ai.operation.name": journey.operation,
        "gen_ai.request.model": journey.model,
    }
    if journey.operation:
        found |= {
            "gen_ai.provider.name": "loraplex",
            "gen_ai.response.id": journey.call_id,
            "gen_ai.usage.input_tokens": journey.prompt_tokens,
            "gen_ai.usage.output_tokens": journey.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": journey.cached_tokens,
        }
    if journey.finish_reasons:
        found["gen_ai.response.finish_reasons"] = journey.finish_reasons
    if journey.first_token is not None:
        found["gen_ai.response.time_to_first_chunk"] = journey.first_token - journey.arrived
    return {name: value for name, value in found.items() if value != ""}


def _unix_ns(journey: Journey, moment: float) -> int:
    return journey.arrived_unix_ns + int((moment - journey.arrived) * 1e9)
