"""A span for each request under /v1, exported over OTLP/HTTP. It needs the extra `otel`.

A span is a child of the client's traceparent, and upstream gets the traceparent of the span. Names
and attributes are OpenTelemetry's semantic conventions for HTTP servers and for generative AI, from
which server.address is the API's. No content, key, token or query is in a span.

In this process, where gevent has patched the standard library, the exporter's thread is a greenlet:
its network waits hold up no stream, and batches are small, because encoding one does.
"""

from __future__ import annotations

import logging
import os
import urllib.parse
from collections.abc import Sequence
from typing import Any

import gevent
import requests
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from xaiproxy import __version__, config, log
from xaiproxy.http1.request_head import Head
from xaiproxy.http1.request_record import CLIENT_CLOSED_REQUEST, RequestRecord
from xaiproxy.proxy import routes, usage

logger = logging.getLogger(__name__)

BATCH = 16  # spans that are encoded at once
END_TIMEOUT = 1.5  # seconds in which the last spans are exported at the end of the process
PATH_LIMIT = 512  # characters
Field = tuple[str, str]

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
CERTIFICATES = ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE")
# By route; xAI's responses and Anthropic's messages are chats as well.
OPERATIONS = {"chat": "chat", "responses": "chat", "messages": "chat", "embeddings": "embeddings"}


class Exporter(SpanExporter):
    """Another exporter, of whose failures each outage's first is logged."""

    def __init__(self, exporter: SpanExporter, origin: str):
        self._exporter = exporter
        self._origin = origin
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except requests.RequestException:
            result = SpanExportResult.FAILURE
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            logger.warning(
                "traces cannot be exported to %s and are dropped; check that collector, or "
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                self._origin,
            )
        elif self._failing and not failing:
            logger.info("traces are exported to %s again", self._origin)
        self._failing = failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class Spans:
    def __init__(self, settings: config.Config):
        # Its lines hold URLs and repeat themselves; Exporter has its own.
        library = logging.getLogger("opentelemetry")
        library.propagate = False
        library.addHandler(logging.NullHandler())
        resource = Resource({"service.name": "xaiproxy", "service.version": __version__})
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(_exporter(settings), max_export_batch_size=BATCH)
        )
        self._tracer = self._provider.get_tracer("xaiproxy", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._server = urllib.parse.urlsplit(settings.upstream).hostname or ""

    def begin(self, head: Head) -> Span | None:
        """Return the span of a request; None if it is not sampled."""
        # Several traceparents count as none.
        names = ("traceparent", "tracestate") if len(head.values("traceparent")) == 1 else ()
        carrier = {name: ",".join(head.values(name)) for name in names}
        context = self._propagator.extract(carrier, Context())
        span = self._tracer.start_span(_method(head.method), context, SpanKind.SERVER)
        return span if span.is_recording() else None

    def propagated(self, span: Span | None, fields: list[Field]) -> list[Field]:
        """The fields for upstream, with the traceparent of the span (W3C Trace Context 3.2)."""
        if span is None:
            return fields
        context = span.get_span_context()
        value = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        kept = [field for field in fields if field[0].lower() != "traceparent"]
        return [*kept, ("traceparent", value)]

    def end(self, record: RequestRecord, found: usage.Usage | None) -> None:
        """End the span of a request that has one. `found`: the usage of its response."""
        span: Span = record.span
        route, method = routes.of(record.path), _method(record.method)
        name = f"{method} {route}"
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "url.scheme": "http",
            "url.path": log.redact(record.path, PATH_LIMIT),
            "server.address": self._server,
        }
        if record.status != CLIENT_CLOSED_REQUEST:
            attributes["http.response.status_code"] = record.status
        if error := error_type(record):
            attributes["error.type"] = error
        if record.method == "POST" and route in OPERATIONS:
            name = attributes["gen_ai.operation.name"] = OPERATIONS[route]
            attributes["gen_ai.provider.name"] = "x_ai"
            if found is not None:
                attributes["gen_ai.usage.input_tokens"] = found.input
                attributes["gen_ai.usage.output_tokens"] = found.output
                if found.model != usage.UNKNOWN:
                    name += f" {found.model}"
                    attributes["gen_ai.response.model"] = found.model
        span.update_name(name)
        span.set_attributes(attributes)
        if error and (record.status >= 500 or record.ended_by in ("upstream", "drain")):
            span.set_status(Status(StatusCode.ERROR))
        span.end(int((record.started_at + record.duration) * 1e9))

    def close(self) -> None:
        """Export the spans that have ended, for up to END_TIMEOUT seconds."""
        gevent.spawn(self._provider.shutdown).join(END_TIMEOUT)


def _exporter(settings: config.Config) -> Exporter:
    endpoint, egress = settings.otlp_endpoint, settings.egress
    parts = urllib.parse.urlsplit(endpoint)
    origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    session = requests.Session()
    session.trust_env = False
    if proxy := egress.proxy_for(origin):
        session.proxies = {parts.scheme: proxy}
    # None: the exporter uses that variable.
    ca_file = None if any(map(os.environ.get, CERTIFICATES)) else egress.ca_file
    return Exporter(OTLPSpanExporter(session=session, certificate_file=ca_file), origin)


def error_type(record: RequestRecord) -> str:
    """Why a request failed, of few values; "" if it did not."""
    if record.refusal is not None:
        return record.refusal.code
    if record.ended_by != "done":
        return {"upstream": "upstream_broken", "drain": "drain_timeout"}.get(
            record.ended_by, f"{record.ended_by}_closed"
        )
    return str(record.status) if record.status >= 400 else ""


def _method(method: str) -> str:
    """As http.request.method has it; a client could send any."""
    return method if method in METHODS else "_OTHER"
