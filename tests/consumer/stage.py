"""What the consumer's tests share: a catalogue, a topic with events as an outbox and its relay write them, effects."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import sqlalchemy as sa
from confluent_kafka import Producer, TopicPartition
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from outbox import Catalogue, Event
from outbox.consumer import Consumer
from outbox.message import uuid7
from tests.roles import ROLES

TYPE = "test.Thing.SEEN"

SCHEMA: dict[str, Any] = {
    "type": "record",
    "name": "Thing",
    "namespace": "test.Thing",
    "topic": "things",
    "key": "name",
    "fields": [
        {"name": "event_id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "event_type", "type": {"type": "enum", "name": "ThingType", "symbols": ["SEEN", "GONE"]}},
        {"name": "timestamp", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "name", "type": "string"},
        {"name": "number", "type": "long"},
    ],
}

PATIENCE = 30.0

EFFECTS = (
    "CREATE TABLE effect (place bigint GENERATED ALWAYS AS IDENTITY, event_id uuid NOT NULL, name text, number bigint)"
)


def catalogue() -> Catalogue:
    return Catalogue([SCHEMA])


def thing(number: int, name: str | None = None, type: str = TYPE) -> Event:  # noqa: A002 - the event's own word
    """An event of a key out of ten."""
    event_id = uuid7()
    data = {"event_id": event_id, "timestamp": datetime.now(UTC), "name": name or f"k{number % 10}", "number": number}
    return Event(type, data, id=event_id)


@dataclass(frozen=True)
class Sent:
    """A record as the relay makes it."""

    id: UUID
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, str | bytes | None]]


def record(event: Event, known: Catalogue | None = None) -> Sent:
    message = (known or catalogue()).encode(event)
    frame = b"\xc3\x01" + (message.fingerprint or 0).to_bytes(8, "little", signed=True)
    headers: list[tuple[str, str | bytes | None]] = [("ce_id", str(message.id)), ("ce_type", message.type)]
    key = None if message.key is None else message.key.encode()
    return Sent(message.id, key, frame + (message.value or b""), headers)


def send(bootstrap: str, topic: str, records: Iterable[Sent], partition: int | None = None) -> None:
    """All of them are in Kafka when this returns. Without a `partition` the key decides."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5, "partitioner": "murmur2_random"})
    for one in records:
        producer.produce(topic, one.value, one.key, -1 if partition is None else partition, headers=one.headers)
    assert producer.flush(PATIENCE) == 0


def committed(bootstrap: str, group: str, topic: str) -> dict[int, int]:
    """What the group has committed, by partition."""
    from confluent_kafka import Consumer as Client

    client = Client({"bootstrap.servers": bootstrap, "group.id": group})
    try:
        partitions = client.list_topics(topic, timeout=10).topics[topic].partitions
        found = client.committed([TopicPartition(topic, one) for one in partitions], timeout=10)
        return {one.partition: one.offset for one in found if one.offset >= 0}
    finally:
        client.close()


class Effects:
    """The table that the tests' handlers write, read through a connection of its own."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._connection.execute(EFFECTS)
        self._connection.execute(f"GRANT INSERT, SELECT ON effect TO {ROLES.inbox}")

    def rows(self, sql: str = "SELECT name, number FROM effect ORDER BY place") -> list[tuple[Any, ...]]:
        return list(self._connection.execute(sql))

    def execute(self, sql: str, *arguments: Any) -> None:
        self._connection.execute(sql, arguments)

    def by_key(self) -> dict[str, list[int]]:
        """The numbers of each key in the order of their effects."""
        found: dict[str, list[int]] = {}
        for name, number in self.rows():
            found.setdefault(name, []).append(number)
        return found

    async def until(self, count: int, sql: str = "SELECT count(*) FROM effect") -> None:
        """Until there are so many effects."""
        await until(lambda: self.rows(sql)[0][0] >= count, f"{count} by {sql}")

    def close(self) -> None:
        self._connection.close()


async def until(true: Callable[[], bool], what: str = "") -> None:
    """Looks again and again; nothing is waited for longer than PATIENCE."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not true():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.02)


@asynccontextmanager
async def running(consumer: Consumer) -> AsyncIterator["asyncio.Task[None]"]:
    """The consumer at work; stopped in order at the end, and its error raised."""
    task = asyncio.create_task(consumer.run())
    try:
        yield task
    finally:
        consumer.stop()
        await asyncio.wait_for(task, PATIENCE)


INSERT = sa.text("INSERT INTO effect (event_id, name, number) VALUES (:id, :name, :number)")


def row(event: Event) -> dict[str, Any]:
    return {"id": event.id, "name": event.data["name"], "number": event.data["number"]}


async def insert(session: AsyncSession, events: Iterable[Event]) -> None:
    """What the tests' handlers do."""
    await session.execute(INSERT, [row(event) for event in events])


def async_engine(url: str) -> AsyncEngine:
    return create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=12)


def fast(bootstrap: str, **more: Any) -> dict[str, Any]:
    """Kafka settings under which a death is noticed soon."""
    return {
        "bootstrap.servers": bootstrap,
        "session.timeout.ms": 1_000,
        "heartbeat.interval.ms": 200,
        **{name.replace("_", "."): value for name, value in more.items()},
    }
