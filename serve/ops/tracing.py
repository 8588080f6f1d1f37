"""OpenTelemetry traces: one span a call, with the caller's `traceparent` as its parent. Off unless configured.

OpenTelemetry is imported when a `Tracing` is made; clients use it only in processes that have imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...data.extras import missing_packages

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_PARENT = ("traceparent", "tracestate")


class Tracing:
    """Makes the spans of a process. OpenTelemetry exports them in a thread of its own.

    Args:
      endpoint: of an OTLP collector over gRPC, such as "http://localhost:4317".
      service: what the spans' service is called.
      exporter: where spans go instead.

    Raises:
      InputError: OpenTelemetry is missing.
    """

    def __init__(self, endpoint: str = "", service: str = "classer", exporter: SpanExporter | None = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint)
        except ImportError:
            raise missing_packages("Tracing", "OpenTelemetry", "otel") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("classer")

    def start(self, name: str, parent: Mapping[str, str], attributes: Mapping[str, str]) -> Span:
        """Starts the span of a call; `parent` has the call's headers. End it with `end_span`."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {header: parent[header] for header in _PARENT if header in parent}
        context = TraceContextTextMapPropagator().extract(carrier)
        return self._tracer.start_span(name, context=context, kind=SpanKind.SERVER, attributes=dict(attributes))

    def close(self) -> None:
        """Exports the remaining spans."""
        self._provider.shutdown()


def end_span(span: Span, code: str, attributes: Mapping[str, float | int]) -> None:
    """Ends a call's span with its gRPC status."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("rpc.response.status_code", code)
    for name, value in attributes.items():
        span.set_attribute(name, value)
    if code != "OK":
        span.set_status(Status(StatusCode.ERROR))
    span.end()


def trace_id(span: Span) -> str:
    """The id of a span's trace, as it stands in a log line."""
    return f"{span.get_span_context().trace_id:032x}"


def parent_of(span: Span) -> list[tuple[str, str]]:
    """The metadata that makes a call's span in the next process a child of this one."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
    return list(carrier.items())


def current_parent() -> Iterable[tuple[str, str]]:
    """The metadata of the span that is current where a client is called; empty without OpenTelemetry."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ()
    span = trace.get_current_span()
    return parent_of(span) if span.get_span_context().is_valid else ()
