"""Whatever schema a message was written with, and however it names it, the handler gets this version's event."""

import json
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from outbox import Catalogue, DecodeError, Event
from outbox.consumer import Consumer, Meta
from outbox.consumer.decoding import Decoder, Frame
from outbox.registry import SchemaRegistry
from tests.conftest import MakeTopic
from tests.consumer.stage import SCHEMA, Effects, Sent, catalogue, fast, insert, record, running, send, thing, until
from tests.servers import Kafka, Registry

NEWER: dict[str, Any] = {
    **SCHEMA,
    "fields": [*SCHEMA["fields"], {"name": "added", "type": "string", "default": "a newer writer's field"}],
}


def newer() -> Catalogue:
    return Catalogue([NEWER])


async def nowhere(_: int) -> str | None:
    return None


def frame_of(sent: Sent, schema_id: int) -> Sent:
    """In Confluent's frame instead of Avro's own."""
    return Sent(sent.id, sent.key, b"\0" + schema_id.to_bytes(4, "big") + (sent.value or b"")[10:], sent.headers)


async def test_a_fingerprint_is_looked_for_in_the_catalogue_then_in_avro_schema_then_by_the_resolver() -> None:
    asked: list[int] = []
    text = json.dumps(NEWER)
    value = record(thing(5), newer()).value or b""
    [fingerprint] = newer().fingerprints

    async def find(number: int) -> str | None:
        asked.append(number)
        return text if len(asked) > 1 else None

    decoder = Decoder(catalogue(), find)
    assert decoder.missing(record(thing(1)).value or b"") is None
    frame = decoder.missing(value)
    assert frame == Frame("fingerprint", fingerprint)
    await decoder.learn(frame)
    with pytest.raises(DecodeError, match="no schema with the fingerprint"):
        decoder.decode(value)
    await decoder.learn(frame)
    event = decoder.decode(value)
    assert isinstance(event, Event)
    assert (event.data["number"], "added" in event.data) == (5, False)
    assert decoder.missing(value) is None
    assert asked == [fingerprint, fingerprint]
    resolving = Decoder(Catalogue([SCHEMA], resolver=lambda _: text), nowhere)
    await resolving.learn(frame)
    assert isinstance(resolving.decode(value), Event)


async def test_a_schema_of_another_record_is_refused_with_its_name() -> None:
    async def find(_: int) -> str | None:
        return json.dumps({**NEWER, "name": "Other"})

    with pytest.raises(DecodeError, match=r"in avro_schema cannot be used: no record test\.Thing\.Other"):
        await Decoder(catalogue(), find).learn(Frame("fingerprint", 1))


@pytest.fixture
def subject(registry: Registry) -> tuple[str, SchemaRegistry]:
    """A subject of this test's own."""
    return f"things-{uuid4().hex[:8]}-value", SchemaRegistry({"url": registry.url})


async def test_confluents_frame_is_read_by_the_registrys_schema_which_is_asked_for_once(
    registry: Registry, subject: tuple[str, SchemaRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, client = subject
    schema_id = client.register(name, json.dumps(NEWER))
    value = frame_of(record(thing(7), newer()), schema_id).value or b""
    decoder = Decoder(catalogue(), nowhere, registry.url)
    frame = decoder.missing(value)
    assert frame == Frame("id", schema_id)
    await decoder.learn(frame)
    assert decoder.missing(value) is None
    event = decoder.decode(value)
    assert isinstance(event, Event)
    assert (event.type, event.data["number"], "added" in event.data) == ("test.Thing.SEEN", 7, False)
    monkeypatch.setattr(httpx.Client, "request", lambda *_: pytest.fail("the registry was asked again"))
    await decoder.learn(frame)
    with pytest.raises(DecodeError, match="was not learned"):
        decoder.decode(b"\0\x7f\xff\xff\xff event")


async def test_an_id_that_the_registry_does_not_have_is_no_trouble_but_an_answer(registry: Registry) -> None:
    decoder = Decoder(catalogue(), nowhere, registry.url)
    with pytest.raises(DecodeError, match="the registry has no schema 999999"):
        await decoder.learn(Frame("id", 999_999))


async def test_a_consumer_reads_older_newer_framed_and_unframed_side_by_side_and_waits_for_a_registry_that_is_away(
    kafka: Kafka,
    topic: MakeTopic,
    engine: AsyncEngine,
    effects: Effects,
    registry: Registry,
    subject: tuple[str, SchemaRegistry],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = topic(1)
    schema_id = subject[1].register(subject[0], json.dumps(NEWER))
    [fingerprint] = newer().fingerprints
    effects.execute(
        "INSERT INTO outbox.avro_schema (fingerprint, subject, schema) VALUES (%s, 'things-value', %s)",
        fingerprint,
        json.dumps(NEWER),
    )
    framed = frame_of(record(thing(2), newer()), schema_id)
    send(kafka.bootstrap, name, [record(thing(0)), record(thing(1), newer()), framed])
    away = [3]
    real = SchemaRegistry.schema

    def sometimes(self: SchemaRegistry, number: int) -> str:
        away[0] -= 1
        if away[0] >= 0:
            raise ConnectionError("the registry is away")
        return real(self, number)

    monkeypatch.setattr(SchemaRegistry, "schema", sometimes)
    kafka_settings = fast(kafka.bootstrap)
    consumer = Consumer(name, engine, catalogue=catalogue(), kafka=kafka_settings, registry={"url": registry.url})

    @consumer.on(Event, topic=name)
    async def note(event: Event, session: AsyncSession, _: Meta) -> None:
        await insert(session, [event])

    async with running(consumer):
        await effects.until(3)
        await until(lambda: consumer.metrics.trouble["schemas"] == 3)
    assert [number for _, number in effects.rows("SELECT name, number FROM effect ORDER BY number")] == [0, 1, 2]
    assert consumer.metrics.dead == {}
