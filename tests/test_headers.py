"""What goes with an event beside its value: ids, tenant, any header; the trace; and who of them wins."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import sqlalchemy as sa
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat
from confluent_kafka import Message as Record
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, Tracer, TraceState, get_current_span, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from outbox.catalogue import Catalogue
from outbox.errors import InvalidEvent, UsageError
from outbox.headers import context, current, fault
from outbox.message import Event
from outbox.writer import Outbox
from tests.conftest import MakeTopic
from tests.relay_process import Site, check_exactly_once
from tests.servers import Kafka

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


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


def thing(name: str, **options: Any) -> Event:
    return Event("test.Thing", {"thing": name}, **options)


# ---- the context -----------------------------------------------------------------------------------------------------


def test_a_context_binds_headers_and_the_inner_one_wins() -> None:
    assert current() == {}
    cause = uuid4()
    with context(correlation_id="c", tenant="acme", **{"x-request-id": "r"}):
        assert current() == {"ce_correlationid": "c", "ce_tenant": "acme", "x-request-id": "r"}
        with context(causation_id=cause, tenant="other"):
            inner = {"ce_correlationid": "c", "ce_causationid": str(cause), "ce_tenant": "other", "x-request-id": "r"}
            assert current() == inner
        assert current()["ce_tenant"] == "acme"
        with pytest.raises(KeyError), context(tenant="gone"):
            raise KeyError
        assert current()["ce_tenant"] == "acme"
    assert current() == {}


async def test_a_context_belongs_to_its_task_and_to_what_it_starts() -> None:
    together = asyncio.Barrier(2)

    async def work(tenant: str) -> tuple[str, str]:
        with context(tenant=tenant):
            await together.wait()
            return current()["ce_tenant"], (await asyncio.to_thread(current))["ce_tenant"]

    assert list(await asyncio.gather(work("a"), work("b"))) == [("a", "a"), ("b", "b")]
    assert current() == {}


def test_another_thread_has_its_own_context() -> None:
    seen = []
    with context(tenant="a"):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [{}]


REFUSED: list[tuple[Any, Any, str]] = [
    ("a", 5, "header 'a' is int 5; names and values"),
    ("a", None, "header 'a' is null; names and values"),
    (5, "a", "header 5 is str 'a'; names and values"),
    ("", "a", "a header has no name"),
    ("a", "\0", "holds a NUL or a lone surrogate"),
    ("a\ud800", "b", "holds a NUL or a lone surrogate"),
    ("ce_id", "1", "header ce_id is set by the relay"),
    ("CE_Type", "1", "header CE_Type is set by the relay"),
    ("ce_time", "1", "header ce_time is set by the relay"),
    ("Content-Type", "1", "header Content-Type is set by the relay"),
    ("ce_correlation_id", "1", "header 'ce_correlation_id' is no attribute of CloudEvents"),
    ("CE_tenant", "1", "header 'CE_tenant' is no attribute of CloudEvents"),
    ("ce_", "1", "header 'ce_' is no attribute of CloudEvents"),
    ("ce_tenant", "", "header ce_tenant: str '' is no value of CloudEvents"),
    ("ce_tenant", "a\nb", r"header ce_tenant: str 'a\nb' is no value of CloudEvents"),
]


@pytest.mark.parametrize(("name", "value", "said"), REFUSED)
def test_what_cannot_be_carried_is_refused_where_it_is_given(name: Any, value: Any, said: str) -> None:
    outbox = Outbox(CATALOGUE)
    with pytest.raises(InvalidEvent) as of_event:
        outbox.insert(thing("1", headers={name: value}))
    with pytest.raises(UsageError) as of_call:
        outbox.insert(thing("1"), headers={name: value})
    assert said in str(of_event.value)
    assert str(of_event.value).startswith("test.Thing: ")
    assert said in str(of_call.value)
    if isinstance(name, str):
        with pytest.raises(UsageError) as of_context, context(**{name: value}):
            pytest.fail("the block has begun")
        assert said in str(of_context.value)


def test_an_id_that_is_no_text_is_refused_and_a_uuid_is_one() -> None:
    with pytest.raises(UsageError, match="'ce_correlationid' is int 5"), context(correlation_id=5):  # type: ignore[arg-type]
        pytest.fail("the block has begun")
    with context(correlation_id=UUID(int=5)):
        assert current() == {"ce_correlationid": "00000000-0000-0000-0000-000000000005"}


@pytest.mark.parametrize("name", ["ce_subject", "ce_dataschema", "ce_tenant2", "x", "ключ", "a b", "CE-tenant", "ce"])
def test_other_headers_are_the_caller_s(name: str) -> None:
    assert fault(name, "äöü €\t" if not name.startswith("ce_") else "äöü €") is None


# ---- who wins, and every way in --------------------------------------------------------------------------------------


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def tracer() -> Tracer:
    return TracerProvider().get_tracer("test")


def written(engine: sa.Engine) -> dict[str, Any]:
    """The headers of each event, by its key."""
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT key, headers FROM outbox.outbox ORDER BY seq")).all()
    return {row.key: row.headers for row in rows}


async def test_every_way_in_takes_headers_and_the_nearest_wins(
    engine: sa.Engine, database: str, tracer: Tracer
) -> None:
    outbox = Outbox(CATALOGUE)
    connection = await asyncpg.connect(database)
    with tracer.start_as_current_span("request"), context(a="context", b="context", c="context"):
        events = thing("plain"), thing("own", headers={"c": "own", "traceparent": "own"})
        given = {"b": "call"}
        with Session(engine) as session, session.begin():
            outbox.add(session, *events, headers=given)
        with engine.begin() as core:
            core.execute(outbox.insert(thing("core"), headers=given))
        async with connection.transaction():
            await outbox.add_asyncpg(connection, thing("asyncpg"), headers=given)
    with Session(engine) as session, session.begin():
        outbox.add(session, thing("outside"))
    await connection.close()
    found = written(engine)
    assert found.pop("outside") is None
    assert found.pop("own") == {"a": "context", "b": "call", "c": "own", "traceparent": "own"}
    for headers in found.values():
        assert headers.pop("traceparent").startswith("00-")
    assert found == {key: {"a": "context", "b": "call", "c": "context"} for key in ("plain", "core", "asyncpg")}


@pytest.fixture
async def async_session(database: str, engine: sa.Engine) -> AsyncIterator[AsyncSession]:
    made = create_async_engine(database.replace("postgresql://", "postgresql+asyncpg://"))
    async with AsyncSession(made) as session:
        yield session
    await made.dispose()


async def test_an_event_of_a_flush_hook_has_the_context_of_the_task(
    engine: sa.Engine, async_session: AsyncSession
) -> None:
    """SQLAlchemy runs it in a greenlet of its own."""
    outbox = Outbox(CATALOGUE)

    @event.listens_for(async_session.sync_session, "after_flush")
    def after_flush(session: Session, _context: Any) -> None:
        outbox.add(session, thing("hook"))

    with context(tenant="acme"):
        async_session.add(Order(id=1))
        await async_session.commit()
    assert written(engine) == {"hook": {"ce_tenant": "acme"}}


def test_what_the_caller_changes_afterwards_is_not_in_the_event(engine: sa.Engine) -> None:
    outbox, own, given = Outbox(CATALOGUE), {"a": "1"}, {"b": "1"}
    with Session(engine) as session, session.begin():
        outbox.add(session, thing("1", headers=own), headers=given)
        own["a"] = given["b"] = "2"
    assert written(engine) == {"1": {"a": "1", "b": "1"}}


# ---- what readers find ----------------------------------------------------------------------------------------------


class AsInstrumented(Getter[list[tuple[str, bytes]]]):
    """Reads a record's headers as OpenTelemetry's instrumentations of Kafka's clients do: the name as it is, UTF-8."""

    def get(self, carrier: list[tuple[str, bytes]], key: str) -> list[str] | None:
        return next(([value.decode()] for name, value in carrier if name == key), None)

    def keys(self, carrier: list[tuple[str, bytes]]) -> list[str]:
        return [name for name, _ in carrier]


def test_readers_of_cloudevents_and_of_opentelemetry_find_what_the_writer_said(
    database: str, kafka: Kafka, topic: MakeTopic, engine: sa.Engine, tracer: Tracer
) -> None:
    name, cause = topic(), uuid4()
    outbox = Outbox(CATALOGUE)
    parent = SpanContext(1, 2, is_remote=True, trace_state=TraceState([("vendor", "x-1"), ("other", "2")]))
    with Site(database, kafka.bootstrap) as site:
        with (
            use_span(NonRecordingSpan(parent)),
            tracer.start_as_current_span("request") as span,
            context(correlation_id="request 7 €", causation_id=cause, tenant="acme", **{"x-own": "é\n"}),
            Session(engine) as session,
            session.begin(),
        ):
            [id_] = outbox.add(session, thing("key €", topic=name, headers={"ce_subject": "thing 1"}))
        site.taken(OUTBOX_CE_TIME="true")
        [record] = check_exactly_once(site)
    found = cloud_event(record)
    assert found.get_id() == str(id_)
    assert found.get_type() == "test.Thing"
    assert found.get_source() == f"/outbox/{site.name}"
    assert found.get_specversion() == "1.0"
    assert found.get_datacontenttype() == "application/avro"
    assert found.get_subject() == "thing 1"
    assert found.get_time() == datetime.fromtimestamp(record.timestamp()[1] / 1000, UTC)
    extensions = ("correlationid", "causationid", "tenant", "partitionkey")
    assert [found.get_extension(one) for one in extensions] == ["request 7 €", str(cause), "acme", "key €"]
    assert dict(headers(record))["x-own"].decode() == "é\n"

    extracted = TraceContextTextMapPropagator().extract(headers(record), getter=AsInstrumented())
    there = get_current_span(extracted).get_span_context()
    ours = span.get_span_context()
    assert (there.trace_id, there.span_id, there.trace_flags) == (ours.trace_id, ours.span_id, ours.trace_flags)
    assert there.trace_id == parent.trace_id
    assert dict(there.trace_state) == {"vendor": "x-1", "other": "2"}


def headers(record: Record) -> list[tuple[str, bytes]]:
    found: Any = record.headers()
    return list(found)


def cloud_event(record: Record) -> Any:
    value: Any = record.value()
    return from_binary(KafkaMessage(dict(headers(record)), record.key(), value), JSONFormat())
