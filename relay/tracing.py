"""OpenTelemetry: a span for each batch, linked to the spans in which its events were written.

It is set up by OpenTelemetry's own variables (`OTEL_…`) and needs the extra `otel`; without them nothing of it is even
imported. What is wrong with it is said in the log, and never stops the relay. docs/operations.md, "Traces".

Sources: OpenTelemetry's "Environment Variable Specification"; its semantic conventions for messaging spans and for
Kafka. The kind is CLIENT: the context that travels with a record is its writer's, not this span's.
"""

import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points, version
from itertools import islice
from typing import Any

import structlog
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

log = structlog.get_logger("relay")

LINKS = 128
"""Of a span at most: what OpenTelemetry keeps by default."""

CLOSE_SECONDS = 2.0
"""The last spans may take so long to leave at the end, which comes on top of OUTBOX_DRAIN_TIMEOUT."""

SILENCE = 60.0
"""Seconds after which a complaint of OpenTelemetry is said again."""

_TOPIC = 3
_HEADERS = 7
_TRACEPARENT = re.compile(r'(?<!\\)"traceparent": ?"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})')
"""In a row's headers, as JSON. It cannot stand inside of a text there: a quote in a text has a backslash before it."""


class Tracing:
    """The spans of one relay process."""

    def __init__(self, provider: TracerProvider, outbox: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("relay", version("kafka-outbox"))
        self._outbox = outbox

    def batch(
        self, lane: int, number: int, rows: Sequence[Any], seconds: float, error: tuple[str, str] | None = None
    ) -> None:
        """The Kafka transaction of batch `number` began `seconds` ago and was acknowledged just now; or an error (its
        type, and words that hold nothing of an event) ended the hold on the lane before, and what became of the batch
        is for the next take to find out.

        `rows`: as `Queries.fetch` returns them. Costs 40 µs a batch, and up to 0.6 µs an event with a `traceparent`.
        """
        now = time.time_ns()
        span = self._tracer.start_span(
            f"publish {self._outbox} lane {lane}",
            Context(),
            SpanKind.CLIENT,
            {"outbox.name": self._outbox, "outbox.lane": lane},  # for samplers
            start_time=now - int(seconds * 1e9),
        )
        if span.is_recording():
            span.set_attributes(_attributes(number, rows))
            for writer in islice(_writers(rows), LINKS):
                span.add_link(writer)
            if error is not None:
                kind, words = error
                span.set_attribute("error.type", kind)
                span.set_status(Status(StatusCode.ERROR, words))
        span.end(now)

    def close(self) -> None:
        """Send what was not sent yet, for CLOSE_SECONDS at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


def _attributes(number: int, rows: Sequence[Any]) -> dict[str, str | int]:
    topics = {row[_TOPIC] for row in rows}
    return {
        "messaging.system": "kafka",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.batch.message_count": len(rows),
        "outbox.batch": number,
        **({"messaging.destination.name": topics.pop()} if len(topics) == 1 else {}),
    }


def _writers(rows: Sequence[Any]) -> Iterator[SpanContext]:
    """The spans in which events were written, each once; none that its writer did not record."""
    seen = set()
    for row in rows:
        found = _TRACEPARENT.search(row[_HEADERS] or "")
        if found is None or found[0] in seen:
            continue
        seen.add(found[0])
        trace, span, flags = (int(part, 16) for part in found.groups())
        context = SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(flags))
        if context.is_valid and context.trace_flags.sampled:
            yield context


class Complaints(logging.Handler):
    """What OpenTelemetry's packages complain of, in the relay's log. The same seldom: while a collector is away they
    say it with every try."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: dict[tuple[str, int], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        place, now = (record.pathname, record.lineno), time.monotonic()
        if now - self._said.get(place, -SILENCE) >= SILENCE:
            self._said[place] = now
            log.warning("tracing in trouble", error=record.getMessage())


# ---- from the environment --------------------------------------------------------------------------------------------


def opened(environ: Mapping[str, str], outbox: str, instance: str) -> Tracing | None:
    """What the variables ask for. None: nothing, or it is not to be had, which the log says.

    Which exporters is read here, as OpenTelemetry does it for what it instruments. Their settings, the sampler's, the
    queue's and the resource's attributes are read by its SDK.

    `instance`: tells this process from others.
    """
    names = _asked_for(environ)
    if not names:
        return None
    logging.getLogger("opentelemetry").addHandler(Complaints())
    try:
        return Tracing(_provider(names, instance), outbox)
    except Exception as error:  # noqa: BLE001 -- packages of others; whatever they raise, events are to be published
        log.warning("tracing off", error=f"{type(error).__name__}: {error}")
        return None


def _asked_for(environ: Mapping[str, str]) -> list[str]:
    """Names of exporters, as their packages have registered them."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
    otlp = "otlp_proto_grpc" if protocol.strip() == "grpc" else "otlp_proto_http"
    names = [name.strip() for name in (environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")]
    return [otlp if name == "otlp" else name for name in names if name not in ("", "none")]


def _provider(names: list[str], instance: str) -> TracerProvider:
    exporters = [_exporter(name) for name in names]
    own = Resource({SERVICE_NAME: "outbox-relay", SERVICE_INSTANCE_ID: instance})
    resource = Resource.create().merge(own).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter(name: str) -> SpanExporter:
    for registered in entry_points(group="opentelemetry_traces_exporter", name=name):
        exporter: SpanExporter = registered.load()()
        return exporter
    raise LookupError(
        f"no package that is installed brings the exporter {name!r}: install one, or change OTEL_TRACES_EXPORTER or "
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
