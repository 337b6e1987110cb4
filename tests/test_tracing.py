"""Spans: one for each batch, linked to where its events were written; set up by OpenTelemetry's variables; never in the
relay's way."""

import gzip
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, DEFAULT_ON
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from outbox.catalogue import Catalogue
from outbox.message import Event
from outbox.writer import Outbox
from relay import supervisor, tracing
from relay.tracing import LINKS, Complaints, Tracing, opened
from tests.conftest import MakeTopic
from tests.relay_process import Site, check_exactly_once
from tests.servers import Kafka

NOBODY = "http://127.0.0.1:1"
"""Nobody listens there."""


def row(headers: Any = None, topic: str = "orders") -> tuple[Any, ...]:
    """As the relay fetches it; the headers as PostgreSQL says a jsonb."""
    return (1, "id", "t", topic, "k", b"v", None, None if headers is None else json.dumps(headers), 0)


def parent(span: int, *, trace: int = 7, flags: str = "01", version: str = "00") -> dict[str, str]:
    return {"traceparent": f"{version}-{trace:032x}-{span:016x}-{flags}"}


class Spans:
    """Spans as they were ended, and the Tracing that makes them."""

    def __init__(self, sampler: Any = DEFAULT_ON) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider, "shop")

    def of(self, *rows: tuple[Any, ...], error: tuple[str, str] | None = None) -> ReadableSpan:
        self.tracing.batch(3, 42, rows, 0.25, error)
        return self._exporter.get_finished_spans()[-1]

    def linked(self, *headers: Any) -> list[int]:
        return [link.context.span_id for link in self.of(*map(row, headers)).links]


@pytest.fixture
def spans() -> Iterator[Spans]:
    made = Spans()
    yield made
    made.tracing.close()


# ---- a span ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_span_of_its_own_trace_with_its_time_and_what_it_is(spans: Spans) -> None:
    span = spans.of(row(parent(1)), row(parent(2)))
    assert (span.name, span.kind, span.parent) == ("publish shop lane 3", SpanKind.CLIENT, None)
    assert span.context is not None
    assert span.context.trace_id != 7
    assert dict(span.attributes or {}) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "orders",
        "messaging.batch.message_count": 2,
        "outbox.name": "shop",
        "outbox.lane": 3,
        "outbox.batch": 42,
    }
    assert span.status.status_code is StatusCode.UNSET
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time == 250_000_000
    assert abs(span.end_time - time.time_ns()) < 60e9


def test_a_batch_of_several_topics_names_none(spans: Spans) -> None:
    assert "messaging.destination.name" not in dict(spans.of(row(), row(topic="returns")).attributes or {})


def test_a_batch_that_failed_says_so(spans: Spans) -> None:
    span = spans.of(row(parent(1)), error=("KafkaTrouble", "no quorum"))
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "no quorum")
    assert dict(span.attributes or {})["error.type"] == "KafkaTrouble"
    assert len(span.links) == 1


def test_who_samples_nothing_pays_for_nothing() -> None:
    off = Spans(ALWAYS_OFF)
    off.tracing.batch(0, 1, [None], 0.1)  # what is no row would be an error, were it looked at
    off.tracing.close()


# ---- its links -------------------------------------------------------------------------------------------------------


def test_a_writer_is_linked_once_in_the_order_of_the_events(spans: Spans) -> None:
    assert spans.linked(parent(2), parent(1), parent(2), {**parent(3), "tracestate": "v=1"}) == [2, 1, 3]
    assert spans.of(row(parent(1))).links[0].context.is_remote


def test_no_more_are_linked_than_a_span_keeps(spans: Spans) -> None:
    assert spans.linked(*(parent(n) for n in range(1, 3 * LINKS))) == [*range(1, LINKS + 1)]


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"traceparent": None},
        {"traceparent": "x"},
        parent(0),
        parent(1, trace=0),
        parent(1, flags="00"),
        {"TRACEPARENT": parent(1)["traceparent"]},
        {"x-traceparent": parent(1)["traceparent"]},
        {'"traceparent': parent(1)["traceparent"]},
        {"note": '"traceparent": "' + parent(1)["traceparent"] + '"'},
        ["traceparent", parent(1)["traceparent"]],
    ],
)
def test_what_names_no_recorded_span_is_not_linked(spans: Spans, headers: Any) -> None:
    assert spans.linked(headers) == []


def test_a_later_version_of_the_header_is_read_as_w3c_has_it(spans: Spans) -> None:
    assert spans.linked({"traceparent": parent(5, version="cc")["traceparent"] + "-more"}) == [5]


# ---- from the environment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": " none , "},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": NOBODY, "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": NOBODY, "OTEL_SDK_DISABLED": "True"},
    ],
)
def test_no_traces_are_asked_for(environ: dict[str, str]) -> None:
    with capture_logs() as lines:
        assert opened(environ, "shop", "i") is None
    assert lines == []


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "'zipkin'"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "'otlp_proto_grpc'"),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_SPAN_LINK_COUNT_LIMIT": "many"}, "OTEL_SPAN_LINK_COUNT_LIMIT"),
    ],
)
def test_what_cannot_be_had_is_said_and_the_relay_goes_on(
    environ: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with capture_logs() as lines:
        assert opened(environ, "shop", "i") is None
    [line] = lines
    assert (line["event"], line["log_level"]) == ("tracing off", "warning")
    assert said in line["error"]


def test_without_the_variables_nothing_is_imported_and_without_the_extra_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in supervisor._TRACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "relay.tracing", None)  # an import of it fails
    monkeypatch.delattr("relay.tracing", raising=False)
    with capture_logs() as lines:
        assert supervisor._tracing("shop", "i") is None
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
        assert supervisor._tracing("shop", "i") is None
        assert lines == []
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
        assert supervisor._tracing("shop", "i") is None
    assert "kafka-outbox[otel]" in lines[0]["error"]


@pytest.fixture(autouse=True)
def unheard() -> Iterator[None]:
    """No handler is left behind."""
    logger = logging.getLogger("opentelemetry")
    before = [*logger.handlers]
    yield
    logger.handlers[:] = before


def test_a_setting_that_opentelemetry_does_without_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    with capture_logs() as lines:
        made = opened({"OTEL_EXPORTER_OTLP_ENDPOINT": NOBODY}, "shop", "i")
    assert made is not None
    made.close()
    [line] = lines
    assert line["event"] == "tracing in trouble"
    assert "'soon'" in line["error"]


def test_the_same_complaint_is_not_said_each_time() -> None:
    logger = logging.getLogger("opentelemetry.exporter")
    handler = Complaints()
    logger.addHandler(handler)
    with capture_logs() as lines:
        for number in range(5):
            logger.warning("away, try %d", number)
        logger.warning("queue full")
        logger.info("back")
    logger.removeHandler(handler)
    assert [line["error"] for line in lines] == ["away, try 0", "queue full"]


def test_a_collector_that_does_not_answer_does_not_hold_up_the_end(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "CLOSE_SECONDS", 0.05)
    hangs = threading.Event()
    monkeypatch.setattr(spans.tracing._provider, "shutdown", hangs.wait)
    began = time.monotonic()
    spans.tracing.close()
    assert time.monotonic() - began < 5
    hangs.set()


# ---- on real servers -------------------------------------------------------------------------------------------------


class Collector:
    """Receives spans by OTLP over HTTP."""

    def __init__(self) -> None:
        received: list[tuple[dict[str, str], Sent]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Content-Encoding"] == "gzip":
                    body = gzip.decompress(body)
                for one in ExportTraceServiceRequest.FromString(body).resource_spans:
                    resource = {pair.key: pair.value.string_value for pair in one.resource.attributes}
                    received.extend((resource, span) for scope in one.scope_spans for span in scope.spans)
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.received = received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


CATALOGUE = Catalogue(
    [
        {
            "type": "record",
            "name": "Thing",
            "namespace": "test",
            "topic": "things",
            "key": "thing",
            "fields": [{"name": "thing", "type": "string"}],
        }
    ]
)


def test_a_relay_sends_spans_that_lead_back_to_the_writers(
    database: str, kafka: Kafka, topic: MakeTopic, collector: Collector
) -> None:
    """Also of a batch that Kafka's protocol refuses, which is published at the next try, the event at fault parked."""
    name, outbox, tracer = topic(), Outbox(CATALOGUE), TracerProvider().get_tracer("service")
    with Site(database, kafka.bootstrap) as site:
        with psycopg.connect(database) as connection, tracer.start_as_current_span("request") as request:
            for thing in ("1", "2"):
                outbox.add_psycopg(connection, Event("test.Thing", {"thing": thing}, topic=name))
            connection.execute(
                "INSERT INTO outbox.outbox (type, topic, key, created_at) VALUES ('t', %s, 'poison', '1960-01-01')",
                (name,),
            )
        relay = site.relay(
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test"
        )
        relay.wait_for("events parked")
        check_exactly_once(site, parked=1)
        assert relay.said("tracing off") == relay.said("tracing in trouble") == []
    writer = request.get_span_context()
    assert {span.name for _, span in collector.received} == {f"publish {site.name} lane 0"}
    for resource, span in collector.received:
        assert resource["service.name"] == "outbox-relay"
        assert resource["deployment.environment.name"] == "test"
        assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
        for link in span.links:
            assert int.from_bytes(link.trace_id, "big") == writer.trace_id
            assert int.from_bytes(link.span_id, "big") == writer.span_id
    statuses = [(span.status.code == span.status.STATUS_CODE_ERROR, len(span.links)) for _, span in collector.received]
    assert (True, 1) in statuses, "refused"
    assert (False, 1) in statuses, "published"
